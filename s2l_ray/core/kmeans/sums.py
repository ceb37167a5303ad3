"""Sums of k-means in int64 fixed point: exact, so rows can be added and taken away in any order.

Shapes: n rows, T columns, K clusters.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from s2l_ray.core.kmeans.centroid_index import CHUNK_ROWS

# Bits of a piece, see _sum_of_squares.
_PIECE = 44
# Every float32 is a whole number of 2^-149.
_SUBNORMAL = 149


def fixed_point_exponent(num_rows: int, max_abs: float) -> int:
    """The largest e with num_rows * max_abs * 2^e < 2^62, so that sums in units of 2^-e fit int64.

    Differences below max_abs * num_rows * 2^-62 are lost: 4e-9 for a loss of 20 and 10^9 rows.
    """
    if max_abs == 0:
        return 0
    mantissa, exponent = math.frexp(max_abs)
    # num_rows * max_abs = exact * 2^(exponent - 53)
    exact = num_rows * int(math.ldexp(mantissa, 53))
    return 62 - exact.bit_length() - (exponent - 53)


@dataclass(frozen=True)
class PartialSums:
    """Sums over some rows in one round; they are exact, so any order of adding gives the same bits.

    Attributes:
        sums: int64 [K, T] of the members of each cluster, in units of 2^-exponent.
        counts: int64 [K] members.
        squares: sum of all squared values, in units of 2^-2exponent.
        moves: rows whose cluster is not the one they had under the previous centroids; all rows in
            the first round.
    """

    sums: np.ndarray
    counts: np.ndarray
    squares: int
    moves: int

    def __add__(self, other: "PartialSums") -> "PartialSums":
        return PartialSums(
            self.sums + other.sums,
            self.counts + other.counts,
            self.squares + other.squares,
            self.moves + other.moves,
        )

    def objective(self, centroids: np.ndarray, exponent: int) -> float:
        """Sum of squared distances of the rows to their centroids float32 [K, T].

        Rows are as fixed point has them. The sum of |x - c|^2 is sum |x|^2 - 2 c sum x + n |c|^2.
        In whole numbers nothing cancels; the result is rounded once, at the end.
        """
        whole = np.frompyfunc(lambda value: int(math.ldexp(value, _SUBNORMAL)), 1, 1)(
            centroids.astype(float)
        )
        counts = self.counts.astype(object)[:, None]
        linear, square = (whole * self.sums.astype(object)).sum(), (counts * whole * whole).sum()
        two = Fraction(2)
        return float(
            self.squares * two ** (-2 * exponent)
            - linear * two ** (1 - exponent - _SUBNORMAL)
            + square * two ** (-2 * _SUBNORMAL)
        )


class Totals:
    """Sums, counts and squares of the members of K clusters as rows come and go, see PartialSums.

    Each value is rounded to fixed point, half to even, so what was added can be taken away without
    a trace.
    """

    def __init__(self, shape: tuple[int, int], exponent: int) -> None:
        self.exponent, self.squares = exponent, 0
        self.sums = np.zeros(shape, dtype=np.int64)
        self.counts = np.zeros(shape[0], dtype=np.int64)

    def __getitem__(self, clusters: np.ndarray) -> "Totals":
        """Those of some clusters int [any]; squares are of all rows."""
        some = Totals((len(clusters), self.sums.shape[1]), self.exponent)
        some.squares, some.sums, some.counts = (
            self.squares,
            self.sums[clusters],
            self.counts[clusters],
        )
        return some

    def fits(self, shape: tuple[int, ...], exponent: int) -> bool:
        """Whether these are sums of as many clusters and columns, in the same units."""
        return self.sums.shape == shape and self.exponent == exponent

    def now(self, moves: int) -> PartialSums:
        """The sums as they are now, which do not change when rows come and go."""
        return PartialSums(self.sums.copy(), self.counts.copy(), self.squares, moves)

    def add(self, rows: np.ndarray, labels: np.ndarray) -> None:
        """Rows float32 [n, T] that were in no cluster, to those of labels int [n]."""
        for values, wide in self._changed(np.add, rows, labels):
            self.squares += _sum_of_squares(values, wide)

    def move(self, rows: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        """Rows float32 [n, T], from clusters int [n] to others."""
        for change, labels in ((np.subtract, before), (np.add, after)):
            for _ in self._changed(change, rows, labels):
                pass

    def _changed(
        self, change: np.ufunc, rows: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Add or subtract chunk by chunk; yields the values of each in fixed point, by cluster.

        They are [T, chunk] as int64 and as float64. In a column, members of a cluster are
        neighbours in memory, so numpy adds them up without an index.
        """
        shape = rows.shape[1], min(len(rows), CHUNK_ROWS)
        scaled, fixed = np.empty(shape), np.empty(shape, np.int64)
        for start in range(0, len(rows), CHUNK_ROWS):
            own, some = labels[start : start + CHUNK_ROWS], rows[start : start + CHUNK_ROWS]
            first = _runs(own)
            # Some cluster has members in two places.
            if np.bincount(own[first]).max() > 1:
                # By radix where labels have 16 bits.
                order = np.argsort(own, kind="stable")
                own, some = own[order], some.take(order, axis=0)
                first = _runs(own)
            wide, values = scaled[:, : len(own)], fixed[:, : len(own)]
            np.multiply(some.T, math.ldexp(1.0, self.exponent), out=wide, dtype=np.float64)
            np.copyto(values, np.rint(wide, out=wide), casting="unsafe")
            clusters = own[first]
            self.sums[clusters] = change(
                self.sums[clusters], np.add.reduceat(values, first, axis=1).T
            )
            self.counts[clusters] = change(self.counts[clusters], np.diff(first, append=len(own)))
            yield values, wide


def _runs(labels: np.ndarray) -> np.ndarray:
    """Where runs of equal labels [n > 0] begin."""
    return np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]]))


def _sum_of_squares(values: np.ndarray, wide: np.ndarray) -> int:
    """Exact, of int64 [T, n <= CHUNK_ROWS] with |values| < 2^62, which `wide` has as float64.

    Sums of products of two pieces of 44 bits or fewer are made twice: in int64, which keeps them
    modulo 2^64, and in float64, which is wrong by less than n 2^-53 of at most n 2^88, so by less
    than 2^61. Together they determine the sum.
    """
    length = max(int(values.max()), -int(values.min())).bit_length()
    *lower, top = range(0, max(length, 1), _PIECE)
    whole = [values >> shift & ((1 << _PIECE) - 1) for shift in lower] + [
        values >> top if top else values
    ]
    pieces = [
        (shift, piece, piece.astype(np.float64) if lower else wide)
        for shift, piece in zip([*lower, top], whole, strict=True)
    ]
    total = 0
    for (i, a, wide_a), (j, b, wide_b) in itertools.combinations_with_replacement(pieces, 2):
        modulo, about = np.einsum("tn,tn->t", a, b), np.einsum("tn,tn->t", wide_a, wide_b)
        for low, near in zip(modulo.tolist(), map(int, about.tolist()), strict=True):
            exact = near + (low - near + (1 << 63)) % (1 << 64) - (1 << 63)
            total += exact * (1 if i == j else 2) << (i + j)
    return total
