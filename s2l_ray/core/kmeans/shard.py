"""The rows that one process holds for k-means.

A row's label depends on nothing but the row and the centroids (see `assign`). Members are added as
int64 fixed point, and integer sums are exact. So a round only takes the rows that changed their
cluster out of one sum and adds them to another, and the objective follows from the sums. All that a
shard answers is a pure function of its parts and the query; what it remembers is only a cache.

Shapes: N rows (examples that could be scored), T columns (steps or features), K clusters.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from s2l_ray.core.hashing import KMEANS_SAMPLE, keyed_hash
from s2l_ray.core.kmeans.assign import assign, squared_distances
from s2l_ray.core.kmeans.block import Block, blocks_of
from s2l_ray.core.kmeans.centroid_index import CentroidIndex
from s2l_ray.core.kmeans.sums import PartialSums, Totals
from s2l_ray.core.memory import give_back_freed_memory
from s2l_ray.errors import UserError

# Share of rows with another label above which freed memory is given back after a round.
_MANY_MOVES = 0.2


@dataclass(frozen=True)
class Summary:
    """What the fixed point needs to know of rows; addable. `num_columns` is 0 without rows."""

    num_rows: int = 0
    max_abs: float = 0.0
    num_columns: int = 0

    def __add__(self, other: "Summary") -> "Summary":
        if self.num_columns and other.num_columns and self.num_columns != other.num_columns:
            raise UserError(
                "Clustering trajectories: expected the same number of steps T in every part, got "
                f"{self.num_columns} and {other.num_columns}. The parts come from different "
                "proxies; score them again with one proxy."
            )
        return Summary(
            num_rows=self.num_rows + other.num_rows,
            max_abs=max(self.max_abs, other.max_abs),
            num_columns=max(self.num_columns, other.num_columns),
        )


@dataclass(frozen=True)
class Labelled:
    """The rows of a shard under centroids (as bytes): labels of every block, perhaps totals."""

    centroids: bytes
    labels: list[np.ndarray]
    totals: Totals | None

    def renumbered(self, order: np.ndarray) -> "Labelled":
        """The same clusters under other numbers: cluster i was number order[i], int [K]."""
        numbers = np.argsort(order)
        labels = [numbers.astype(own.dtype).take(own) for own in self.labels]
        totals = None if self.totals is None else self.totals[order]
        return Labelled(self.centroids, labels, totals)


class Shard:
    """Some parts of the trajectories in memory, with the labels under the last centroids.

    Small parts are put together to blocks. After the first round the rows of a block are sorted by
    cluster, so that neighbours lie close together and `assign` can leave work out.

    Attributes:
        summary: of all rows.
        last: the labels that were asked for last.
    """

    def __init__(
        self,
        parts: Iterable[tuple[np.ndarray, np.ndarray]],
        sort: bool = True,
        last: Labelled | None = None,
    ) -> None:
        """Take (example ids int64 [n], losses float32 [n, T]) of each part.

        Only rows that could be scored may be given. With sort=False rows stay as they are, and
        `last` may be that of an earlier such shard of the same parts.

        Raises:
            UserError: naming the example, if a loss is not finite; if T differs between parts.
        """
        self.summary = Summary()
        self._sort, self.last = sort, last
        self._blocks: list[Block] = []
        # Of each part: its block, and its places there.
        self._where: list[tuple[int, slice]] = []
        for block, places in blocks_of(self._checked(parts)):
            self._where += [(len(self._blocks), place) for place in places]
            self._blocks.append(block)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids int64 [n] and rows float32 [n, T] of every block that has rows."""
        return ((block.ids, block.rows) for block in self._blocks if len(block.rows))

    def labelled_blocks(
        self, centroids: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Ids, rows and labels int [n] under these centroids, of every block that has rows."""
        labels = self._labelled(centroids).labels
        for block, own in zip(self._blocks, labels, strict=True):
            if len(own):
                yield block.ids, block.rows, own

    def sampled(self, seed: int, limit: int) -> "Shard":
        """The same rows, but only those whose keyed hash is at most `limit`."""
        chosen = (
            (keyed_hash(KMEANS_SAMPLE, seed, block.ids) <= np.uint64(limit), block)
            for block in self._blocks
        )
        return Shard((block.ids[keep], block.rows[keep]) for keep, block in chosen)

    def add_up(
        self,
        centroids: np.ndarray,
        exponent: int,
        previous: np.ndarray | None,
        order: np.ndarray | None = None,
    ) -> PartialSums:
        """Assign every row to its nearest centroid, add up the members: see `queries.LloydStep`."""
        before = None if previous is None else self._labelled(previous)
        if previous is not None and before is not None and order is not None:
            previous, before = previous[order], before.renumbered(order)
        # The totals of the last labels change from here on.
        self.last = None
        totals = None if before is None else before.totals
        if totals is not None and totals.fits(centroids.shape, exponent):
            assert previous is not None
            drift = _drift(previous, centroids)
        else:
            totals, drift = Totals(centroids.shape, exponent), None
        labels = self._no_labels(len(centroids)) if before is None else before.labels
        if previous is not None and len(previous) != len(centroids):
            # The numbers of both must fit.
            labels = [own.astype(np.int32) for own in labels]
        moves, index = 0, CentroidIndex(centroids)
        for number, block in enumerate(self._blocks):
            labels[number], moved = self._add_up_block(block, labels[number], index, totals, drift)
            moves += 0 if before is None else moved
        if self._sort and (drift is None or moves > _MANY_MOVES * self.summary.num_rows):
            # Sorting and moving leave holes of as much as a block.
            give_back_freed_memory()
        self.last = Labelled(centroids.tobytes(), labels, totals)
        return totals.now(self.summary.num_rows if before is None else moves)

    def labels(self, part_index: int, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cluster int32 [n] and Euclidean distance float32 [n] of one part, in the order given."""
        number, places = self._where[part_index]
        block, labels = self._blocks[number], self._labelled(centroids).labels[number]
        index = block.now_at(places)
        own = labels.take(index).astype(np.int32)
        squared = squared_distances(block.rows.take(index, axis=0), centroids, own)
        return own, np.sqrt(squared).astype(np.float32)

    def _add_up_block(
        self,
        block: Block,
        labels: np.ndarray,
        index: CentroidIndex,
        totals: Totals,
        drift: np.ndarray | None,
    ) -> tuple[np.ndarray, int]:
        """New labels of a block's rows, and how many have changed.

        Rows that changed are moved in the totals. Where these begin anew (without a drift), all
        rows are added.
        """
        places, before = assign(block.rows, labels, index, block.pruning, drift)
        if drift is not None:
            totals.move(block.rows.take(places, axis=0), before, labels.take(places))
            return labels, len(places)
        if self._sort and block.pruning is None:
            ranks = np.argsort(index.order).astype(labels.dtype)
            labels = labels.take(block.sort(ranks.take(labels)))
        totals.add(block.rows, labels)
        return labels, len(places)

    def _labelled(self, centroids: np.ndarray) -> Labelled:
        """All rows under these centroids; the last ones asked for are remembered."""
        key = centroids.tobytes()
        if self.last is None or self.last.centroids != key:
            # Two sets of labels are never held at once.
            self.last = None
            index, labels = CentroidIndex(centroids), self._no_labels(len(centroids))
            for block, own in zip(self._blocks, labels, strict=True):
                assign(block.rows, own, index, block.pruning)
            self.last = Labelled(key, labels, None)
        return self.last

    def _no_labels(self, num_clusters: int) -> list[np.ndarray]:
        smallest = np.min_scalar_type(num_clusters - 1)
        return [np.zeros(len(block.rows), smallest) for block in self._blocks]

    def _checked(
        self, parts: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The parts, added to the summary one by one."""
        for ids, rows in parts:
            ids, rows = np.asarray(ids, np.int64), np.ascontiguousarray(rows, np.float32)
            self.summary += _part_summary(ids, rows)
            yield ids, rows


def _drift(previous: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """How far each centroid has moved, float64 [K]; at most what float32 holds."""
    return np.minimum(np.linalg.norm(centroids - previous.astype(np.float64), axis=1), 1e30)


def _part_summary(ids: np.ndarray, rows: np.ndarray) -> Summary:
    if rows.ndim != 2 or len(ids) != len(rows):
        raise ValueError(
            f"a part needs ids [n] and losses [n, T], got {ids.shape} and {rows.shape}"
        )
    if not len(rows):
        return Summary()
    if not rows.shape[1]:
        raise UserError(
            "Clustering trajectories: expected at least one step per trajectory, got none."
        )
    # NaN and infinities come through minimum and maximum.
    low, high = float(rows.min()), float(rows.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        row, step = np.argwhere(~np.isfinite(rows))[0]
        raise UserError(
            f"Clustering trajectories: expected finite losses, got {rows[row, step]} for "
            f"example_id {ids[row]} in column {step} (from 0) of the trajectory. Rows that cannot "
            "be scored must be left out; score this part again. Where its losses are finite, "
            "clusters.features or clusters.weights leave the range of float32."
        )
    return Summary(num_rows=len(rows), max_abs=max(high, -low), num_columns=rows.shape[1])
