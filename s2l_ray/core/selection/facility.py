"""Facility location over trajectory features: rows chosen so that every row has a chosen one near it.

The objective of a choice S is f(S) = sum over rows i of the largest similarity s(i, j), j in S, where s(i, j) = C - d(i, j), d is the
Euclidean distance and C the largest distance in the block: the similarity that CRAIG (Mirzasoleiman, Bilmes, Leskovec 2020) and
apricot use. It is monotone and submodular. Once one row is chosen, C cancels out of every gain, so the greedy choice is that of
k-medoids: first the medoid, then always the row that lowers the sum of distances to the nearest chosen row most.

**One block.** `facility_location` is lazy greedy (Minoux 1978): gains only fall, so the last known gain of a row is an upper bound and most
rows need no second look. It is exact: the choice is that of plain greedy, with f(S) >= (1 - 1/e) of the best choice of that size (Nemhauser,
Wolsey, Fisher 1978). Distances are taken one row against all, and kept only where they are smaller than a row's distance to its nearest
chosen row, which soon is nearly nowhere. Where more than BLOCK rows come together (merges do), there is no [n, n] matrix: until what
is to be kept is small, every choice is the best of a random sample (stochastic greedy, Mirzasoleiman et al. 2015), with
f(S) >= (1 - 1/e - EPSILON) of the best choice in expectation.

**Many blocks.** Rows are cut into blocks of at most BLOCK rows of one part in id order. A block passes on *candidates*: rows chosen by
greedy, each with a weight, the rows that it is the nearest candidate of. Merging is weighted greedy over the candidates of several
blocks. A block passes on PASS_ON times its share of the budget, and at least a THINth of its rows or the whole budget. Where all blocks
pass on the whole budget (with blocks of 4,096 rows: up to 256), and one merge takes them, this is GreeDi (Mirzasoleiman, Karbasi, Sarkar,
Krause 2013), and the result has at least (1 - 1/e)^2 / min(number of blocks, budget) of the optimum; were rows dealt to blocks at
random, it would be RandGreeDi (Barbosa, Ene, Nguyen, Ward 2015) with (1 - 1/e) / 2 in expectation. Rows here are neighbours in a file, and
with a larger budget blocks pass on fewer than it: **then neither bound holds.** What always holds is (a) the bound above for every
block and every merge by itself, on its own rows and weights, and (b) by the triangle inequality: the sum of distances of all rows to the
final choice is at most that to their candidates plus the weighted sum of the candidates' distances to the final choice. Measured, the
result is within a few percent of greedy on all rows (tests/unit/core/selection/test_facility.py).

**For the stage that wires this** (`tree`): blocks are numbered over parts in id order; a task reads a part, makes the features of its
scored rows and answers, for each block, `candidates(ids, rows, count, seed)`. What travels from task to task is these: about PASS_ON x budget
rows in all (or a THINth of all rows, where the budget is small), 16 + 4 F bytes each: they may be many, so they stay in the object store and are merged in tasks, never on the
driver. The driver holds block sizes and references. `tree` says which neighbours a task merges and down to how many; where one merge would
exceed MERGE candidates there are several, first to thin the candidates out and then, if they are still more, each with its share of
the budget: rows of two such merges do not see each other. The references that `tree` returns hold exactly `budget` rows in all;
their ids ascend, within a merge and from one merge to the next, so a task that writes rows needs those whose range meets its part.

Ties are decided by keyed_hash(seed, id), and rows are put in id order first: their order on arrival does not matter, nor who computes what.

Shapes: n rows (or candidates) at hand, F features, m chosen.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from s2l_ray.core.hashing import keyed_hash

BLOCK = 4_096  # most rows of a block
MERGE = 32_768  # most candidates of a merge: its time grows with their square, half a minute here
PASS_ON = 2  # candidates of a block, as a multiple of its share of the budget, and
THIN = 16  # as many as one in 16 of its rows, where the whole budget is not less
LISTED = 1 << 24  # most distances that are kept at once, 8 bytes each: all of a block
EPSILON, SAMPLE = (
    0.01,
    256,
)  # of stochastic greedy: what it may lose, and the fewest rows that it looks at

Handle = TypeVar("Handle")


@dataclass(frozen=True)
class Candidates:
    """Rows chosen of some blocks: ids int64 [m] ascending, rows float32 [m, F], and weights int64 [m], the rows that each stands for."""

    ids: np.ndarray
    rows: np.ndarray
    weights: np.ndarray


def facility_location(ids: np.ndarray, rows: np.ndarray, budget: int, seed: int) -> np.ndarray:
    """The greedy choice of `budget` rows of one block: bool [n] for ids int64 [n] and rows float32 [n, F], in their order.

    Raises ValueError if budget is below 1 or above n, if an id occurs twice or a row is not finite.
    """
    kept = candidates(ids, rows, budget, seed)
    mask: np.ndarray = np.isin(ids, kept.ids)
    return mask


def candidates(ids: np.ndarray, rows: np.ndarray, count: int, seed: int) -> Candidates:
    """The greedy choice of `count` rows of one block with the rows that each covers; see `facility_location`."""
    return merge([Candidates(ids, rows, np.ones(len(ids), np.int64))], count, seed)


def merge(parts: Sequence[Candidates], count: int, seed: int) -> Candidates:
    """The weighted greedy choice of `count` out of the candidates of several blocks, or of earlier merges.

    A candidate that is not chosen hands its weight to the chosen one nearest to it. Raises as `facility_location`.
    """
    ids = np.concatenate([part.ids for part in parts])
    order = np.argsort(ids)
    ids = ids[order]
    rows = np.concatenate([part.rows for part in parts])[order]
    weights = np.concatenate([part.weights for part in parts])[order]
    if not 1 <= count <= len(ids) or (ids[1:] == ids[:-1]).any() or not np.isfinite(rows).all():
        raise ValueError(
            f"expected finite rows with distinct ids, at least {count} and 1 of them, got {len(ids)}"
        )
    search = _Search(rows, weights, ids, seed)
    chosen = search.run(count)
    carried = np.bincount(search.owner, weights=weights, minlength=len(ids)).astype(np.int64)
    chosen.sort()
    return Candidates(ids[chosen], rows[chosen], carried[chosen])


class _Search:
    """Greedy on n weighted rows: distance to and number of the nearest chosen row, and what is known of the gains."""

    def __init__(self, rows: np.ndarray, weights: np.ndarray, ids: np.ndarray, seed: int) -> None:
        unit = math.ldexp(
            1.0, -math.frexp(float(np.abs(rows).max(initial=0)))[1]
        )  # so that no square overflows
        self.columns = [
            np.ascontiguousarray(column)
            for column in (rows * np.float64(unit)).astype(np.float32).T
        ]
        self.weights = weights.astype(np.float64)
        self.ids, self.seed = ids, seed
        self.keys = keyed_hash(seed, ids).tolist()
        self.nearest = np.full(len(rows), np.inf)
        self.owner = np.zeros(len(rows), np.int64)
        self.lengths: list[int] = []  # of what `_closer` said of the rows of the last sample
        self.lists: list[tuple[np.ndarray, np.ndarray]] | None = None
        # (-upper bound of the gain, key, row): the smallest is the most promising
        self.bounds: list[tuple[float, int, int]] = []

    def run(self, count: int) -> list[int]:
        """Numbers of the chosen rows, in the order in which they are chosen."""
        num_rows = len(self.keys)
        small = num_rows * num_rows <= LISTED
        looked_at = range(num_rows) if small else self._sample([], count)
        first = min(
            looked_at,
            key=lambda row: (float((self._distances(row) * self.weights).sum()), self.keys[row]),
        )
        self._choose(first)
        chosen = [first]
        if small:
            self._list(chosen)
        while len(chosen) < count:
            best = (
                self._best_of(self._sample(chosen, count)) if self.lists is None else self._best()
            )
            self._choose(best)
            chosen.append(best)
            # the closer rows of a random row, times n, are about what would be kept
            if self.lists is None and num_rows * np.mean(self.lengths) < 0.8 * LISTED:
                self._list(chosen)
        return chosen

    def _best(self) -> int:
        """Of all rows the one with the largest gain, then the smallest key; lazily."""
        _, key, row = heapq.heappop(self.bounds)
        while True:
            current = (-self._gain(row), key, row)
            if not self.bounds or current <= self.bounds[0]:
                return row
            _, key, row = heapq.heapreplace(self.bounds, current)

    def _best_of(self, rows: list[int]) -> int:
        """Of some rows the one with the largest gain, then the smallest key."""
        self.lengths = []
        return min((-self._gain(row), self.keys[row], row) for row in rows)[2]

    def _sample(self, chosen: list[int], count: int) -> list[int]:
        """Rows that are not chosen, drawn afresh for every choice by their ids."""
        size = max(SAMPLE, math.ceil(len(self.ids) / count * math.log(1 / EPSILON)))
        draws = keyed_hash((self.seed << 32) + 1 + len(chosen), self.ids)
        draws[chosen] = np.uint64(2**64 - 1)
        drawn = np.argpartition(draws, min(size, len(draws) - 1))[:size]
        return [int(row) for row in drawn if row not in set(chosen)]

    def _distances(self, row: int) -> np.ndarray:
        """Distances of all rows to one, float32 [n]; equal rows are exactly 0 apart."""
        total = np.zeros(len(self.keys), np.float32)
        for column in self.columns:
            difference = column - column[row]
            total += np.multiply(difference, difference, out=difference)
        return np.sqrt(total, out=total)

    def _gain(self, row: int) -> float:
        """By how much choosing a row lowers the weighted sum of distances: the same sum of the same numbers, listed or not."""
        if self.lists is None:
            where, distances = self._closer(row)
            self.lengths.append(len(where))
            gains = self.nearest[where] - distances
        else:
            where, distances = self.lists[row]
            gains = self.nearest[where] - distances
            if gains.min(initial=1.0) <= 0:  # once passed by, for ever passed by
                keep = gains > 0
                where, gains = where[keep], gains[keep]
                self.lists[row] = where, distances[keep]
        return float((gains * self.weights[where]).sum())

    def _closer(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that are closer to this one than to any chosen row, and how close, float32."""
        distances = self._distances(row)
        where = np.flatnonzero(distances < self.nearest).astype(np.int32)
        return where, distances[where]

    def _list(self, chosen: list[int]) -> None:
        """Keep what `_closer` says of every row, unless that is too much, and begin the lazy search."""
        lists, room = [], LISTED
        for row in range(len(self.keys)):
            lists.append(self._closer(row))
            room -= len(lists[-1][0])
            if room < 0:
                return
        self.lists = lists
        taken = set(chosen)
        self.bounds = [
            (-math.inf, key, row) for row, key in enumerate(self.keys) if row not in taken
        ]
        heapq.heapify(self.bounds)

    def _choose(self, row: int) -> None:
        distances = self._distances(row)
        closer = distances < self.nearest
        closer[row] = True  # also where another chosen row has the same value
        self.nearest[closer] = distances[closer]
        self.owner[closer] = row


