"""A FAISS index of centroids that finds the same bits for a row whatever rows are searched with it.

Shapes: n rows, T columns, K centroids.
"""

import functools
import math
from typing import Any

import faiss
import numpy as np

# Most rows that are worked on at once: few enough for the second level of cache.
CHUNK_ROWS = 8_192
# Rows of every matrix product inside FAISS. Another size may change the last bits of its distances.
PRODUCT_ROWS = 1_024
# Centroids of a SIMD tile: FAISS's kernels take so many at a time, or a multiple of them.
TILE = 16
# Rows and centroids within this range are given to FAISS unscaled: their float32 squares are safe.
_SAFE_LOW, _SAFE_HIGH = 2.0**-40, 2.0**40


class CentroidIndex:
    """Finds the nearest of K centroids by FAISS.

    FAISS computes |x|^2 - 2xc + |c|^2 in float32. That cancels where all values share an offset,
    and overflows above 1e19. So rows and centroids are given relative to the median centroid, and
    huge or tiny ones divided by a power of two.

    FAISS chooses one of two methods by the size of a call, and cuts calls into matrix products. The
    method and the size of a product are fixed here and calls are padded to whole products, so that
    a row's nearest centroid depends on nothing but the row and the centroids.

    Attributes:
        order: int64 [K] centroids in the order in which they are stored, neighbours close together.
        centre: float32 [T] the median centroid.
        offsets: float64 [K, T] centroids less the centre, in the order given.
        stored_offsets: float64 [K rounded up to whole tiles, T] the same as stored; the last
            centroid is repeated to fill its tile.
    """

    def __init__(self, centroids: np.ndarray) -> None:
        """Of centroids float32 [K, T]."""
        _fix_method()
        num, self.num_columns = centroids.shape
        wide = centroids.astype(np.float64)
        self.order = _close_together(wide)
        self.centre = np.median(wide, axis=0).astype(np.float32)
        self.offsets = wide - self.centre
        self._numbers = np.concatenate([self.order, np.repeat(self.order[-1:], -num % TILE)])
        self.stored_offsets = self.offsets[self._numbers]
        self._reach = float(np.abs(self.offsets).max())
        # One long subtraction is several times as fast as a short one for every row.
        self._centres = np.tile(self.centre, CHUNK_ROWS)
        # FAISS's indexes of all centroids, by the power of two that they are multiplied by.
        self._indexes: dict[float, Any] = {}
        self._chunk = np.empty((CHUNK_ROWS, self.num_columns), np.float32)
        self._distances = np.empty((CHUNK_ROWS, 1), np.float32)
        self._found = np.empty((CHUNK_ROWS, 1), np.int64)

    @property
    def num_tiles(self) -> int:
        """SIMD tiles that the centroids are stored in."""
        return len(self._numbers) // TILE

    def in_safe_range(self, largest: float) -> bool:
        """Whether rows no farther than `largest` from the centre need no scaling in float32."""
        return self._reach >= _SAFE_LOW and max(largest, self._reach) <= _SAFE_HIGH

    @functools.cached_property
    def distance_to_next(self) -> np.ndarray:
        """How far each centroid is from the nearest other one: float64 [K]."""
        least = np.empty(len(self.offsets))
        at_once = 64
        for first in range(0, len(least), at_once):
            some = slice(first, first + at_once)
            between = ((self.offsets[some, None] - self.offsets) ** 2).sum(axis=2)
            np.fill_diagonal(between[:, some], _SAFE_HIGH**2)
            least[some] = between.min(axis=1)
        return np.sqrt(least)

    def nearest(
        self, rows: np.ndarray, *, safe: bool = False, tiles: np.ndarray | None = None
    ) -> np.ndarray:
        """The nearest centroid of rows float32 [n <= CHUNK_ROWS, T]: int64 [n].

        Args:
            safe: all rows are known to be `in_safe_range`.
            tiles: bool [num_tiles], the tiles to search; None for all.
        """
        scale = self._fill(rows, safe)
        size = -(-len(rows) // PRODUCT_ROWS) * PRODUCT_ROWS
        self._chunk[len(rows) : size] = 0
        distances, found = self._distances[:size], self._found[:size]
        columns = None if tiles is None else _columns(tiles)
        index = self._index(scale) if columns is None else _flat_index(self.stored_offsets[columns])
        index.search(self._chunk[:size], 1, D=distances, I=found)
        numbers = self._numbers if columns is None else self._numbers[columns]
        return np.take(numbers, found[: len(rows), 0])

    def _fill(self, rows: np.ndarray, safe: bool) -> float:
        """Put rows less the centre, times a power of two, into the chunk; returns the power."""
        flat, moved = rows.reshape(-1), self._chunk[: len(rows)].reshape(-1)
        with np.errstate(over="ignore"):
            np.subtract(flat, self._centres[: len(flat)], out=moved)
        if safe:
            return 1.0
        reach = max(float(moved.max()), -float(moved.min()), self._reach)
        if _SAFE_LOW <= reach <= _SAFE_HIGH:
            return 1.0
        wide = rows - self.centre.astype(np.float64)
        scale = math.ldexp(1.0, -math.frexp(max(wide.max(), -wide.min(), self._reach))[1])
        np.multiply(wide, scale, out=self._chunk[: len(rows)], casting="same_kind")
        return scale

    def _index(self, scale: float) -> Any:
        if scale not in self._indexes:
            self._indexes[scale] = _flat_index(self.stored_offsets * scale)
        return self._indexes[scale]


@functools.cache
def tiles_are_independent(num_columns: int) -> bool:
    """Whether FAISS finds the same bits in some tiles as in all of them, on this machine.

    Its matrix products may take another path when they are small. Then no tile may be left out, and
    the search takes longer. Equal centroids are among those that are tried.
    """
    _fix_method()
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(130 * TILE, num_columns)).astype(np.float32)
    vectors[draw.permutation(len(vectors))[:400]] = vectors[:400]
    noise = draw.normal(0, 0.1, (PRODUCT_ROWS, num_columns))
    rows = (vectors[draw.integers(0, len(vectors), PRODUCT_ROWS)] + noise).astype(np.float32)
    distances, found = _flat_index(vectors).search(rows, 1)
    for count in (1, 2, 3, 5, 8, 13, 40, 65, 100):
        tiles = np.zeros(130, bool)
        tiles[draw.permutation(130)[:count]] = True
        columns = _columns(tiles)
        some, number = _flat_index(vectors[columns]).search(rows, 1)
        inside = np.isin(found[:, 0], columns)
        equal = vectors[columns[number[:, 0]]] == vectors[found[:, 0]]
        if (some != distances)[inside].any() or not equal[inside].all():
            return False
    return True


