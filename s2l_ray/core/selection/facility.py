"""Facility location over loss trajectories: rows chosen so that every row has a chosen one near it.

The objective of a choice S is f(S) = sum over rows i of max over j in S of s(i, j), with the
similarity s(i, j) = C - d(i, j), where d is the Euclidean distance and C the largest distance in
the block (CRAIG, Mirzasoleiman, Bilmes, Leskovec 2020; apricot). f is monotone and submodular. Once
one row is chosen, C cancels out of every gain, so the greedy choice is that of k-medoids: first the
medoid, then always the row that most lowers the sum of distances to the nearest chosen row.

**One block.** Greedy is lazy (Minoux 1978): gains only fall, so the last known gain of a row is an
upper bound, and most rows need no second look. The choice is exactly that of plain greedy, with
f(S) >= (1 - 1/e) of the best choice of that size (Nemhauser, Wolsey, Fisher 1978). Distances are
taken of one row to all, and kept only where they are smaller than a row's distance to its nearest
chosen row, which soon is nearly nowhere. Where more rows come together (merges), there is no [n, n]
matrix: until what is to be kept is small, every choice is the best of a random sample (stochastic
greedy, Mirzasoleiman et al. 2015), with f(S) >= (1 - 1/e - EPSILON) of the best in expectation.

**Many blocks.** A block passes on candidates: rows chosen by greedy, each with a weight, the number
of rows that it is the nearest candidate of. A merge is weighted greedy over the candidates of
several blocks; core/selection/merge_tree.py says how many and which. Where all blocks pass on the
whole budget (with blocks of 4,096 rows: up to 256) and one merge takes them, this is GreeDi
(Mirzasoleiman, Karbasi, Sarkar, Krause 2013), with at least (1 - 1/e)^2 / min(number of blocks,
budget) of the optimum. Were rows dealt to blocks at random, it would be RandGreeDi (Barbosa, Ene,
Nguyen, Ward 2015) with (1 - 1/e) / 2 in expectation. But rows of a block are neighbours in a file,
and blocks pass on less than a larger budget: **then neither bound holds.** What always holds is (a)
the bound above for every block and every merge, on its own rows and weights, and (b) by the
triangle inequality: the sum of distances of all rows to the final choice is at most that to their
candidates plus the weighted sum of the candidates' distances to the final choice. Measured, the
result is within a few percent of greedy on all rows (tests/unit/core/selection/test_facility.py).

Ties are decided by a keyed hash of ids, and rows are put in id order first, so the choice depends
neither on the order in which rows arrive nor on the process that computes it.

Shapes: n rows (or candidates) at hand, F features, m chosen.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2l_ray.core.hashing import COVERING, keyed_hash

# Most distances that are kept at once, 8 bytes each: all of a block of 4,096 rows.
KEPT_DISTANCES = 1 << 24
# Of stochastic greedy: the share of the objective that it may lose, and the fewest rows of a
# sample.
EPSILON = 0.01
MIN_SAMPLE = 256


@dataclass(frozen=True)
class Candidates:
    """Rows chosen of some blocks.

    Attributes:
        ids: int64 [m], ascending.
        rows: float32 [m, F].
        weights: number of rows that each stands for, int64 [m].
    """

    ids: np.ndarray
    rows: np.ndarray
    weights: np.ndarray


def facility_location(ids: np.ndarray, rows: np.ndarray, budget: int, seed: int) -> np.ndarray:
    """Which rows of one block greedy chooses: bool [n], with `budget` of them true.

    Args:
        ids: int64 [n], in any order.
        rows: float32 [n, F].

    Raises:
        ValueError: `budget` is below 1 or above n, an id occurs twice, or a row is not finite.
    """
    chosen = candidates(ids, rows, budget, seed)
    mask: np.ndarray = np.isin(ids, chosen.ids)
    return mask


def candidates(ids: np.ndarray, rows: np.ndarray, count: int, seed: int) -> Candidates:
    """The rows that `facility_location` chooses, and how many rows of the block each stands for."""
    return merge([Candidates(ids, rows, np.ones(len(ids), np.int64))], count, seed)


def merge(parts: Sequence[Candidates], count: int, seed: int) -> Candidates:
    """The weighted greedy choice of `count` of the candidates of several blocks or merges.

    A candidate that is not chosen hands its weight to the chosen one nearest to it.

    Raises:
        ValueError: as `facility_location`.
    """
    ids = np.concatenate([part.ids for part in parts])
    order = np.argsort(ids)
    ids = ids[order]
    rows = np.concatenate([part.rows for part in parts])[order]
    weights = np.concatenate([part.weights for part in parts])[order]
    if not 1 <= count <= len(ids) or (ids[1:] == ids[:-1]).any() or not np.isfinite(rows).all():
        raise ValueError(
            f"expected finite rows with distinct ids, at least {count} and 1 of them, "
            f"got {len(ids)}"
        )
    greedy = _Greedy(rows, weights, ids, seed)
    chosen = greedy.run(count)
    carried = np.bincount(greedy.owner, weights=weights, minlength=len(ids)).astype(np.int64)
    chosen.sort()
    return Candidates(ids[chosen], rows[chosen], carried[chosen])


class _Greedy:
    """Greedy on n weighted rows.

    Attributes:
        nearest: distance of each row to the nearest chosen row, [n].
        owner: number of that row, int64 [n].
        closer: of every row, which rows are closer to it than to any chosen row, and their
            distances; None while that would be more than KEPT_DISTANCES.
        num_closer: number of closer rows of each row of the last sample, while `closer` is None.
        bounds: a heap of (-upper bound of the gain, hash, row), with the most promising row first.
    """

    def __init__(self, rows: np.ndarray, weights: np.ndarray, ids: np.ndarray, seed: int) -> None:
        # A power of two, so that no square overflows.
        unit = math.ldexp(1.0, -math.frexp(float(np.abs(rows).max(initial=0)))[1])
        self.columns = [
            np.ascontiguousarray(column)
            for column in (rows * np.float64(unit)).astype(np.float32).T
        ]
        self.weights = weights.astype(np.float64)
        self.ids, self.seed = ids, seed
        self.hashes = keyed_hash(COVERING, seed, ids).tolist()
        self.nearest = np.full(len(rows), np.inf)
        self.owner = np.zeros(len(rows), np.int64)
        self.closer: list[tuple[np.ndarray, np.ndarray]] | None = None
        self.num_closer: list[int] = []
        self.bounds: list[tuple[float, int, int]] = []

    def run(self, count: int) -> list[int]:
        """Numbers of the chosen rows, in the order in which they are chosen."""
        num_rows = len(self.hashes)
        is_small = num_rows * num_rows <= KEPT_DISTANCES
        looked_at = range(num_rows) if is_small else self._sample([], count)
        first = min(
            looked_at,
            key=lambda row: (float((self._distances(row) * self.weights).sum()), self.hashes[row]),
        )
        self._choose(first)
        chosen = [first]
        if is_small:
            self._keep_closer(chosen)
        while len(chosen) < count:
            if self.closer is None:
                best = self._best_of(self._sample(chosen, count))
            else:
                best = self._best()
            self._choose(best)
            chosen.append(best)
            # n times the number of closer rows of a random row is about what would be kept.
            if self.closer is None and num_rows * np.mean(self.num_closer) < 0.8 * KEPT_DISTANCES:
                self._keep_closer(chosen)
        return chosen

    def _best(self) -> int:
        """The row with the largest gain, then the smallest hash, of all rows; lazily."""
        _, hash_, row = heapq.heappop(self.bounds)
        while True:
            current = (-self._gain(row), hash_, row)
            if not self.bounds or current <= self.bounds[0]:
                return row
            _, hash_, row = heapq.heapreplace(self.bounds, current)

    def _best_of(self, rows: list[int]) -> int:
        """The row with the largest gain, then the smallest hash, of some rows."""
        self.num_closer = []
        return min((-self._gain(row), self.hashes[row], row) for row in rows)[2]

    def _sample(self, chosen: list[int], count: int) -> list[int]:
        """Rows that are not chosen, drawn by their ids, others for every choice."""
        size = max(MIN_SAMPLE, math.ceil(len(self.ids) / count * math.log(1 / EPSILON)))
        draws = keyed_hash(f"{COVERING}, choice {len(chosen)}", self.seed, self.ids)
        draws[chosen] = np.uint64(2**64 - 1)
        drawn = np.argpartition(draws, min(size, len(draws) - 1))[:size]
        taken = set(chosen)
        return [int(row) for row in drawn if row not in taken]

    def _distances(self, row: int) -> np.ndarray:
        """Distances of all rows to one, float32 [n]; equal rows are exactly 0 apart."""
        total = np.zeros(len(self.hashes), np.float32)
        for column in self.columns:
            difference = column - column[row]
            total += np.multiply(difference, difference, out=difference)
        return np.sqrt(total, out=total)

    def _gain(self, row: int) -> float:
        """By how much choosing a row lowers the weighted sum of distances.

        The same numbers are summed in the same order whether they were kept or not.
        """
        if self.closer is None:
            where, distances = self._closer_to(row)
            self.num_closer.append(len(where))
            gains = self.nearest[where] - distances
        else:
            where, distances = self.closer[row]
            gains = self.nearest[where] - distances
            # A row that has come closer to a chosen row is never again closer to this one.
            if gains.min(initial=1.0) <= 0:
                keep = gains > 0
                where, gains = where[keep], gains[keep]
                self.closer[row] = where, distances[keep]
        return float((gains * self.weights[where]).sum())

    def _closer_to(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows are closer to this one than to a chosen row, and their distances, float32."""
        distances = self._distances(row)
        where = np.flatnonzero(distances < self.nearest).astype(np.int32)
        return where, distances[where]

    def _keep_closer(self, chosen: list[int]) -> None:
        """Fill `closer` and begin the lazy search, unless that is too much to keep."""
        closer, room = [], KEPT_DISTANCES
        for row in range(len(self.hashes)):
            closer.append(self._closer_to(row))
            room -= len(closer[-1][0])
            if room < 0:
                return
        self.closer = closer
        taken = set(chosen)
        self.bounds = [
            (-math.inf, hash_, row) for row, hash_ in enumerate(self.hashes) if row not in taken
        ]
        heapq.heapify(self.bounds)

    def _choose(self, row: int) -> None:
        distances = self._distances(row)
        closer = distances < self.nearest
        # A chosen row is its own, also where another chosen row has the same value.
        closer[row] = True
        self.nearest[closer] = distances[closer]
        self.owner[closer] = row
