"""Which rows a rule takes of each group: as many as its quota, from the smallest key on.

A draw is two keys a group. They are found by queries to all chunks, so the choice is the same for
any cut of the rows into chunks and any order of them, and the subset is a filter over parts.

Shapes: n rows, G groups, P points, M targets (a target is a rank in a group, whose key is wanted).
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import numpy as np

from s2l_ray.core.query import Query
from s2l_ray.core.selection.keys import HIGHEST, LOWEST, Keys, KeysBetween, Points, Ranks

# Keys that one round of the search looks at, in all: 1.6 MB.
SAMPLE = 2**16
# Keys that are sorted in one place at the end of the search, in all: 3 MB.
GATHERED = 2**17

Answer = TypeVar("Answer")


class Ask(Protocol):
    """Puts a query to the keys of all chunks, and merges what they answer."""

    def __call__(self, query: Query[Keys, Answer], /) -> Answer: ...


@dataclass(frozen=True)
class Draw:
    """What is chosen of each group: the rows with lower <= key < upper, both [G]."""

    lower: Points
    upper: Points

    def chosen(self, points: Points) -> np.ndarray:
        """Which rows are chosen, bool [n]; those of group -1 are not."""
        # Group -1 reads the entry that is appended at the end: LOWEST twice, between which nothing
        # is.
        score, hash_ = points.scores, points.hashes
        low_score, low_hash, high_score, high_hash = (
            np.append(column, LOWEST)[points.groups]
            for column in (*self.lower[1:], *self.upper[1:])
        )
        above = (score > low_score) | ((score == low_score) & (hash_ >= low_hash))
        below = (score < high_score) | ((score == high_score) & (hash_ < high_hash))
        mask: np.ndarray = above & below
        return mask

    def rows_of_parts(self, keys: Keys, num_parts: int) -> np.ndarray:
        """How many rows of each part of a chunk are chosen, int64 [num_parts]."""
        rows, _ = keys.rows_between(self.lower, self.upper)
        return np.bincount(keys.parts[rows], minlength=num_parts)


def draw(
    ask: Ask,
    sizes: np.ndarray,
    quotas: np.ndarray,
    take: Literal["smallest", "middle"] = "smallest",
    *,
    sample: int = SAMPLE,
    gathered: int = GATHERED,
) -> Draw:
    """Find the first key that is chosen of each group, and the first one after those chosen.

    Args:
        sizes, quotas: rows of each group, and how many of them to choose, int64 [G].
        take: the rows with the smallest keys, or those in the middle, which leaves out the
            (size - quota) // 2 smallest.
        sample, gathered: see SAMPLE and GATHERED.

    Raises:
        ValueError: a quota is negative or larger than its group, or keys repeat.
    """
    if (quotas > sizes).any() or (quotas < 0).any():
        raise ValueError(f"quotas {quotas.tolist()} do not fit groups of {sizes.tolist()} rows")
    groups = np.arange(len(sizes))
    first = (sizes - quotas) // 2 if take == "middle" else np.zeros_like(sizes)
    ends = [first, first + quotas]
    # Rank 0 is LOWEST, and the rank that equals the size is HIGHEST: only others are looked for.
    inner = [np.flatnonzero((quotas > 0) & (rank > 0) & (rank < sizes)) for rank in ends]
    found = keys_at(
        ask,
        np.concatenate(inner),
        np.concatenate([rank[own] for rank, own in zip(ends, inner, strict=True)]),
        sizes,
        sample=sample,
        gathered=gathered,
    )
    bounds = []
    for rank, own, offset in zip(ends, inner, (0, len(inner[0])), strict=True):
        bound = Points.same(groups, LOWEST)
        above = (quotas > 0) & (rank == sizes)
        for column, values in zip(bound[1:], found[1:], strict=True):
            column[above] = HIGHEST
            column[own] = values[offset : offset + len(own)]
        bounds.append(bound)
    return Draw(*bounds)


def keys_at(
    ask: Ask,
    groups: np.ndarray,
    ranks: np.ndarray,
    sizes: np.ndarray,
    *,
    sample: int,
    gathered: int,
) -> Points:
    """The keys that have given ranks in their groups.

    An interval of keys around each target is narrowed, round by round: keys are sampled from all
    intervals, the keys below each of the sample are counted, and the two of the sample that
    enclose a target become its interval. When few keys are left, they are sorted here.

    Args:
        groups, ranks: of each target, int64 [M]; rank 0 is the smallest key of a group.
        sizes: rows of all groups, int64 [G].
        sample, gathered: see SAMPLE and GATHERED.

    Raises:
        ValueError: the chunks do not hold as many distinct keys as `sizes` says.
    """
    around = _Intervals(
        groups,
        ranks,
        low=Points.same(groups, LOWEST),
        high=Points.same(groups, HIGHEST),
        low_rank=np.zeros(len(groups), np.int64),
        high_rank=sizes[groups],
    )
    # An interval never has less than one key, so a few keys a target are always allowed.
    sample, gathered = max(sample, 4 * len(groups)), max(gathered, 4 * len(groups))
    for round_ in itertools.count():
        left = int((around.high_rank - around.low_rank).sum())
        if left <= gathered:
            break
        drawn = ask(KeysBetween(around.low, around.high, sample / left, round_))
        points = drawn._replace(groups=groups[drawn.groups]).sorted()
        around = around.narrowed(points, ask(Ranks(points)))
    found = ask(KeysBetween(around.low, around.high)).sorted()
    starts = np.searchsorted(found.groups, np.arange(len(groups) + 1))
    if (np.diff(starts) != around.high_rank - around.low_rank).any():
        raise ValueError("keys are missing, or occur twice: example ids must be distinct")
    return found.at(starts[:-1] + ranks - around.low_rank)


@dataclass(frozen=True)
class _Intervals:
    """What is known of each target's key, all [M]: low <= key < high.

    groups and ranks are those of the targets; low_rank and high_rank are the ranks of low and high.
    """

    groups: np.ndarray
    ranks: np.ndarray
    low: Points
    high: Points
    low_rank: np.ndarray
    high_rank: np.ndarray

    def narrowed(self, points: Points, ranks: np.ndarray) -> "_Intervals":
        """Each interval cut down to the nearest points on both sides of its target.

        Args:
            points: sorted points [P].
            ranks: how many keys of its group lie below each point, int64 [P].
        """
        if not len(ranks):
            return self
        # group * many + rank is one ascending number for a group and a rank.
        many = int(max(ranks.max(), self.ranks.max())) + 1
        wanted = self.groups * many + self.ranks
        place = np.searchsorted(points.groups * many + ranks, wanted, side="right")
        before, after = np.maximum(place - 1, 0), np.minimum(place, len(ranks) - 1)
        raised = (
            (points.groups[before] == self.groups) & (place > 0) & (ranks[before] > self.low_rank)
        )
        lowered = (
            (points.groups[after] == self.groups)
            & (place < len(ranks))
            & (ranks[after] < self.high_rank)
        )
        return replace(
            self,
            low=Points(
                *(np.where(raised, n[before], o) for o, n in zip(self.low, points, strict=True))
            ),
            high=Points(
                *(np.where(lowered, n[after], o) for o, n in zip(self.high, points, strict=True))
            ),
            low_rank=np.where(raised, ranks[before], self.low_rank),
            high_rank=np.where(lowered, ranks[after], self.high_rank),
        )
