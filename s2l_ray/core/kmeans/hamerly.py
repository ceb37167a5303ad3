"""Hamerly's bounds: rows whose margin is large keep their centroid without being searched.

The margin of a row is its distance to the nearest other centroid less that to its own (Hamerly
2010, "Making k-means even faster"). `assign` has the derivation.

Shapes: n rows, T columns, K centroids, M balls.
"""

import numpy as np

from s2l_ray.core.kmeans.bounding_balls import BALL_ROWS, TINY, BoundingBalls, rounding
from s2l_ray.core.kmeans.centroid_index import CHUNK_ROWS, CentroidIndex

# Multiplications. For matrix products of more, OpenBLAS takes twice as long for each.
_SMALL_PRODUCT = 10**6


class HamerlyBounds:
    """A lower bound of every row's margin, stored negated: `negative_margins` float32 [n].

    Infinite values belong to rows of which nothing is known.
    """

    def __init__(self, num_rows: int) -> None:
        self.negative_margins = np.full(num_rows, np.inf, np.float32)

    def loosen(self, labels: np.ndarray, drift: np.ndarray, ball_drift: np.ndarray) -> None:
        """Take off what a round may have taken off the margins.

        Args:
            labels: int [n] the centroid of each row.
            drift: float32 [K] how far each centroid has moved.
            ball_drift: float32 [M] the largest drift that matters to a row of each ball.
        """
        self.negative_margins += drift.take(labels)
        self.negative_margins += np.repeat(ball_drift, BALL_ROWS)[: len(labels)]


