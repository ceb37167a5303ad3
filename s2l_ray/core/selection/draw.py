"""Which examples a subset takes: quotas per group, then in each group the quota rows with the smallest keys.

A rule is two expressions, a group and a score. A row's key is (score, keyed hash), so no two rows tie. Keys are sorted
where the rows are read, in chunks; what is exchanged are samples of keys, counts of keys below given ones, and the few
keys among which a quota ends. A draw is two keys a group, and the subset is a filter over parts, the same for any cut into
chunks and any order of them.

Shapes: n rows of a chunk, G groups, P points (keys that are looked for), M targets (ranks that are looked for).
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from s2l_ray.config import FACILITY_LOCATION, RULES, Rule, Subset, expressions, group_kind
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.errors import UserError

SAMPLE = 2**16  # keys that a round of the search looks at, in all: 1.6 MB
GATHERED = 2**17  # keys that are sorted in one place at the end, in all: 3 MB
_LAST = np.uint64(2**64 - 1)  # above every key: no score is encoded as this


def rule_of(section: Subset) -> Rule:
    """The rule that `subset.rule` names or is; for facility location, whose choice no key can tell, the group it spends its budget in."""
    if section.rule == FACILITY_LOCATION:
        return Rule()
    return RULES[section.rule] if isinstance(section.rule, str) else section.rule


def needs(section: Subset) -> set[str]:
    """The stored columns that a rule reads, such as {"cluster"} or {"source", "el2n"}."""
    if section.rule == FACILITY_LOCATION:
        return {"losses"}
    rule = rule_of(section)
    kind = group_kind(rule.group)
    grouped = {name for name in ("source", "cluster") if name in kind}
    return grouped | {expressions.COLUMNS[name] for name in expressions.parse(rule.score).names}


def by_cluster(section: Subset) -> bool:
    """Whether the rule reads what k-means made, so that there must be clusters."""
    return bool(needs(section) & {"cluster", "distance"})


def uses_at(section: Subset) -> bool:
    """Whether `subset.at` matters to the rule."""
    return expressions.parse(rule_of(section).score).uses_at


# ------------------------------------------------------------------------------------------------------------------ groups


@dataclass(frozen=True)
class Groups:
    """The groups of a rule by number: their names, what they are by (see `group_kind`), and for nested quotas the source of each."""

    kind: str
    names: tuple[str, ...]
    sources: tuple[str, ...]
    num_clusters: int
    own_sources: bool  # every cluster lies within one source, so that it is a pair by itself
    parents: np.ndarray | None

    def numbers(self, sources: np.ndarray | None, clusters: np.ndarray | None) -> np.ndarray | int:
        """Group int64 [n] of rows from the numbers of their sources and clusters; 0 where all are one group."""
        if self.kind == "all":
            return 0
        if self.kind == "source":
            assert sources is not None
            return sources
        assert clusters is not None
        if self.kind == "cluster" or self.own_sources:
            return clusters
        assert sources is not None
        return sources * self.num_clusters + clusters


def groups_of(
    rule: Rule, sources: Sequence[str], num_clusters: int, cluster_sources: Sequence[str] | None
) -> Groups:
    """The groups of a rule.

    Args:
        sources: names of the sources, whose places are their numbers.
        cluster_sources: the source of each cluster where clusters were made within sources.
    """
    kind = group_kind(rule.group)
    clusters = [str(number) for number in range(num_clusters)]
    parents = None
    if kind == "all":
        names = ["all"]
    elif kind == "source":
        names = list(sources)
    elif kind == "cluster":
        names = clusters
    else:
        of = cluster_sources
        pairs = (
            list(zip(of, clusters, strict=True))
            if of is not None
            else list(itertools.product(sources, clusters))
        )
        names = [f"{source} / {cluster}" for source, cluster in pairs]
        number = {source: index for index, source in enumerate(sources)}
        # a cluster of a source none of whose rows can be chosen has no rows either: any parent does
        parents = (
            np.array([number.get(source, 0) for source, _ in pairs], np.int64)
            if "/" in kind
            else None
        )
    return Groups(
        kind, tuple(names), tuple(sources), num_clusters, cluster_sources is not None, parents
    )


# ------------------------------------------------------------------------------------------------------------------ quotas


def quotas(
    sizes: np.ndarray, budget: int, small_last: int = 0, parents: np.ndarray | None = None
) -> np.ndarray:
    """Rows to take of each group, int64 [G], summing to exactly `budget`.

    Groups ascending by size, ties by group number; with R = floor(remaining / groups left) a group not larger
    than R is taken whole, of any other R rows are taken. A group that leaves rows over is followed only by
    groups at least as large, so what the floors leave is spent by the last ones, and groups not taken whole
    differ by at most one row. (paper section 1.1 step 4, design invariant 6)

    Args:
        small_last: groups of at most so many rows are only used when all others are taken whole (the authors' code).
        parents: int64 [G] numbers of the sets that groups belong to. The budget is then shared by the same rule over
            these sets first, and what a set gets over its groups (the authors' sources and clusters).

    Raises UserError if budget is below 1 or above the number of rows.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    if not 1 <= budget <= total:
        raise UserError(
            "Choosing the subset: expected subset.budget between 1 and the number of examples to choose "
            f"from, {total}, got {budget}. Change subset.budget."
        )
    if parents is None:
        taken = _fill_small_last(sizes, budget, small_last)
    else:
        taken = np.zeros(len(sizes), dtype=np.int64)
        shares = _fill(np.bincount(parents, weights=sizes).astype(np.int64), budget)
        order = np.argsort(parents, kind="stable")
        starts = np.searchsorted(parents[order], np.arange(len(shares) + 1))
        for parent in np.flatnonzero(shares):
            own = order[starts[parent] : starts[parent + 1]]
            taken[own] = _fill_small_last(sizes[own], int(shares[parent]), small_last)
    assert taken.sum() == budget, (taken, budget)
    return taken


def _fill_small_last(sizes: np.ndarray, budget: int, small_last: int) -> np.ndarray:
    large = np.where(sizes > small_last, sizes, 0)
    first = min(budget, int(large.sum()))
    return _fill(large, first) + _fill(sizes - large, budget - first)


def _fill(sizes: np.ndarray, budget: int) -> np.ndarray:
    """The rule itself; at most as many rows as there are."""
    taken = np.zeros(len(sizes), dtype=np.int64)
    remaining = budget
    for num_done, group in enumerate(np.argsort(sizes, kind="stable")):
        taken[group] = min(int(sizes[group]), remaining // (len(sizes) - num_done))
        remaining -= int(taken[group])
    return taken


# -------------------------------------------------------------------------------------------------------------------- keys


class Points(NamedTuple):
    """Keys with the group (or target) that each belongs to: int64, uint64 (score) and uint64 (hash), all [P]."""

    groups: np.ndarray
    scores: np.ndarray
    hashes: np.ndarray

    def sorted(self) -> "Points":
        """By group, then key; each once."""
        order = np.lexsort((self.hashes, self.scores, self.groups))
        ordered = self.at(order)
        again = np.zeros(len(order), bool)
        again[1:] = np.logical_and.reduce([column[1:] == column[:-1] for column in ordered])
        return ordered.at(~again)

    def at(self, which: np.ndarray) -> "Points":
        return Points(*(column[which] for column in self))

    @staticmethod
    def joined(several: Iterable["Points"]) -> "Points":
        """All of them, in the order given."""
        none = Points(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.uint64))
        return Points(*(np.concatenate(columns) for columns in zip(none, *several, strict=True)))

    @staticmethod
    def same(groups: np.ndarray, value: np.uint64) -> "Points":
        """One point a group, below (0) or above (_LAST) all keys."""
        return Points(groups, np.full(len(groups), value), np.full(len(groups), value))


def ordered_bits(scores: np.ndarray) -> np.ndarray:
    """float64 [n] as uint64 [n] in the same order, infinities included; NaN has no order and must not come."""
    bits = (np.asarray(scores, np.float64) + 0.0).view(
        np.uint64
    )  # 0.0 is added so that -0.0 equals 0.0
    sign = np.uint64(2**63)
    return np.where(bits & sign, ~bits, bits | sign)


@dataclass(frozen=True)
class Keys:
    """The rows of one chunk of parts in the order of their groups and keys.

    starts int64 [G + 1] says where groups begin; scores and hashes uint64 [n] are the keys, parts [n] of any integers the number of
    the part within the chunk that a row is from. scores is [1] where all rows have the same, as with a rule without a score.
    """

    starts: np.ndarray
    scores: np.ndarray
    hashes: np.ndarray
    parts: np.ndarray

    @classmethod
    def of(cls, points: Points, parts: np.ndarray, num_groups: int) -> "Keys":
        """Sort the rows of a chunk; those of group -1 cannot be chosen and are left out."""
        eligible = np.flatnonzero(points.groups >= 0)
        points = points.at(eligible)
        order = np.lexsort((points.hashes, points.scores, points.groups))
        starts = np.searchsorted(points.groups[order], np.arange(num_groups + 1))
        alike = (points.scores == points.scores[:1]).all()
        scores = points.scores[:1] if alike else points.scores[order]
        return cls(starts, scores, points.hashes[order], parts[eligible][order])

    def sizes(self) -> np.ndarray:
        """Rows of each group, int64 [G]."""
        return np.diff(self.starts)

    def ranks(self, points: Points) -> np.ndarray:
        """How many keys of its group lie below each point, int64 [P]; of chunks they add up."""
        return self._places(points) - self.starts[points.groups]

    def _places(self, points: Points) -> np.ndarray:
        """Where each point would stand, by halving all intervals at once."""
        low, high = self.starts[points.groups], self.starts[points.groups + 1]
        while (open_ := low < high).any():
            middle = np.minimum((low + high) // 2, len(self.hashes) - 1)
            score, hash_ = self._at(middle)
            below = (score < points.scores) | ((score == points.scores) & (hash_ < points.hashes))
            low, high = (
                np.where(open_ & below, middle + 1, low),
                np.where(open_ & ~below, middle, high),
            )
        return low

    def _at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and hashes of some rows; clipping finds the one score that there is where all are alike."""
        return self.scores.take(rows, mode="clip"), self.hashes[rows]

    def between(self, low: Points, high: Points, share: float = 1.0, seed: int = 0) -> Points:
        """The keys from low [M] to below high [M], with the number of the target in place of the group.

        Args:
            share: how many of them, drawn by another hash of the row, so that any cut into chunks draws the same.
        """
        rows, targets = _ranges(self._places(low), self._places(high))
        if share < 1:
            drawn = keyed_hash(seed, self.hashes[rows].view(np.int64)) < np.uint64(share * 2.0**64)
            rows, targets = rows[drawn], targets[drawn]
        return Points(targets, *self._at(rows))

    def count(self, draw: "Draw", num_parts: int) -> np.ndarray:
        """How many rows of each part of the chunk are drawn, int64 [num_parts]."""
        rows, _ = _ranges(self._places(draw.lower), self._places(draw.upper))
        return np.bincount(self.parts[rows], minlength=num_parts)


def _ranges(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers from starts [M] to below ends [M], one range after the other, and the number of the range of each."""
    lengths = np.maximum(ends - starts, 0)
    which = np.repeat(np.arange(len(lengths)), lengths)
    before = np.cumsum(lengths) - lengths
    return np.arange(len(which)) + (starts - before)[which], which


# -------------------------------------------------------------------------------------------------------------------- draw


@dataclass(frozen=True)
class Draw:
    """What is taken of each group: the keys from `lower` to below `upper`, both [G]."""

    lower: Points
    upper: Points

    def chosen(self, points: Points) -> np.ndarray:
        """Which rows are in the subset, bool [n]; those of group -1 are not."""
        # group -1 reads the entry appended at the end, which takes nothing
        score, hash_ = points.scores, points.hashes
        low_score, low_hash, high_score, high_hash = (
            np.append(column, np.uint64(0))[points.groups]
            for column in (*self.lower[1:], *self.upper[1:])
        )
        above = (score > low_score) | ((score == low_score) & (hash_ >= low_hash))
        below = (score < high_score) | ((score == high_score) & (hash_ < high_hash))
        mask: np.ndarray = above & below
        return mask


def merged(method: str, answers: Iterable[Any]) -> Any:
    """What Keys of all rows would answer to a question (sizes, ranks or between), from the answers of those that have some of them;
    the order of `between` is that of the answers, which nobody may rely on."""
    return (
        Points.joined(answers) if method == "between" else functools.reduce(operator.add, answers)
    )


# Calls a method of every chunk's Keys and gives the answers, or what some of them make together (see `merged`), in any order.
Ask = Callable[[str, tuple[Any, ...]], Iterable[Any]]


def draw(
    ask: Ask,
    sizes: np.ndarray,
    quotas: np.ndarray,
    take: Literal["smallest", "middle"] = "smallest",
    *,
    sample: int = SAMPLE,
    gathered: int = GATHERED,
) -> Draw:
    """Find the first and the last key of each group's quota.

    Args:
        ask: reaches the chunks.
        sizes, quotas: rows of each group, and how many of them to take, int64 [G].
        take: the rows with the smallest keys, or the same number in the middle: (size - quota) // 2 smaller ones are left out.
        sample, gathered: see SAMPLE and GATHERED.
    """
    if (quotas > sizes).any() or (quotas < 0).any():
        raise ValueError(f"quotas {quotas.tolist()} do not fit groups of {sizes.tolist()} rows")
    groups = np.arange(len(sizes))
    first = (sizes - quotas) // 2 if take == "middle" else np.zeros_like(sizes)
    ends = [first, first + quotas]
    # a rank of 0 is below all keys, one that equals the size above all; only ranks between them are looked for
    inner = [np.flatnonzero((quotas > 0) & (rank > 0) & (rank < sizes)) for rank in ends]
    found = keys_at(
        ask,
        np.concatenate(inner),
        np.concatenate([rank[groups_] for rank, groups_ in zip(ends, inner, strict=True)]),
        sizes,
        sample=sample,
        gathered=gathered,
    )
    bounds = []
    for rank, own, offset in zip(ends, inner, (0, len(inner[0])), strict=True):
        bound = Points.same(groups, np.uint64(0))
        above = (quotas > 0) & (rank == sizes)
        for column, values in zip(bound[1:], found[1:], strict=True):
            column[above] = _LAST
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
    """The key of each rank [M] (0: the smallest) in its group [M], where sizes [G] are the rows of all groups.

    Around each target an interval of keys is narrowed by counting what lies below the keys of a sample drawn from all
    intervals, until so few keys are left that they can be sorted here.
    """
    around = _Intervals(
        groups,
        ranks,
        low=Points.same(groups, np.uint64(0)),
        high=Points.same(groups, _LAST),
        below=np.zeros(len(groups), np.int64),
        end=sizes[groups],
    )
    # some keys a target at least: an interval never has fewer than one
    sample, gathered = max(sample, 4 * len(groups)), max(gathered, 4 * len(groups))
    for round_ in itertools.count():
        left = int((around.end - around.below).sum())
        if left <= gathered:
            break
        drawn = merged("between", ask("between", (around.low, around.high, sample / left, round_)))
        points = drawn._replace(groups=groups[drawn.groups]).sorted()
        around = around.narrowed(points, merged("ranks", ask("ranks", (points,))))
    found = merged("between", ask("between", (around.low, around.high))).sorted()
    starts = np.searchsorted(found.groups, np.arange(len(groups) + 1))
    if (np.diff(starts) != around.end - around.below).any():
        raise ValueError("keys are missing, or occur twice: example ids must be distinct")
    return found.at(starts[:-1] + ranks - around.below)


@dataclass(frozen=True)
class _Intervals:
    """What is known of each target, a rank in a group, all [M]: its key lies from `low`, which has rank `below`, to below `high`,
    which has rank `end`."""

    groups: np.ndarray
    ranks: np.ndarray
    low: Points
    high: Points
    below: np.ndarray
    end: np.ndarray

    def narrowed(self, points: Points, counts: np.ndarray) -> "_Intervals":
        """Cut down to the nearest of some sorted points [P] on both sides, where counts [P] are their ranks."""
        if not len(counts):
            return self
        many = (
            int(max(counts.max(), self.ranks.max())) + 1
        )  # makes one ascending number of a group and a rank
        wanted = self.groups * many + self.ranks
        place = np.searchsorted(points.groups * many + counts, wanted, side="right")
        before, after = np.maximum(place - 1, 0), np.minimum(place, len(counts) - 1)
        raised = (
            (points.groups[before] == self.groups) & (place > 0) & (counts[before] > self.below)
        )
        lowered = (
            (points.groups[after] == self.groups)
            & (place < len(counts))
            & (counts[after] < self.end)
        )
        return replace(
            self,
            low=Points(
                *(np.where(raised, n[before], o) for o, n in zip(self.low, points, strict=True))
            ),
            high=Points(
                *(np.where(lowered, n[after], o) for o, n in zip(self.high, points, strict=True))
            ),
            below=np.where(raised, counts[before], self.below),
            end=np.where(lowered, counts[after], self.end),
        )
