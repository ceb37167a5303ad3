"""Balls around neighbouring rows, and which centroids can be the nearest of some row in a ball.

`assign` has the derivation. Shapes: n rows, T columns, K centroids, M balls.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from s2l_ray.core.kmeans.centroid_index import TILE, CentroidIndex

# Rows of a ball.
BALL_ROWS = 2_048
# More than the square root of what float32 loses below its range in squares.
TINY = 1e-18
# Balls whose distances to all centroids are held at once.
_BALLS_AT_ONCE = 64


def rounding(num_columns: int) -> float:
    """Twice e, where FAISS errs by at most e (|x| + |c|)^2 on the squared distance of x and c."""
    return (num_columns + 8) * 2.0**-23


@dataclass(frozen=True)
class BoundingBalls:
    """One ball around every BALL_ROWS rows: centres float64 [M, T], radii float64 [M].

    Radii are rounded up; a radius is infinite where squares leave float32.
    """

    centres: np.ndarray
    radii: np.ndarray

    @classmethod
    def around(cls, rows: np.ndarray) -> "BoundingBalls":
        """Of rows float32 [n, T], in their order.

        A ball holds its rows whatever its centre is, so the centre is the mean of every eighth row.
        """
        starts = range(0, len(rows), BALL_ROWS)
        centres, radii = np.empty((len(starts), rows.shape[1])), np.empty(len(starts))
        slack, ones = 1 + rounding(rows.shape[1]), np.ones(rows.shape[1], np.float32)
        for number, start in enumerate(starts):
            some = rows[start : start + BALL_ROWS]
            with np.errstate(over="ignore", invalid="ignore"):
                sample = some[::8]
                centre = np.full(len(sample), 1 / len(sample), np.float32) @ sample
                away = (some.reshape(-1) - np.tile(centre, len(some))).reshape(some.shape)
                largest = float((np.square(away, out=away) @ ones).max())
            centres[number] = centre
            radii[number] = math.sqrt(largest) * slack + TINY if largest < np.inf else np.inf
        return cls(centres, radii)

    def largest_distance(self, point: np.ndarray) -> float:
        """No row in the balls is farther from a point [T]."""
        away = np.linalg.norm(self.centres - point, axis=1) + self.radii
        return float(away.max(initial=0))

    def tiles_to_search(self, index: CentroidIndex) -> Iterator[np.ndarray]:
        """Of each ball, which SIMD tiles have a centroid that a row may be nearest to: [K / 16]."""
        offsets = index.stored_offsets
        sizes, error = np.linalg.norm(offsets, axis=1), rounding(offsets.shape[1])
        for first in range(0, len(self.radii), _BALLS_AT_ONCE):
            middles = self.centres[first : first + _BALLS_AT_ONCE] - index.centre
            radii = self.radii[first : first + _BALLS_AT_ONCE]
            (nearest,), (excess,) = _least_excess(middles, radii, offsets, 1)
            largest = np.linalg.norm(middles, axis=1)[:, None] + radii[:, None]
            errors = error * (largest + np.maximum(sizes, sizes[nearest][:, None])) ** 2
            possible = excess <= errors + 2.0**-140
            yield from possible.reshape(len(nearest), -1, TILE).any(axis=2)

    def two_nearest(self, offsets: np.ndarray, centre: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Which centroids can be among the two nearest of a row in a ball: bool [M, K].

        A centroid cannot if it is farther from all rows than the two centroids that are nearest to
        the ball's centre, by more than its error.

        Args:
            offsets: float64 [K, T] centroids less `centre` [T].
            error: float64 [K].
        """
        middles, num_nearest = self.centres - centre, min(2, len(offsets))
        _, excess = _least_excess(middles, self.radii, offsets, num_nearest)
        near: np.ndarray = np.minimum.reduce(excess) <= error
        return near


def _least_excess(
    middles: np.ndarray, radii: np.ndarray, offsets: np.ndarray, num_nearest: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The centroids a nearest to each ball's centre, and by how much the others are farther.

    Returns:
        The nearest ones, int64 [num_nearest, M]; for each of them the least of
        (|x - c|^2 - |x - a|^2) / 2 over all x in the ball, float64 [M, K].
    """
    sizes = (offsets**2).sum(axis=1)
    squared = (middles**2).sum(axis=1)[:, None] - 2 * middles @ offsets.T + sizes
    lines, rest = np.arange(len(squared)), squared.copy()
    nearest, excess = np.empty((num_nearest, len(squared)), np.int64), []
    for own in nearest:
        own[:] = rest.argmin(axis=1)
        rest[lines, own] = np.inf
        apart = sizes + sizes[own][:, None] - 2 * offsets[own] @ offsets.T
        apart = np.sqrt(np.maximum(apart, 0, out=apart), out=apart)
        excess.append((squared - squared[lines, own][:, None]) / 2 - radii[:, None] * apart)
    return nearest, excess
