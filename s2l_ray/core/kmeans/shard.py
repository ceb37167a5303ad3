"""The rows that one process holds for k-means, and what it answers about them.

A row's label depends on nothing but the row and the centroids (see `Nearest`), and members are added as int64 fixed point. Integer
sums are exact, so a round only takes the rows that changed their cluster out of one sum and adds them to another, and the objective
follows from the sums. Every method of a shard is a pure function of its parts and arguments; what it keeps is only a cache.

Shapes: N rows (examples that could be scored), T columns (steps, or features made of them), K clusters.
"""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.kmeans.bounds import BLOCK, MOST_LED, Balls, Leads, Nearest
from s2l_ray.core.kmeans.sums import Partial, Totals
from s2l_ray.core.model.allocation import give_back_freed_memory
from s2l_ray.errors import UserError

_CALM = 0.2  # share of rows with another label up to which leads are begun
_LEADING = 16  # bits of a hash by which rows are counted
_TOGETHER = 524_288  # rows up to which parts are put together; fewer cost more a round, more cost more to sort


@dataclass(frozen=True)
class Summary:
    """What the fixed point needs to know of the rows; addable. `num_steps` is 0 where there are no rows."""

    num_rows: int
    max_abs: float
    num_steps: int

    def __add__(self, other: "Summary") -> "Summary":
        if self.num_steps and other.num_steps and self.num_steps != other.num_steps:
            raise UserError(
                "Clustering trajectories: expected the same number of steps T in every part, got "
                f"{self.num_steps} and {other.num_steps}. The parts come from different proxies; score them "
                "again with one proxy."
            )
        return Summary(
            num_rows=self.num_rows + other.num_rows,
            max_abs=max(self.max_abs, other.max_abs),
            num_steps=max(self.num_steps, other.num_steps),
        )


NO_ROWS = Summary(num_rows=0, max_abs=0.0, num_steps=0)


@dataclass(frozen=True)
class Ranked:
    """A few rows in ascending (key, id) order: keys [m], ids int64 [m], rows float32 [m, T]."""

    keys: np.ndarray
    ids: np.ndarray
    rows: np.ndarray

    def first(self, m: int) -> "Ranked":
        """The m smallest by (key, id)."""
        return self._take(np.lexsort((self.ids, self.keys))[:m])

    def among_first(self, m: int) -> "Ranked":
        """Those with the m smallest keys, all that share the last one of them included, in their order: nothing is sorted for it."""
        if len(self.keys) <= m:
            return self
        return self._take(np.flatnonzero(self.keys <= np.partition(self.keys, m - 1)[m - 1]))

    def first_distinct(self, m: int, skip: set[bytes]) -> "Ranked":
        """The m smallest by (key, id) that differ in value from each other and from all values in `skip`."""
        seen, kept = set(skip), []
        for i in np.lexsort((self.ids, self.keys)):
            value = _value(self.rows[i])
            if value not in seen:
                seen.add(value)
                kept.append(i)
            if len(kept) == m:
                break
        return self._take(np.array(kept, dtype=np.int64))

    def joined(self, other: "Ranked") -> "Ranked":
        """Both, unordered."""
        if not len(self.ids):  # without rows there is no T
            return other
        if not len(other.ids):
            return self
        return Ranked(
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.rows, other.rows]),
        )

    def _take(self, index: np.ndarray) -> "Ranked":
        return Ranked(self.keys[index], self.ids[index], self.rows[index])


