"""What k-means asks of its shards: every query is a value, see `core.query.Query`.

Shapes: n rows of a block, T columns, K clusters.
"""

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from s2l_ray.core.hashing import KMEANS_SAMPLE, KMEANS_START, keyed_hash
from s2l_ray.core.kmeans.assign import squared_distances
from s2l_ray.core.kmeans.centroid_index import CHUNK_ROWS
from s2l_ray.core.kmeans.shard import Shard, Summary
from s2l_ray.core.kmeans.sums import PartialSums
from s2l_ray.core.kmeans.topk import TopK, row_value

# Bits of a hash by which rows are counted.
_LEADING_BITS = 16


@dataclass(frozen=True)
class Summarise:
    """Number of rows, largest absolute value and T."""

    def of(self, shard: Shard) -> Summary:
        """See `Query`."""
        return shard.summary

    def merge(self, answers: Iterable[Summary]) -> Summary:
        """See `Query`; raises UserError if T differs."""
        return functools.reduce(operator.add, answers)


@dataclass(frozen=True)
class SmallestHashes:
    """The `count` rows with the smallest keyed hashes, or all rows if there are fewer: a sample."""

    seed: int
    count: int

    def of(self, shard: Shard) -> TopK:
        """See `Query`."""
        best = TopK.none(np.uint64, shard.summary.num_columns)
        for ids, rows in shard.blocks():
            hashes = keyed_hash(KMEANS_START, self.seed, ids)
            if len(best.keys) >= self.count:
                keep = hashes <= best.keys.max()
                hashes, ids, rows = hashes[keep], ids[keep], rows[keep]
            best = best.joined(TopK(hashes, ids, rows)).smallest_and_ties(self.count)
        return best.smallest(self.count)

    def merge(self, answers: Iterable[TopK]) -> TopK:
        """See `Query`."""
        return functools.reduce(lambda a, b: a.joined(b).smallest(self.count), answers)


@dataclass(frozen=True)
class HashCounts:
    """Rows by the leading 16 bits of their keyed hash: int64 [65536]."""

    seed: int

    def of(self, shard: Shard) -> np.ndarray:
        """See `Query`."""
        counts = np.zeros(1 << _LEADING_BITS, dtype=np.int64)
        for ids, _ in shard.blocks():
            counts += np.bincount(
                _leading(keyed_hash(KMEANS_SAMPLE, self.seed, ids)), minlength=len(counts)
            )
        return counts

    def merge(self, answers: Iterable[np.ndarray]) -> np.ndarray:
        """See `Query`."""
        return functools.reduce(operator.add, answers)


@dataclass(frozen=True)
class HashesWith:
    """The keyed hashes with these leading 16 bits, uint64 in any order: one row in 65,536."""

    seed: int
    leading: int

    def of(self, shard: Shard) -> np.ndarray:
        """See `Query`."""
        hashes = (keyed_hash(KMEANS_SAMPLE, self.seed, ids) for ids, _ in shard.blocks())
        found = [own[_leading(own) == self.leading] for own in hashes]
        return np.concatenate([np.empty(0, np.uint64), *found])

    def merge(self, answers: Iterable[np.ndarray]) -> np.ndarray:
        """See `Query`."""
        return np.concatenate(list(answers))


@dataclass(frozen=True)
class LloydStep:
    """Assign every row to its nearest centroid and add up the members, see PartialSums.

    Attributes:
        centroids: float32 [K, T].
        exponent: of the fixed point.
        previous: the centroids of the round before, None in the first. Their labels are normally
            still there. A shard that was restarted finds them again, so moves are exact whatever
            happened.
        order: int [K], where clusters have been given other numbers since: the number that each
            had.
    """

    centroids: np.ndarray
    exponent: int
    previous: np.ndarray | None = None
    order: np.ndarray | None = None

    def of(self, shard: Shard) -> PartialSums:
        """See `Query`."""
        return shard.add_up(self.centroids, self.exponent, self.previous, self.order)

    def merge(self, answers: Iterable[PartialSums]) -> PartialSums:
        """See `Query`."""
        return functools.reduce(operator.add, answers)


@dataclass(frozen=True)
class Farthest:
    """The `count` rows farthest from their nearest centroid, by (-squared distance, id).

    They differ in value from each other and from every row of `taken` [any, T]; there are fewer
    where there are no more such rows. The key is the negated squared distance.
    """

    count: int
    centroids: np.ndarray
    taken: np.ndarray

    def of(self, shard: Shard) -> TopK:
        """See `Query`."""
        skip, best = self._skip(), TopK.none(np.float64, shard.summary.num_columns)
        for ids, rows, labels in shard.labelled_blocks(self.centroids):
            keys = -squared_distances(rows, self.centroids, labels)
            if len(best.keys) == self.count:
                keep = keys <= best.keys[-1]
                keys, ids, rows = keys[keep], ids[keep], rows[keep]
            best = best.joined(TopK(keys, ids, rows)).smallest_distinct(self.count, skip)
        return best

    def merge(self, answers: Iterable[TopK]) -> TopK:
        """See `Query`."""
        skip = self._skip()
        return functools.reduce(
            lambda a, b: a.joined(b).smallest_distinct(self.count, skip), answers
        )

    def _skip(self) -> set[bytes]:
        return {row_value(row) for row in self.taken}


@dataclass(frozen=True)
class SquaredDeviations:
    """Sums of squared deviations of each cluster's members in every column: float64 [K, T].

    They are for pictures: their last bits depend on the order of adding.
    """

    centroids: np.ndarray

    def of(self, shard: Shard) -> np.ndarray:
        """See `Query`."""
        total = np.zeros(self.centroids.shape)
        for _, rows, labels in shard.labelled_blocks(self.centroids):
            for start in range(0, len(labels), CHUNK_ROWS):
                own = labels[start : start + CHUNK_ROWS]
                squares = (rows[start : start + CHUNK_ROWS] - self.centroids.take(own, axis=0)) ** 2
                # The sums so far come first, so that all is added in the order of the rows.
                places = np.concatenate([np.arange(len(total)), own])
                for column, values in zip(total.T, squares.T, strict=True):
                    column[:] = np.bincount(places, np.concatenate([column, values]))
        return total

    def merge(self, answers: Iterable[np.ndarray]) -> np.ndarray:
        """See `Query`."""
        return functools.reduce(operator.add, answers)


def _leading(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _LEADING_BITS)).astype(np.int64)