class BoundTest:
    """Finds the rows of some balls that FAISS may give another centroid than they have.

    It computes |x - c|^2 - |x|^2 = |c|^2 - 2cx by matrix products of its own. If that is smaller
    for a row's centroid than for every other one, by more than FAISS and these products together
    can err (`_gap`), the row keeps its centroid. In a ball only the centroids that can be among the
    two
    nearest of its rows are looked at: a row with another one has to move.
    """

    def __init__(self, index: CentroidIndex, balls: BoundingBalls, drift: np.ndarray) -> None:
        """With the drift float64 [K] of each centroid since the bounds were loosened or renewed."""
        offsets, error = index.offsets, rounding(index.num_columns)
        sizes, largest = np.linalg.norm(offsets, axis=1), balls.largest_distance(index.centre)
        # FAISS and this product may both be wrong by half of rounding() (|x| + |c|)^2.
        errors = 1.01 * error * (largest + sizes) ** 2 + TINY**2
        self._centre, self._gap = index.centre, (2 * errors).astype(np.float32)
        constants = (sizes**2 - errors)[:, None]
        self._factors = np.concatenate([-2 * offsets, constants], axis=1).astype(np.float32)
        self._rows = np.ones((offsets.shape[1] + 1, CHUNK_ROWS), np.float32)
        self._two = np.empty((2, CHUNK_ROWS), np.float32)
        self._products = np.empty((len(offsets) + 1) * BALL_ROWS, np.float32)
        self._near = balls.two_nearest(offsets, index.centre, errors)
        self._limits = -_sufficient_margin(index.distance_to_next, sizes, largest, error).astype(
            np.float32
        )
        # A margin is at most the distance to the farthest centroid. Two float32 sums round by less.
        rounded_up = drift * (1 + 2.0**-20) + (largest + sizes.max()) * 2.0**-21
        self._drift = rounded_up.astype(np.float32)
        self._ball_drift = np.where(self._near, self._drift, 0).max(axis=1)
        # By ball, the line of each centroid in `_compare`. Those that are not near share a last
        # line, which is infinite.
        last = self._near.sum(axis=1)[:, None]
        self._lines = np.where(self._near, np.cumsum(self._near, axis=1) - 1, last)

    def open_rows(self, rows: np.ndarray, labels: np.ndarray, bounds: HamerlyBounds) -> np.ndarray:
        """Places of rows [n, T] that may have another centroid than their label [n]: int64 [m].

        The bounds are loosened by the drift, and renewed where they no longer suffice.
        """
        unsure = self.loosened(labels, bounds)
        still_open = [np.empty(0, np.int64)]
        for start in range(0, len(unsure), CHUNK_ROWS):
            some = unsure[start : start + CHUNK_ROWS]
            margins = self._negative_margins(
                taken(rows, some), labels.take(some), some // BALL_ROWS
            )
            bounds.negative_margins[some] = margins
            still_open.append(some[np.isinf(margins)])
        return np.concatenate(still_open)

    def loosened(self, labels: np.ndarray, bounds: HamerlyBounds) -> np.ndarray:
        """Loosen the bounds; returns the places of rows whose margin no longer suffices, int64."""
        # Labels are widened once, and not in every take.
        index = labels.astype(np.intp)
        bounds.loosen(index, self._drift, self._ball_drift)
        return np.flatnonzero(bounds.negative_margins >= self._limits.take(index))

    def _negative_margins(self, rows: np.ndarray, own: np.ndarray, balls: np.ndarray) -> np.ndarray:
        """Of rows [n <= CHUNK_ROWS, T] with labels `own` [n] in balls [n]: infinite where open."""
        moved, two = self._rows[:, : len(rows)], self._two[:, : len(rows)]
        np.subtract(rows.T, self._centre[:, None], out=moved[:-1])
        numbers = np.arange(balls[0], balls[-1] + 1)
        starts, ends = (np.searchsorted(balls, numbers, side) for side in ("left", "right"))
        for ball, start, end in zip(numbers, starts, ends, strict=True):
            self._compare(ball, moved[:, start:end], own[start:end], two[:, start:end])
        sure = two[0] + self._gap.take(own) < two[1]
        two += np.einsum("tn,tn->n", moved[:-1], moved[:-1])
        first, second = np.sqrt(np.maximum(two, 0))
        return np.where(sure, first - second, np.float32(np.inf))

    def _compare(self, ball: int, moved: np.ndarray, own: np.ndarray, two: np.ndarray) -> None:
        """Put |x-c|^2 - |x|^2 into `two` [2, n]: of the own centroid, and the least of another."""
        factors, lines = self._factors[self._near[ball]], self._lines[ball]
        size = max(256, _SMALL_PRODUCT // factors.size)
        for start in range(0, len(own), size):
            some = own[start : start + size]
            num, columns = len(some), slice(start, start + size)
            flat = self._products[: (len(factors) + 1) * num]
            products = flat.reshape(-1, num)
            np.matmul(factors, moved[:, columns], out=products[:-1])
            products[-1] = np.inf
            at = lines.take(some) * num + np.arange(num)
            two[0, columns] = flat.take(at)
            flat[at] = np.inf
            two[1, columns] = products[:-1].min(axis=0)


def _sufficient_margin(
    apart: np.ndarray, sizes: np.ndarray, largest: float, error: float
) -> np.ndarray:
    """The margin from which on a row of each centroid keeps it: float64 [K].

    With D = |x - c| + |x - a|, |x - c|^2 - |x - a|^2 = g D for a margin g. FAISS finds c farther if
    g D is more than it may be wrong about both distances. That is at most 8 e (|a| + D)^2 with
    e = rounding(T), as x and c are within D of a. So g > 8 e (|a|^2 / D + 2 |a| + D) is enough.
    D is at least |a - c|. Where D is above 4 |x - a|, g is at least D / 2; so D counts only up to
    4 (|x| + |a|), or is far below |a|.

    Args:
        apart: float64 [K] the least |a - c| of each centroid a.
        sizes: float64 [K] |a|.
        largest: the largest |x|.
        error: rounding(T).
    """
    near = np.divide(sizes**2, apart, out=np.full_like(apart, np.inf), where=apart > 0)
    of_faiss = 8 * error * (near + 8 * sizes + 4 * largest)
    of_margin = (largest + sizes) * 2.0**-19
    margin: np.ndarray = of_faiss + of_margin + TINY
    return margin


def taken(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows at ascending places, without a copy where they are neighbours."""
    first, last = places[0], places[-1]
    return rows[first : last + 1] if last - first + 1 == len(places) else rows.take(places, axis=0)
