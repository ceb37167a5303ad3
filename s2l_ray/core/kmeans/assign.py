"""Nearest centroids of rows: one function, `assign`, behind which all shortcuts lie.

Shapes: n rows, T columns, K centroids.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from s2l_ray.core.kmeans.bounding_balls import BALL_ROWS, BoundingBalls
from s2l_ray.core.kmeans.centroid_index import (
    CHUNK_ROWS,
    TILE,
    CentroidIndex,
    tiles_are_independent,
)
from s2l_ray.core.kmeans.hamerly import BoundTest, HamerlyBounds, taken

# Centroids up to which all tiles are searched.
_FEW_CENTROIDS = 128
# Share of the tiles from which on all are searched, by an index that is there already.
_MOST_TILES = 0.8
# Centroids up to which Hamerly bounds cost less than they save.
MAX_BOUNDED = 512
# Share of rows with another label up to which bounds are begun: before, most would be lost at once.
_MAX_REASSIGNED = 0.2


class Pruning:
    """What is remembered of rows between calls of `assign`, so that it can leave work out."""

    def __init__(self, rows: np.ndarray) -> None:
        """For rows float32 [n, T], neighbours close together."""
        self.balls = BoundingBalls.around(rows)
        self.bounds: HamerlyBounds | None = None
        # Share of rows that the last call gave another label.
        self.reassignment_rate = 1.0


class Changes(NamedTuple):
    """Rows whose label has changed: their places int64 [m], and the labels they had, int [m]."""

    places: np.ndarray
    before: np.ndarray


def assign(
    rows: np.ndarray,
    labels: np.ndarray,
    index: CentroidIndex,
    pruning: Pruning | None = None,
    drift: np.ndarray | None = None,
) -> Changes:
    """Write the nearest centroid of each row over its label; the bits are the same with pruning.

    Args:
        rows: float32 [n, T].
        labels: int [n], changed in place.
        index: of the centroids.
        pruning: of these rows. Without it, FAISS searches all rows among all centroids.
        drift: float64 [K], how far each centroid has moved since the call that gave these labels
            with this pruning; None where that is not known, and bounds of earlier calls are
            forgotten.

    For a row x, its centroid a and another one c, all relative to the median centroid:

    1. Fixed products: FAISS computes |x - c|^2 in products of a fixed size, with an error of at
       most e (|x| + |c|)^2, e = (T + 8) 2^-24. Twice as much is allowed for.
    2. Bounding balls: if |x - m| <= r, then |x - c|^2 - |x - a|^2 is at least
       |m - c|^2 - |m - a|^2 - 2 r |c - a|. Where that is above the error, no row of the ball has c.
    3. SIMD tiles: which of two equal centroids FAISS finds depends on their places among the 16 of
       a tile. So centroids are stored close together, and only whole tiles are left out for a ball.
    4. Hamerly bounds: the margin g = |x - c| - |x - a| to the nearest other centroid shrinks in a
       round by at most the drift of a and the largest drift of a centroid that is among the two
       nearest of some row of the ball.
    5. Bound test with a rounding margin: |x - c|^2 - |x - a|^2 = g (|x - c| + |x - a|). Where that
       is above the error, FAISS would find a again, and the row is not searched.
    """
    if pruning is not None and drift is None:
        pruning.bounds = None
    changed, before = [np.empty(0, np.int64)], [labels[:0]]
    safe = pruning is not None and index.in_safe_range(pruning.balls.largest_distance(index.centre))
    for places, tiles in _searches(rows, labels, index, pruning if safe else None, drift):
        found = index.nearest(taken(rows, places), safe=safe, tiles=tiles)
        new, old = found.astype(labels.dtype), labels.take(places)
        other = np.flatnonzero(new != old)
        changed.append(places.take(other))
        before.append(old.take(other))
        labels[changed[-1]] = new.take(other)
    changes = Changes(np.concatenate(changed), np.concatenate(before))
    if pruning is not None:
        pruning.reassignment_rate = len(changes.places) / max(1, len(rows))
        if not safe:
            pruning.bounds = None
    return changes


def nearest(rows: np.ndarray, index: CentroidIndex, pruning: Pruning | None = None) -> np.ndarray:
    """The nearest centroid of each row float32 [n, T]: int32 [n]."""
    labels = np.zeros(len(rows), np.int32)
    assign(rows, labels, index, pruning)
    return labels


def squared_distances(rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance of each row to the centroid of its label: float64 [n].

    They are summed column by column, so there is no reduction whose order numpy could choose, and
    zero means equal values.
    """
    total = np.zeros(len(rows))
    for column, values in zip(rows.T, centroids.T.astype(np.float64), strict=True):
        difference = column - values[labels]
        total += np.multiply(difference, difference, out=difference)
    return total


def _searches(
    rows: np.ndarray,
    labels: np.ndarray,
    index: CentroidIndex,
    pruning: Pruning | None,
    drift: np.ndarray | None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """What FAISS has to search: places of rows, and the tiles to search for them (None: all)."""
    many = index.num_tiles * TILE > _FEW_CENTROIDS
    if pruning is not None and drift is not None and _with_bounds(pruning, rows, len(drift)):
        assert pruning.bounds is not None
        test = BoundTest(index, pruning.balls, drift)
        places = test.open_rows(rows, labels, pruning.bounds)
        for start in range(0, len(places), BALL_ROWS):
            yield places[start : start + BALL_ROWS], None
    elif pruning is not None and many and tiles_are_independent(index.num_columns):
        starts = range(0, len(rows), BALL_ROWS)
        for start, tiles in zip(starts, pruning.balls.tiles_to_search(index), strict=True):
            few = tiles.sum() <= _MOST_TILES * len(tiles)
            yield np.arange(start, min(start + BALL_ROWS, len(rows))), tiles if few else None
    else:
        for start in range(0, len(rows), CHUNK_ROWS):
            yield np.arange(start, min(start + CHUNK_ROWS, len(rows))), None


def _with_bounds(pruning: Pruning, rows: np.ndarray, num_centroids: int) -> bool:
    """Whether the rows have bounds; they are begun once few rows change their label."""
    if num_centroids > MAX_BOUNDED:
        pruning.bounds = None
    elif pruning.bounds is None and pruning.reassignment_rate <= _MAX_REASSIGNED:
        pruning.bounds = HamerlyBounds(len(rows))
    return pruning.bounds is not None