def _fix_method() -> None:
    faiss.omp_set_num_threads(1)
    # From one row on, distances come from matrix products.
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.cvar.distance_compute_blas_query_bs = PRODUCT_ROWS


def _flat_index(vectors: np.ndarray) -> Any:
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors.astype(np.float32))
    return index


def _columns(tiles: np.ndarray) -> np.ndarray:
    """Places of the stored centroids of some tiles, given as bool [num_tiles]."""
    columns: np.ndarray = (np.flatnonzero(tiles)[:, None] * TILE + np.arange(TILE)).reshape(-1)
    return columns


def _close_together(points: np.ndarray) -> np.ndarray:
    """An order of points float64 [K, T] in which neighbours lie close together: int64 [K].

    Points are halved along their first principal axis, again and again. The order depends on the
    points alone: there are no matrix products, whose sums may depend on the number of threads.
    """

    def halved(chosen: np.ndarray) -> list[np.ndarray]:
        if len(chosen) <= TILE:
            return [chosen]
        away = points[chosen] - points[chosen].mean(axis=0)
        away /= np.abs(away).max() or 1.0
        axis = away[:, np.ptp(away, axis=0).argmax()]
        # Three steps of the power method come close enough to the axis.
        for _ in range(3):
            along = np.einsum("kt,t->k", away, np.einsum("k,kt->t", axis, away))
            axis = along / (np.abs(along).max() or 1.0)
        chosen = chosen[np.argsort(axis, kind="stable")]
        half = -(-len(chosen) // (2 * TILE)) * TILE
        return halved(chosen[:half]) + halved(chosen[half:])

    return np.concatenate(halved(np.arange(len(points))))
