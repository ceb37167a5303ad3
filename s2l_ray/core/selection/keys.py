"""The keys of rows, sorted by chunk, and the queries that are put to all chunks.

Of each group the rows with the smallest keys are chosen. The key of a row is (score, hash), where
the hash is the keyed hash of its id, so that no two rows of a group tie. Rows are sorted where they
are read, a chunk of parts at a time. Queries exchange samples of keys and counts of keys, never
all.

Shapes: n rows of a chunk, G groups, P points, M intervals.
"""

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from s2l_ray.core.hashing import SEARCH, keyed_hash
from s2l_ray.core.query import Query

# As score and as hash: no key lies below LOWEST, and all lie below HIGHEST, which is no score's
# bits.
LOWEST = np.uint64(0)
HIGHEST = np.uint64(2**64 - 1)


def ordered_bits(scores: np.ndarray) -> np.ndarray:
    """float64 [n] as uint64 [n] in the same order, infinities included; there must be no NaN."""
    # Adding 0.0 makes -0.0 equal to 0.0.
    bits = (np.asarray(scores, np.float64) + 0.0).view(np.uint64)
    sign = np.uint64(2**63)
    return np.where(bits & sign, ~bits, bits | sign)


class Points(NamedTuple):
    """Keys with the group, or the interval, that each belongs to.

    groups is int64 [P]; scores (see `ordered_bits`) and hashes are uint64 [P].
    """

    groups: np.ndarray
    scores: np.ndarray
    hashes: np.ndarray

    def sorted(self) -> "Points":
        """By group, then by key; each point once."""
        order = np.lexsort((self.hashes, self.scores, self.groups))
        ordered = self.at(order)
        repeated = np.zeros(len(order), bool)
        repeated[1:] = np.logical_and.reduce([column[1:] == column[:-1] for column in ordered])
        return ordered.at(~repeated)

    def at(self, which: np.ndarray) -> "Points":
        """Some of the points, by number or by a mask."""
        return Points(*(column[which] for column in self))

    @staticmethod
    def joined(several: Iterable["Points"]) -> "Points":
        """All of them, in the order given."""
        none = Points(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.uint64))
        return Points(*(np.concatenate(columns) for columns in zip(none, *several, strict=True)))

    @staticmethod
    def same(groups: np.ndarray, value: np.uint64) -> "Points":
        """One point a group, with the same value as score and as hash: LOWEST or HIGHEST."""
        return Points(groups, np.full(len(groups), value), np.full(len(groups), value))


@dataclass(frozen=True)
class Keys:
    """The rows of one chunk of parts, sorted by group and key.

    Attributes:
        starts: where each group begins, and where the last one ends, int64 [G + 1].
        scores: uint64 [n], or [1] where all rows have the same score.
        hashes: uint64 [n].
        parts: number, within the chunk, of the part that a row is from: any integers [n].
    """

    starts: np.ndarray
    scores: np.ndarray
    hashes: np.ndarray
    parts: np.ndarray

    @classmethod
    def of(cls, points: Points, parts: np.ndarray, num_groups: int) -> "Keys":
        """Sort the rows of a chunk; rows of group -1 cannot be chosen and are left out."""
        eligible = np.flatnonzero(points.groups >= 0)
        points = points.at(eligible)
        order = np.lexsort((points.hashes, points.scores, points.groups))
        starts = np.searchsorted(points.groups[order], np.arange(num_groups + 1))
        alike = (points.scores == points.scores[:1]).all()
        scores = points.scores[:1] if alike else points.scores[order]
        return cls(starts, scores, points.hashes[order], parts[eligible][order])

    def positions(self, points: Points) -> np.ndarray:
        """How many rows stand before each point, int64 [P], by bisection of all groups at once."""
        low, high = self.starts[points.groups], self.starts[points.groups + 1]
        while (unfinished := low < high).any():
            middle = np.minimum((low + high) // 2, len(self.hashes) - 1)
            score, hash_ = self.at(middle)
            below = (score < points.scores) | ((score == points.scores) & (hash_ < points.hashes))
            low, high = (
                np.where(unfinished & below, middle + 1, low),
                np.where(unfinished & ~below, middle, high),
            )
        return low

    def at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and hashes of some rows, by number."""
        # Clipping finds the only score where all rows have the same.
        return self.scores.take(rows, mode="clip"), self.hashes[rows]

    def rows_between(self, low: Points, high: Points) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the rows with low <= key < high, and of the interval [M] of each."""
        starts, ends = self.positions(low), self.positions(high)
        lengths = np.maximum(ends - starts, 0)
        intervals = np.repeat(np.arange(len(lengths)), lengths)
        before = np.cumsum(lengths) - lengths
        return np.arange(len(intervals)) + (starts - before)[intervals], intervals


@dataclass(frozen=True)
class GroupSizes(Query[Keys, np.ndarray]):
    """Asks for the number of rows of each group, int64 [G]."""

    def of(self, shard: Keys) -> np.ndarray:
        return np.diff(shard.starts)

    def merge(self, answers: Iterable[np.ndarray]) -> np.ndarray:
        return functools.reduce(operator.add, answers)


@dataclass(frozen=True)
class Ranks(Query[Keys, np.ndarray]):
    """Asks how many keys of its group lie below each point, int64 [P]."""

    points: Points

    def of(self, shard: Keys) -> np.ndarray:
        return shard.positions(self.points) - shard.starts[self.points.groups]

    def merge(self, answers: Iterable[np.ndarray]) -> np.ndarray:
        return functools.reduce(operator.add, answers)


@dataclass(frozen=True)
class KeysBetween(Query[Keys, Points]):
    """Asks for the keys with low <= key < high, or for a sample of them, in no particular order.

    In the answer the number of the interval stands in place of the group.

    Attributes:
        low, high: bounds of the intervals, both [M], with the group of each.
        share: how many of the keys, from 0 to 1. The sample is drawn by a second hash of the row,
            so that it is the same for any cut into chunks.
        seed: of that hash.
    """

    low: Points
    high: Points
    share: float = 1.0
    seed: int = 0

    def of(self, shard: Keys) -> Points:
        rows, intervals = shard.rows_between(self.low, self.high)
        if self.share < 1:
            hashes = keyed_hash(SEARCH, self.seed, shard.hashes[rows].view(np.int64))
            drawn = hashes < np.uint64(self.share * 2.0**64)
            rows, intervals = rows[drawn], intervals[drawn]
        return Points(intervals, *shard.at(rows))

    def merge(self, answers: Iterable[Points]) -> Points:
        return Points.joined(answers)
