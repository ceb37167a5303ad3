"""Nearest centroids by FAISS, so that a row's label depends on nothing but the row and the centroids.

Shapes: n rows, T columns, K centroids, M balls around rows.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

BLOCK = 8_192  # most rows of a part that are worked on at once: few enough for the second level of cache
PRODUCT = 1_024  # rows of every matrix product inside FAISS; another size may change the last bits of its distances
STRIDE = 2_048  # rows of a ball
BALLS = 64  # balls, or centroids, whose distances to all centroids are held at once
LANES = 16  # centroids that a kernel of FAISS takes at a time, or a multiple of them
_SMALL, _LARGE = 2.0**-40, 2.0**40  # where rows and centroids are shown to FAISS as they are
_TINY = 1e-18  # more than the root of what float32 loses below its range in squares
FEW = 128  # centroids up to which all are searched
MOST_LED = 512  # centroids up to which Leads cost less than what they save
_SMALL_PRODUCT = (
    10**6
)  # multiplications; for matrix products of more, OpenBLAS takes twice as long for each


@dataclass(frozen=True)
class Balls:
    """One ball around every STRIDE rows of a part: centres float64 [M, T] and radii float64 [M], a little too large."""

    centres: np.ndarray
    radii: np.ndarray

    @classmethod
    def around(cls, rows: np.ndarray) -> "Balls":
        """Of rows float32 [n, T], in their order. Any centre will do, so its last bits do not matter."""
        starts = range(0, len(rows), STRIDE)
        centres, radii = np.empty((len(starts), rows.shape[1])), np.empty(len(starts))
        slack, ones = 1 + (rows.shape[1] + 8) * 2.0**-23, np.ones(rows.shape[1], np.float32)
        for number, start in enumerate(starts):
            some = rows[start : start + STRIDE]
            with np.errstate(over="ignore", invalid="ignore"):
                sample = some[::8]
                centre = np.full(len(sample), 1 / len(sample), np.float32) @ sample
                away = (some.reshape(-1) - np.tile(centre, len(some))).reshape(some.shape)
                largest = float((np.square(away, out=away) @ ones).max())
            centres[number] = centre
            radii[number] = math.sqrt(largest) * slack + _TINY if largest < np.inf else np.inf
        return cls(centres, radii)


class Leads:
    """By how much each row's centroid leads at least, so that rounds in which centroids go a shorter way can leave the row out.

    A lead is the distance to the nearest other centroid less that to the own one (Hamerly 2010). In a round it shrinks by no more
    than the way of the own centroid and the longest way of any that is now among the two nearest of some row of the ball: one of
    these is the nearest other one, and has come nearer by no more than its way. Kept is minus the lead, float32 [n].
    """

    def __init__(self, num_rows: int) -> None:
        self.values = np.full(num_rows, np.inf, np.float32)

    def shrink(
        self, labels: np.ndarray, ways: np.ndarray, longest: np.ndarray, limits: np.ndarray
    ) -> np.ndarray:
        """By the ways float32 [K] of centroids and the longest ones [M] by ball; places of rows that may have another centroid then.

        Those are the rows whose lead is not above what `limits` float32 [K] ask for, as values.
        """
        index = labels.astype(np.intp)  # once, and not in every take
        self.values += ways.take(index)
        self.values += np.repeat(longest, STRIDE)[: len(labels)]
        return np.flatnonzero(self.values >= limits.take(index))


class Nearest:
    """Finds the nearest of some centroids, float32 [K, T].

    FAISS computes |x|^2 - 2xc + |c|^2 in float32, which cancels where all values share an offset and leaves the range
    above 1e19 and below 1e-19. So it is shown rows and centroids relative to the median centroid, and huge or tiny ones
    divided by a power of two.

    It does so by one of two methods, depending on the size of the call, and by matrix products of so many rows.
    Both are fixed here and calls are padded to whole products, so that a row gets the same bits in any company.

    Where balls around the rows are known, FAISS is only shown the centroids that can be the nearest of some row of a ball.
    Its kernels go through 16 centroids at a time, and which of two equal ones they find depends on the places in the 16. So
    whole sixteens are left out, of centroids sorted to lie close together. What is left is found as among all: see `_holds`.

    With few centroids and rows whose leads are known, FAISS only sees the rows that may have changed their centroid.
    """

    def __init__(self, centroids: np.ndarray, ways: np.ndarray | None = None) -> None:
        """With `ways`, float64 [K], for leads: how far each centroid has moved since they were found or shrunk."""
        _fix_method()
        num, self._steps = centroids.shape
        self._error = (self._steps + 8) * 2.0**-23  # see _needed
        wide = centroids.astype(np.float64)
        self.order = _close_together(wide)
        # one long subtraction is several times as fast as a short one for every row
        self._centre = np.median(wide, axis=0).astype(np.float32)
        self._centres = np.tile(self._centre, BLOCK)
        # filled up with the last one, which is then found, if at all, under one of several numbers
        self._numbers = np.concatenate([self.order, np.repeat(self.order[-1:], -num % LANES)])
        self._offsets = (wide - self._centre)[self._numbers]
        self._reach = float(np.abs(self._offsets).max())
        self._indexes: dict[float, Any] = {}  # of all centroids, by the power of two
        self._block = np.empty((BLOCK, self._steps), np.float32)
        self._found = np.empty((BLOCK, 1), np.float32), np.empty((BLOCK, 1), np.int64)
        self._ways = np.zeros(num) if ways is None else ways

    def labels(self, rows: np.ndarray, balls: Balls | None = None) -> np.ndarray:
        """Nearest centroid of each row of one part: int32 [n], from float32 [n, T]; the same with and without its balls."""
        labels = np.zeros(len(rows), dtype=np.int32)
        self.renew(rows, labels, balls)
        return labels

    def renew(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        balls: Balls | None = None,
        leads: Leads | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write the nearest centroid of each row float32 [n, T] of one block over its label int [n].

        Balls are those of the rows. Leads are renewed; they belong to the labels, need balls and at most MOST_LED centroids.

        Returns the places of rows whose label has changed, int64 [m], and the labels that they had.
        """
        tame = balls is not None and self._tame(balls)
        if balls is not None and leads is not None and tame:
            proof = _Proof(self, balls)
            places = proof.doubtful(rows, labels, leads)
            blocks: Iterable[tuple[np.ndarray, np.ndarray | None]] = (
                (places[start : start + STRIDE], None) for start in range(0, len(places), STRIDE)
            )
        else:
            stride = STRIDE if tame and len(self._numbers) > FEW else BLOCK
            starts = range(0, len(rows), stride)
            columns: Iterable[np.ndarray | None] = itertools.repeat(None, len(starts))
            if balls is not None and tame and len(self._numbers) > FEW and _holds(self._steps):
                columns = (_columns(some) for some in self._needed(balls))
            blocks = (
                (np.arange(start, min(start + stride, len(rows))), some)
                for start, some in zip(starts, columns, strict=True)
            )
        changed, before = [np.empty(0, np.int64)], [labels[:0]]
        for some, own in blocks:
            other, old = self._assign(rows, labels, some, own, tame)
            changed.append(other)
            before.append(old)
        if leads is not None and not tame:
            leads.values[:] = np.inf
        return np.concatenate(changed), np.concatenate(before)

    def _assign(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        places: np.ndarray,
        columns: np.ndarray | None,
        tame: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ask FAISS for the rows at these places; see `renew`."""
        unit = self._fill(_taken(rows, places), tame)
        found = self._search(len(places), unit, columns)
        numbers = (self._numbers if columns is None else self._numbers[columns]).astype(
            labels.dtype
        )
        new, old = numbers.take(found), labels.take(places)
        other = np.flatnonzero(new != old)
        changed = places.take(other)
        labels[changed] = new.take(other)
        return changed, old.take(other)

    def _search(self, num_rows: int, unit: float, columns: np.ndarray | None) -> np.ndarray:
        """What is nearest of the columns, or of all, to the rows in the block: int64 [n]."""
        size = -(-num_rows // PRODUCT) * PRODUCT
        self._block[num_rows:size] = 0
        distances, found = (array[:size] for array in self._found)
        index = self._index(unit) if columns is None else _flat_index(self._offsets[columns])
        index.search(self._block[:size], 1, D=distances, I=found)
        return found[:num_rows, 0]

    def _fill(self, rows: np.ndarray, tame: bool) -> float:
        """Put rows less the centre, times a power of two, at the begin of the block; the power is returned."""
        flat, moved = rows.reshape(-1), self._block[: len(rows)].reshape(-1)
        with np.errstate(over="ignore"):
            np.subtract(flat, self._centres[: len(flat)], out=moved)
        if tame:
            return 1.0
        reach = max(float(moved.max()), -float(moved.min()), self._reach)
        if _SMALL <= reach <= _LARGE:
            return 1.0
        wide = rows - self._centre.astype(np.float64)
        unit = math.ldexp(1.0, -math.frexp(max(wide.max(), -wide.min(), self._reach))[1])
        np.multiply(wide, unit, out=self._block[: len(rows)], casting="same_kind")
        return unit

    def _tame(self, balls: Balls) -> bool:
        """Whether no row in the balls can make `_fill` multiply."""
        return self._reach >= _SMALL and max(self._largest(balls), self._reach) <= _LARGE

    def _largest(self, balls: Balls) -> float:
        """No row in the balls is farther from the centre."""
        return float(
            (np.linalg.norm(balls.centres - self._centre, axis=1) + balls.radii).max(initial=0)
        )

    @functools.cached_property
    def _given(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets of the centroids as they were given [K, T], and how far each is from the next one [K]."""
        offsets = np.empty((len(self.order), self._steps))
        offsets[self.order] = self._offsets[: len(offsets)]
        least = np.empty(len(offsets))
        for first in range(0, len(offsets), BALLS):
            some = slice(first, first + BALLS)
            between = ((offsets[some, None] - offsets) ** 2).sum(axis=2)
            np.fill_diagonal(between[:, some], _LARGE**2)
            least[some] = between.min(axis=1)
        return offsets, np.sqrt(least)

    def _index(self, unit: float) -> Any:
        if unit not in self._indexes:
            self._indexes[unit] = _flat_index(self._offsets * unit)
        return self._indexes[unit]

    def _needed(self, balls: Balls) -> Iterator[np.ndarray]:
        """Of each ball, which sixteens of centroids have one that can be the nearest of a row in it: bool [K / 16].

        a is the centroid nearest to the middle m of a ball of radius r. For all x in it, |x-c|^2 - |x-a|^2 is at least
        |m-c|^2 - |m-a|^2 - 2 r |c-a|. If half of that is more than what FAISS may be wrong about one distance, it finds
        c farther than a. Its error is below (T + 8) 2^-24 (|x| + |c|)^2; twice as much is allowed for.
        """
        sizes = np.linalg.norm(self._offsets, axis=1)
        for first in range(0, len(balls.radii), BALLS):
            middles = balls.centres[first : first + BALLS] - self._centre
            radii = balls.radii[first : first + BALLS]
            (nearest,), (farther,) = _farther(middles, radii, self._offsets, 1)
            largest = np.linalg.norm(middles, axis=1)[:, None] + radii[:, None]
            error = self._error * (largest + np.maximum(sizes, sizes[nearest][:, None])) ** 2
            yield from (farther <= error + 2.0**-140).reshape(len(nearest), -1, LANES).any(axis=2)


class _Proof:
    """Tells, by matrix products of its own, of which rows FAISS is sure to find the centroid that they had, and their leads.

    |x-c|^2 less |x|^2 is -2cx + |c|^2. If that is less for one centroid than for all others, by more than FAISS and this product
    together may be wrong, there is nothing left to find out. In every ball, only those are looked at that can be among its rows' two
    nearest: a row with another one has to move.
    """

    def __init__(self, search: Nearest, balls: Balls) -> None:
        """For rows in the balls."""
        offsets, apart = search._given
        sizes, largest = np.linalg.norm(offsets, axis=1), search._largest(balls)
        # FAISS may be wrong by (T + 8) 2^-24 (|x| + |c|)^2 (see Nearest._needed), this product with |x|^2 by no more
        error = 1.01 * search._error * (largest + sizes) ** 2 + _TINY**2
        self._centre, self._gap = search._centre, (2 * error).astype(np.float32)
        self._factors = np.concatenate([-2 * offsets, (sizes**2 - error)[:, None]], axis=1).astype(
            np.float32
        )
        self._rows = np.ones((offsets.shape[1] + 1, BLOCK), np.float32)
        self._two = np.empty((2, BLOCK), np.float32)
        self._found = np.empty((len(offsets) + 1) * STRIDE, np.float32)
        self._near = _two_nearest(balls.centres - search._centre, balls.radii, offsets, error)
        self._limits = _limits(apart, sizes, largest, search._error)
        # leads are at most as long as the way to the farthest centroid; two sums of 24 bits round less than this
        ways = search._ways * (1 + 2.0**-20) + (largest + sizes.max()) * 2.0**-21
        self._ways = ways.astype(np.float32)
        self._longest = np.where(self._near, self._ways, 0).max(axis=1)
        # by ball, the line of each centroid in `_compare`; those that are not near share a last one, of infinity
        last = self._near.sum(axis=1)[:, None]
        self._lines = np.where(self._near, np.cumsum(self._near, axis=1) - 1, last)

    def doubtful(self, rows: np.ndarray, labels: np.ndarray, leads: Leads) -> np.ndarray:
        """Places of rows [n, T] that are not proved to keep their label [n]; new leads of the others that were open."""
        places = leads.shrink(labels, self._ways, self._longest, self._limits)
        doubtful = [np.empty(0, np.int64)]
        for start in range(0, len(places), BLOCK):
            mine = places[start : start + BLOCK]
            values = self._of(_taken(rows, mine), labels.take(mine), mine // STRIDE)
            leads.values[mine] = values
            doubtful.append(mine[np.isinf(values)])
        return np.concatenate(doubtful)

    def _of(self, rows: np.ndarray, own: np.ndarray, balls: np.ndarray) -> np.ndarray:
        """Values of leads of rows [n <= BLOCK, T] with labels `own`, in these balls; infinite where the centroid may be another."""
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
        """Put |x-c|^2 less |x|^2 for the own centroid of each row, and the least for another, in `two`; from columns of `_rows`."""
        factors, lines = self._factors[self._near[ball]], self._lines[ball]
        size = max(256, _SMALL_PRODUCT // factors.size)
        for start in range(0, len(own), size):
            some = own[start : start + size]
            num, tile = len(some), slice(start, start + size)
            flat = self._found[: (len(factors) + 1) * num]
            found = flat.reshape(-1, num)
            np.matmul(factors, moved[:, tile], out=found[:-1])
            found[-1] = np.inf
            at = lines.take(some) * num + np.arange(num)
            two[0, tile] = flat.take(at)
            flat[at] = np.inf
            two[1, tile] = found[:-1].min(axis=0)


def _farther(
    middles: np.ndarray, radii: np.ndarray, offsets: np.ndarray, num_nearest: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The nearest centroids to the middle of each ball, int64 [num_nearest, M], and of each of them, how far the others are beyond it.

    That is half of what |x-c|^2 is above |x-a|^2 at the least, for all x in the ball: float64 [M, K], see Nearest._needed.
    """
    sizes = (offsets**2).sum(axis=1)
    squared = (middles**2).sum(axis=1)[:, None] - 2 * middles @ offsets.T + sizes
    lines, rest = np.arange(len(squared)), squared.copy()
    nearest, farther = np.empty((num_nearest, len(squared)), np.int64), []
    for own in nearest:
        own[:] = rest.argmin(axis=1)
        rest[lines, own] = np.inf
        apart = sizes + sizes[own][:, None] - 2 * offsets[own] @ offsets.T
        apart = np.sqrt(np.maximum(apart, 0, out=apart), out=apart)
        farther.append((squared - squared[lines, own][:, None]) / 2 - radii[:, None] * apart)
    return nearest, farther


def _two_nearest(
    middles: np.ndarray, radii: np.ndarray, offsets: np.ndarray, error: np.ndarray
) -> np.ndarray:
    """Which centroids can be among the two nearest of a row in a ball: bool [M, K].

    Not one that is farther from all rows than both that are nearest to the middle, by more than its error [K].
    """
    _, farther = _farther(middles, radii, offsets, min(2, len(offsets)))
    near: np.ndarray = np.minimum.reduce(farther) <= error
    return near


def _limits(apart: np.ndarray, sizes: np.ndarray, largest: float, error: float) -> np.ndarray:
    """Below which value of its lead a row keeps its centroid: float32 [K].

    A row x is nearer to its centroid a than to another one, c, by a lead g, and |x-c|^2 - |x-a|^2 = g D where D is the sum of
    both distances. FAISS finds c farther if g D is more than it may be wrong about both (see Nearest._needed), which is, as x and
    c are in reach of a by D, at most 8 e (|a| + D)^2 with e = (T + 8) 2^-23. So g > 8 e (|a|^2 / D + 2|a| + D) will do. D is at
    least |a-c|; and where it is more than four times the distance to a, g is half of D or more, so that D counts only up to
    4 (|x| + |a|), or is far below |a|.
    """
    near = np.divide(sizes**2, apart, out=np.full_like(apart, np.inf), where=apart > 0)
    slack = 8 * error * (near + 8 * sizes + 4 * largest)
    rounding = (largest + sizes) * 2.0**-19
    return (-slack - rounding - _TINY).astype(np.float32)


def _taken(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows at ascending places, without a copy where they are neighbours."""
    first, last = places[0], places[-1]
    return rows[first : last + 1] if last - first + 1 == len(places) else rows.take(places, axis=0)


def _fix_method() -> None:
    faiss.omp_set_num_threads(1)
    faiss.cvar.distance_compute_blas_threshold = 1  # always products
    faiss.cvar.distance_compute_blas_query_bs = PRODUCT


def _flat_index(vectors: np.ndarray) -> Any:
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors.astype(np.float32))
    return index


def _columns(sixteens: np.ndarray) -> np.ndarray | None:
    """Places of the centroids in these sixteens (bool); None where there is little to leave out."""
    chosen = np.flatnonzero(sixteens)
    return (
        None
        if len(chosen) > 0.8 * len(sixteens)
        else (chosen[:, None] * LANES + np.arange(LANES)).reshape(-1)
    )


def _close_together(points: np.ndarray) -> np.ndarray:
    """An order of points float64 [K, T] in which neighbours lie close together: halved where they are longest, again and again.

    It depends on the points alone, and not on the number of threads, as sums of a matrix product might.
    """

    def halved(chosen: np.ndarray) -> list[np.ndarray]:
        if len(chosen) <= LANES:
            return [chosen]
        away = points[chosen] - points[chosen].mean(axis=0)
        away /= np.abs(away).max() or 1.0
        axis = away[:, np.ptp(away, axis=0).argmax()]
        for _ in range(3):  # towards the first principal axis
            along = np.einsum("kt,t->k", away, np.einsum("k,kt->t", axis, away))
            axis = along / (np.abs(along).max() or 1.0)
        chosen = chosen[np.argsort(axis, kind="stable")]
        half = -(-len(chosen) // (2 * LANES)) * LANES
        return halved(chosen[:half]) + halved(chosen[half:])

    return np.concatenate(halved(np.arange(len(points))))


@functools.cache
def _holds(steps: int) -> bool:
    """Whether FAISS, on this machine, finds among some sixteens of centroids the same bits as among all, equal ones included.

    Its matrix products may take another way when they are small. Then nothing is left out, and it takes longer.
    """
    _fix_method()
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(130 * LANES, steps)).astype(np.float32)
    vectors[draw.permutation(len(vectors))[:400]] = vectors[:400]
    rows = (
        vectors[draw.integers(0, len(vectors), PRODUCT)] + draw.normal(0, 0.1, (PRODUCT, steps))
    ).astype(np.float32)
    distances, found = _flat_index(vectors).search(rows, 1)
    for count in (1, 2, 3, 5, 8, 13, 40, 65, 100):
        chosen = np.sort(draw.permutation(130)[:count])
        columns = (chosen[:, None] * LANES + np.arange(LANES)).reshape(-1)
        some, number = _flat_index(vectors[columns]).search(rows, 1)
        inside = np.isin(found[:, 0], columns)
        equal = vectors[columns[number[:, 0]]] == vectors[found[:, 0]]
        if (some != distances)[inside].any() or not equal[inside].all():
            return False
    return True
