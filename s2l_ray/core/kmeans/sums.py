"""Sums of k-means in int64 fixed point: exact, so that rows can be added and taken away in any order.

Shapes: n rows, T columns, K clusters.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from s2l_ray.core.kmeans.bounds import BLOCK

_PIECE = 44  # bits; see _sum_of_squares
_SUBNORMAL = 149  # every float32 is a whole number of 2^-149


def fixed_point_exponent(num_rows: int, max_abs: float) -> int:
    """The largest e with num_rows * max_abs * 2^e < 2^62, so that sums in units of 2^-e fit int64.

    Differences below max_abs * num_rows * 2^-62 are lost (4e-9 for a loss of 20 and 10^9 rows). (design
    section 3)
    """
    if max_abs == 0:
        return 0
    mantissa, exponent = math.frexp(max_abs)
    exact = num_rows * int(
        math.ldexp(mantissa, 53)
    )  # num_rows * max_abs = exact * 2^(exponent - 53)
    return 62 - exact.bit_length() - (exponent - 53)


@dataclass(frozen=True)
class Partial:
    """One round's sums over some rows; addable, and exact, so that the order of adding does not matter.

    sums int64 [K, T] in units of 2^-exponent, counts int64 [K], squares (sum of all squared values in units of
    2^-2exponent), and moves, the rows whose cluster is not the one they had under the previous centroids (all rows
    in the first round).
    """

    sums: np.ndarray
    counts: np.ndarray
    squares: int
    moves: int

    def __add__(self, other: "Partial") -> "Partial":
        return Partial(
            self.sums + other.sums,
            self.counts + other.counts,
            self.squares + other.squares,
            self.moves + other.moves,
        )

    def objective(self, centroids: np.ndarray, exponent: int) -> float:
        """Sum of squared distances of the rows, as fixed point has them, to their centroids float32 [K, T].

        |x - c|^2 summed is sum |x|^2 - 2 c sum x + n |c|^2. In whole numbers nothing cancels; one rounding at the end.
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
    """Members of K clusters added up: sums int64 [K, T] in units of 2^-exponent, counts int64 [K], and squares, see Partial.

    Each value is rounded to fixed point, half to even, so what was added can be taken away without a trace.
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
        """Add or subtract block by block, and give the values of each in fixed point: [T, block] as int64 and as float64, in order of clusters.

        Step by step, members of a cluster are neighbours in memory, and numpy adds them up without an index.
        """
        shape = rows.shape[1], min(len(rows), BLOCK)
        scaled, fixed = np.empty(shape), np.empty(shape, np.int64)
        for start in range(0, len(rows), BLOCK):
            own, some = labels[start : start + BLOCK], rows[start : start + BLOCK]
            first = _runs(own)
            if np.bincount(own[first]).max() > 1:  # some cluster has members in two places
                order = np.argsort(own, kind="stable")  # by radix where labels have 16 bits
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
    """Exact, of int64 [T, n <= BLOCK] with |values| < 2^62, which `wide` has as float64.

    Sums of products of two pieces of 44 bits or fewer are made twice: in int64, which keeps them modulo 2^64, and in float64,
    which is wrong by less than n 2^-53 of at most n 2^88, so by less than 2^61. Together they tell the sum.
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