def blocks(num_rows: int) -> list[tuple[int, int]]:
    """The blocks of a part with so many scored rows in id order: (first, last + 1) of each, at most BLOCK rows, all but the last full."""
    return [(start, min(start + BLOCK, num_rows)) for start in range(0, num_rows, BLOCK)]


def tree(
    sizes: Sequence[int],
    budget: int,
    first: Callable[[int, int], Handle],
    join: Callable[[Sequence[Handle], int], Handle],
) -> list[Handle]:
    """Start the blocks' choices and the merges of them, and return the results, that in all are exactly `budget` candidates.

    Args:
        sizes: rows of each block, in id order; none is empty.
        first: (number of a block, count) -> its `candidates`, or a reference to what will be.
        join: (some of these, count) -> their `merge`, or a reference to what will be.

    Raises ValueError if budget is below 1 or above the number of rows.
    """
    total = sum(sizes)
    if not 1 <= budget <= total:
        raise ValueError(f"expected a budget from 1 to {total}, got {budget}")
    weights = list(sizes)
    counts = [_pass_on(size, size, budget, total) for size in sizes]
    handles = [first(number, count) for number, count in enumerate(counts)]
    while True:
        groups = _neighbours(counts)
        weights = [sum(weights[start:stop]) for start, stop in groups]
        found = [sum(counts[start:stop]) for start, stop in groups]
        counts = [
            _pass_on(have, weight, budget, total)
            for have, weight in zip(found, weights, strict=True)
        ]
        last = len(groups) == 1 or 4 * sum(counts) > 3 * sum(
            found
        )  # merging again would hardly thin them out
        if last:
            counts = _shares(weights, found, budget)
        handles = [
            join(handles[start:stop], count)
            for (start, stop), count in zip(groups, counts, strict=True)
            if count
        ]
        if last:
            return handles


def _pass_on(have: int, weight: int, budget: int, total: int) -> int:
    return min(have, max(-(-PASS_ON * budget * weight // total), min(budget, -(-have // THIN))))


def _neighbours(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbours with at most MERGE candidates together, as long as they can be: (first, last + 1) of each."""
    starts, together = [0], 0
    for number, count in enumerate(counts):
        if together and together + count > MERGE:
            starts.append(number)
            together = 0
        together += count
    return list(zip(starts, [*starts[1:], len(counts)], strict=True))


def _shares(weights: Sequence[int], most: Sequence[int], budget: int) -> list[int]:
    """The budget dealt out by weight, at most `most` to each and in all exactly `budget`: rounded down, the rest one each to those
    that lost most by it, the first of equals first."""
    total = sum(weights)
    shares = [
        min(budget * weight // total, limit) for weight, limit in zip(weights, most, strict=True)
    ]
    lost = sorted(
        range(len(shares)),
        key=lambda group: (-(budget * weights[group] / total - shares[group]), group),
    )
    while rest := budget - sum(shares):
        for group in [group for group in lost if shares[group] < most[group]][:rest]:
            shares[group] += 1
    return shares