def squared_distances(rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance of each row to the centroid of its label: float64 [n], summed in step order.

    Column by column there is no reduction whose order numpy could choose, and zero means equal values.
    """
    total = np.zeros(len(rows))
    for column, values in zip(rows.T, centroids.T.astype(np.float64), strict=True):
        difference = column - values[labels]
        total += np.multiply(difference, difference, out=difference)
    return total


@dataclass(frozen=True)
class Labelled:
    """The rows of a shard under some centroids (as bytes): labels of every block, and totals where they were asked for."""

    centroids: bytes
    labels: list[np.ndarray]
    totals: Totals | None

    def renumbered(self, order: np.ndarray) -> "Labelled":
        """The same clusters under other numbers: cluster i is the one that was order[i], int [K]."""
        numbers = np.argsort(order)
        labels = [numbers.astype(own.dtype).take(own) for own in self.labels]
        return Labelled(self.centroids, labels, None if self.totals is None else self.totals[order])


class _Block:
    """Rows of some parts, float32 [n, T]; once in order of their clusters, `places` has each row's place as given."""

    def __init__(
        self, ids: Sequence[np.ndarray], rows: Sequence[np.ndarray], least: int, most: int
    ) -> None:
        """With the ids int64 [n] of each part, from `least` to `most`; of them is kept what is above the least, mostly 4 bytes or fewer."""
        self.rows = rows[0] if len(rows) == 1 else np.concatenate(rows)
        self._first, size = np.int64(least), np.min_scalar_type(most - least)
        first = self._first.view(np.uint64)
        self._above = np.concatenate([(own.view(np.uint64) - first).astype(size) for own in ids])
        self.places: np.ndarray | None = None
        self.balls: Balls | None = None
        self.leads: Leads | None = None
        self.calm = False  # whether few rows had another label in the last round

    @property
    def ids(self) -> np.ndarray:
        """Of the rows as they are now, int64 [n]."""
        return (self._above.astype(np.uint64) + self._first.view(np.uint64)).view(np.int64)

    def put_in_order(self, keys: np.ndarray) -> np.ndarray:
        """Sort the rows by keys [n], and draw the balls; the order is returned, int64 [n]."""
        order = np.argsort(keys, kind="stable")  # by radix where keys have 16 bits
        self._above, self.rows = self._above.take(order), self.rows.take(order, axis=0)
        self.places, self.balls = order.astype(np.uint32), Balls.around(self.rows)
        return order

    def leads_for(self, num_clusters: int, known: bool) -> Leads | None:
        """The leads of the last labels, where they help; `known` says whether they may be: no other centroids were asked for since."""
        if not known or self.balls is None or num_clusters > MOST_LED:
            self.leads = None
        elif self.leads is None and self.calm:
            self.leads = Leads(len(self.rows))
        return self.leads

    def given(self, places: slice) -> np.ndarray:
        """Where the rows are now that were given at these places, in the order given: int64 [n]."""
        if self.places is None:
            return np.arange(places.start, places.stop)
        found = np.flatnonzero((self.places >= places.start) & (self.places < places.stop))
        result = np.empty_like(found)
        result[self.places.take(found) - places.start] = found
        return result


class _Together:
    """Parts that become a block. Their ids lie so close that 4 bytes tell them apart, or only one has any."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.count, self._ends = 0, (0, 0)

    def takes(self, ids: np.ndarray) -> bool:
        """Whether a part with these ids may come to the others."""
        least, most = self._with(ids)
        return not self.count or (self.count + len(ids) <= _TOGETHER and most - least < 1 << 32)

    def add(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Rows float32 [n, T] and their ids int64 [n]."""
        self._ends = self._with(ids)
        self.parts.append((ids, rows))
        self.count += len(ids)

    def block(self) -> _Block:
        """The block; what it was made from is forgotten."""
        (ids, rows), self.parts = zip(*self.parts, strict=True), []
        return _Block(ids, rows, *self._ends)

    def _with(self, ids: np.ndarray) -> tuple[int, int]:
        """The smallest and the largest id, these included."""
        if not len(ids):
            return self._ends
        ends = int(ids.min()), int(ids.max())
        return (min(self._ends[0], ends[0]), max(self._ends[1], ends[1])) if self.count else ends


class Shard:
    """Some parts of the trajectories in memory: rows, ids, and the labels of the last centroids.

    Small parts are put together to blocks, and after the first round the rows of a block are sorted by their cluster, so that those of
    a ball (see Nearest) lie close together: the more rows are sorted together, the closer.
    """

    def __init__(
        self,
        parts: Iterable[tuple[np.ndarray, np.ndarray]],
        sort: bool = True,
        last: Labelled | None = None,
    ) -> None:
        """Take (example ids int64 [n], losses float32 [n, T]) of each part, only the rows that could be
        scored.

        With sort=False rows stay as they are, and `last` may be that of an earlier such Shard of the same parts.

        Raises UserError, naming the example, if a loss is not finite, or if T differs between parts.
        """
        self._blocks: list[_Block] = []
        self._where: list[tuple[int, slice]] = []  # of a part: its block, and its places there
        self._summary = NO_ROWS
        self._sort, self.last = sort, last
        together = _Together()
        for ids, rows in parts:
            ids, rows = np.asarray(ids, np.int64), np.ascontiguousarray(rows, np.float32)
            self._summary += _part_summary(ids, rows)
            if not together.takes(ids):
                self._blocks.append(together.block())
                together = _Together()
            self._where.append(
                (len(self._blocks), slice(together.count, together.count + len(ids)))
            )
            together.add(ids, rows)
        if together.parts:
            self._blocks.append(together.block())

    def summary(self) -> Summary:
        """Number of rows, largest absolute value and T."""
        return self._summary

    def sample(self, seed: int, m: int) -> Ranked:
        """The m rows with the smallest keyed hash, or all of them if there are fewer."""
        best = self._nothing(np.uint64)
        for ids, rows in self._filled():
            hashes = keyed_hash(seed, ids)
            keep = (
                hashes <= best.keys.max() if len(best.keys) >= m else np.ones(len(ids), dtype=bool)
            )
            best = best.joined(Ranked(hashes[keep], ids[keep], rows[keep])).among_first(m)
        return best.first(m)

    def sampled(self, seed: int, limit: int) -> "Shard":
        """The same rows, but only those whose keyed hash is at most `limit`."""
        keep = [keyed_hash(seed, block.ids) <= np.uint64(limit) for block in self._blocks]
        return Shard(
            (block.ids[k], block.rows[k]) for block, k in zip(self._blocks, keep, strict=True)
        )

    def hash_counts(self, seed: int) -> np.ndarray:
        """Rows by the leading 16 bits of their keyed hash, int64 [65536]."""
        counts = np.zeros(1 << _LEADING, dtype=np.int64)
        for block in self._blocks:
            counts += np.bincount(_leading(keyed_hash(seed, block.ids)), minlength=len(counts))
        return counts

    def hashes(self, seed: int, leading: int) -> np.ndarray:
        """The keyed hashes with these leading 16 bits, uint64; one row in 65,536."""
        found = [keyed_hash(seed, block.ids) for block in self._blocks]
        return np.concatenate([np.empty(0, np.uint64), *(h[_leading(h) == leading] for h in found)])

    def step(
        self,
        centroids: np.ndarray,
        exponent: int,
        previous: np.ndarray | None,
        order: np.ndarray | None = None,
    ) -> Partial:
        """Assign every row to its nearest centroid and add up the members; see Partial.

        `previous` are the centroids of the round before, None in the first. Their labels are normally still
        here; a shard that was restarted finds them again, so moves are exact whatever happened. Where clusters have been
        given other numbers since, order int [K] is the number that each of them had.
        """
        before = None if previous is None else self._labelled(previous)
        if previous is not None and before is not None and order is not None:
            previous, before = previous[order], before.renumbered(order)
        self.last = None  # its totals change from here on
        kept = before.totals if before else None
        if kept is None or kept.exponent != exponent or kept.sums.shape != centroids.shape:
            kept = None
        totals = kept or Totals(centroids.shape, exponent)
        search = Nearest(
            centroids, None if previous is None or kept is None else _ways(previous, centroids)
        )
        labels = before.labels if before else self._no_labels(len(centroids))
        if previous is not None and len(previous) != len(centroids):  # numbers of both must fit
            labels = [own.astype(np.int32) for own in labels]
        moves = 0 if before else self._summary.num_rows
        for number, (block, own) in enumerate(zip(self._blocks, labels, strict=True)):
            leads = block.leads_for(len(centroids), kept is not None)
            labels[number], moved = self._renewed(
                block, own, search, leads, totals, begun=kept is not None
            )
            block.calm = moved <= _CALM * len(own)
            moves += moved if before else 0
        if self._sort and (kept is None or moves > _CALM * self._summary.num_rows):
            give_back_freed_memory()  # sorting and moving leave holes of as much as a block
        self.last = Labelled(centroids.tobytes(), labels, totals)
        return Partial(totals.sums.copy(), totals.counts.copy(), totals.squares, moves)

    def _renewed(
        self,
        block: _Block,
        own: np.ndarray,
        search: Nearest,
        leads: Leads | None,
        totals: Totals,
        begun: bool,
    ) -> tuple[np.ndarray, int]:
        """New labels of a block's rows, and how many are not `own`; the rows are moved in the totals, or added if these have not begun."""
        moved, old = search.renew(block.rows, own, block.balls, leads)
        if begun:
            totals.move(block.rows.take(moved, axis=0), old, own.take(moved))
            return own, len(moved)
        if self._sort and block.balls is None:
            own = own.take(block.put_in_order(np.argsort(search.order).astype(own.dtype).take(own)))
        totals.add(block.rows, own)
        return own, len(moved)

    def farthest(self, m: int, centroids: np.ndarray, taken: np.ndarray) -> Ranked:
        """The m rows farthest from their nearest centroid, by (-squared distance, id), the key being the
        former.

        They differ in value from each other and from every row of `taken` [any, T]; fewer where there are no
        more.
        """
        skip = {_value(row) for row in taken}
        best = self._nothing(np.float64)
        for block, labels in zip(self._blocks, self._labelled(centroids).labels, strict=True):
            if not len(labels):
                continue
            ids, rows = block.ids, block.rows
            keys = -squared_distances(rows, centroids, labels)
            keep = keys <= best.keys[-1] if len(best.keys) == m else np.ones(len(ids), dtype=bool)
            best = best.joined(Ranked(keys[keep], ids[keep], rows[keep])).first_distinct(m, skip)
        return best

    def labels(self, part_index: int, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cluster int32 [n] and Euclidean distance float32 [n] of one part, in the order given."""
        number, places = self._where[part_index]
        block, labels = self._blocks[number], self._labelled(centroids).labels[number]
        index = block.given(places)
        own = labels.take(index).astype(np.int32)
        return own, np.sqrt(
            squared_distances(block.rows.take(index, axis=0), centroids, own)
        ).astype(np.float32)

    def spread(self, centroids: np.ndarray) -> np.ndarray:
        """Sums of squared deviations of each cluster's members at every step, float64 [K, T]; for pictures, not exact."""
        total = np.zeros(centroids.shape)
        for block, labels in zip(self._blocks, self._labelled(centroids).labels, strict=True):
            for start in range(0, len(labels), BLOCK):
                own = labels[start : start + BLOCK]
                squares = (block.rows[start : start + BLOCK] - centroids.take(own, axis=0)) ** 2
                # the sums so far come first, so that all is added in the order of the rows
                places = np.concatenate([np.arange(len(total)), own])
                for column, values in zip(total.T, squares.T, strict=True):
                    column[:] = np.bincount(places, np.concatenate([column, values]))
        return total

    def _labelled(self, centroids: np.ndarray) -> Labelled:
        """All rows under these centroids; the last ones asked for are kept."""
        key = centroids.tobytes()
        if self.last is None or self.last.centroids != key:
            self.last = None  # never hold two sets while the second is made
            search = Nearest(centroids)
            labels = self._no_labels(len(centroids))
            for block, own in zip(self._blocks, labels, strict=True):
                search.renew(block.rows, own, block.balls)
            self.last = Labelled(key, labels, None)
        return self.last

    def _no_labels(self, num_clusters: int) -> list[np.ndarray]:
        return [
            np.zeros(len(block.rows), np.min_scalar_type(num_clusters - 1))
            for block in self._blocks
        ]

    def _filled(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        return ((block.ids, block.rows) for block in self._blocks if len(block.rows))

    def _nothing(self, key_type: type) -> Ranked:
        steps = self._summary.num_steps
        return Ranked(
            np.empty(0, key_type), np.empty(0, np.int64), np.empty((0, steps), np.float32)
        )


def _ways(previous: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """How far each centroid has moved, float64 [K]; at most what float32 holds."""
    return np.minimum(np.linalg.norm(centroids - previous.astype(np.float64), axis=1), 1e30)


def _leading(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _LEADING)).astype(np.int64)


def merged(method: str, args: tuple[Any, ...], answers: Iterable[Any]) -> Any:
    """What a Shard of all rows would answer to a method, from the answers of those that have some of them, in any order."""
    match method:
        case "hashes":
            return np.concatenate(list(answers))
        case "sample":
            return functools.reduce(lambda a, b: a.joined(b).first(args[1]), answers)
        case "farthest":
            skip = {_value(row) for row in args[2]}
            return functools.reduce(lambda a, b: a.joined(b).first_distinct(args[0], skip), answers)
        case _:
            return functools.reduce(operator.add, answers)


def _part_summary(ids: np.ndarray, rows: np.ndarray) -> Summary:
    if rows.ndim != 2 or len(ids) != len(rows):
        raise ValueError(
            f"a part needs ids [n] and losses [n, T], got {ids.shape} and {rows.shape}"
        )
    if not len(rows):
        return NO_ROWS
    if not rows.shape[1]:
        raise UserError(
            "Clustering trajectories: expected at least one step per trajectory, got none."
        )
    low, high = float(rows.min()), float(rows.max())  # NaN and infinities come through
    if not (math.isfinite(low) and math.isfinite(high)):
        row, step = np.argwhere(~np.isfinite(rows))[0]
        raise UserError(
            f"Clustering trajectories: expected finite losses, got {rows[row, step]} for example_id {ids[row]} "
            f"in column {step} (from 0) of the trajectory. Rows that cannot be scored must be left out; score this "
            "part again. Where its losses are finite, clusters.features or clusters.weights leave the range of float32."
        )
    return Summary(num_rows=len(rows), max_abs=max(high, -low), num_steps=rows.shape[1])


def _value(row: np.ndarray) -> bytes:
    return (
        row + np.float32(0)
    ).tobytes()  # adding zero turns -0.0 into 0.0: equal values, equal bytes
