"""Which examples a subset takes: quotas per group, then in each group the quota rows with the smallest keys.

Keys are never gathered or sorted as a whole: histograms of their leading bits, added up over parts, find the
one bucket per group in which the quota runs out, and the few keys in it give one threshold per group. A draw
is G numbers, and the subset is a filter over parts, the same for any cut into parts and any order of them.

Shapes: n rows of a part, G groups. Group -1 marks a row that is not eligible.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from s2l_ray.errors import UserError

_NOTHING = -1  # bucket of a group of which nothing is taken


@dataclass(frozen=True)
class Rule:
    """A selection rule: which rows share a quota, and which of them come first (smallest)."""

    group: Literal["cluster", "source", "all"]
    score: Literal["hash"]


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "s2l": Rule(group="cluster", score="hash"),
        "random": Rule(group="all", score="hash"),
        "source_balanced": Rule(group="source", score="hash"),
    }
)


def quotas(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Rows to take of each group, int64 [G], summing to exactly `budget`.

    Groups ascending by size, ties by group number; with R = floor(remaining / groups left) a group not larger
    than R is taken whole, of any other R rows are taken. A group that leaves rows over is followed only by
    groups at least as large, so what the floors leave is spent by the last ones, and groups not taken whole
    differ by at most one row. (paper section 1.1 step 4, design invariant 6)

    Raises UserError if budget is below 1 or above the number of rows.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    if not 1 <= budget <= total:
        raise UserError(
            "Choosing the subset: expected subset.budget between 1 and the number of examples to choose "
            f"from, {total}, got {budget}. Change subset.budget."
        )
    taken = np.zeros(len(sizes), dtype=np.int64)
    remaining = budget
    for num_done, group in enumerate(np.argsort(sizes, kind="stable")):
        taken[group] = min(int(sizes[group]), remaining // (len(sizes) - num_done))
        remaining -= int(taken[group])
    assert remaining == 0, (remaining, budget)
    return taken


@dataclass(frozen=True)
class Boundary:
    """Where each group's quota runs out: in bucket int64 [G] of the keys' leading `bits`, after `needed` [G]
    keys of it.

    A group of which nothing is taken has bucket -1, a group taken whole has bucket 2^bits; both need 0 keys.
    """

    bucket: np.ndarray
    needed: np.ndarray
    bits: int


def _leading(keys: np.ndarray, bits: int) -> np.ndarray:
    return (keys >> np.uint64(64 - bits)).astype(np.int64)


def leading_histogram(groups: np.ndarray, keys: np.ndarray, *, num_groups: int, bits: int = 12) -> np.ndarray:
    """Eligible rows per group and value of the leading bits: int64 [G, 2^bits] of groups int [n], keys uint64
    [n].

    Histograms of parts add up. One weighs G * 2^bits * 8 bytes, 3 MB for 100 groups.
    """
    eligible = groups >= 0
    cells = groups[eligible].astype(np.int64) * 2**bits + _leading(keys[eligible], bits)
    return np.bincount(cells, minlength=num_groups * 2**bits).reshape(num_groups, 2**bits)


def boundary(histogram: np.ndarray, quotas: np.ndarray) -> Boundary:
    """The bucket that holds each group's last chosen row, from the histogram of all rows and quotas [G]."""
    cumulative = histogram.cumsum(axis=1)
    totals = cumulative[:, -1]
    if (quotas > totals).any() or (quotas < 0).any():
        raise ValueError(f"quotas {quotas.tolist()} do not fit groups of {totals.tolist()} rows")
    bucket = (cumulative < quotas[:, None]).sum(axis=1)
    groups = np.arange(len(quotas))
    needed = quotas - (cumulative[groups, bucket] - histogram[groups, bucket])
    nothing, whole = quotas == 0, quotas == totals
    bucket = np.where(nothing, _NOTHING, np.where(whole, histogram.shape[1], bucket))
    needed = np.where(nothing | whole, 0, needed)
    return Boundary(bucket, needed, bits=histogram.shape[1].bit_length() - 1)


def boundary_keys(groups: np.ndarray, keys: np.ndarray, where: Boundary) -> tuple[np.ndarray, np.ndarray]:
    """(groups, keys) of a part's rows in the boundary bucket of their group; in all about N / 2^bits."""
    eligible = np.flatnonzero(groups >= 0)
    inside = eligible[_leading(keys[eligible], where.bits) == where.bucket[groups[eligible]]]
    return groups[inside], keys[inside]


def thresholds(groups: np.ndarray, keys: np.ndarray, where: Boundary) -> np.ndarray:
    """The largest chosen key of each group, uint64 [G], from the boundary keys of all parts in any order.

    A group taken whole gets 2^64 - 1; one of which nothing is taken gets 0, which `chosen` never compares
    with.

    Raises ValueError if keys of a group are missing, or if equal keys leave open which row is chosen.
    """
    last = np.where(where.bucket == 2**where.bits, np.uint64(2**64 - 1), np.uint64(0))
    order = np.lexsort((keys, groups))
    groups, keys = groups[order], keys[order]
    starts, ends = (np.searchsorted(groups, np.arange(len(last)), side=side) for side in ("left", "right"))
    for group in np.flatnonzero(where.needed):
        inside, needed = keys[starts[group] : ends[group]], int(where.needed[group])
        if len(inside) < needed:
            raise ValueError(f"group {group}: expected at least {needed} boundary keys, got {len(inside)}")
        if len(inside) > needed and inside[needed - 1] == inside[needed]:
            raise ValueError(f"group {group}: key {inside[needed]} occurs twice, keys must be distinct")
        last[group] = inside[needed - 1]
    return last


def chosen(groups: np.ndarray, keys: np.ndarray, *, quotas: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Which rows of a part are in the subset, bool [n]: key at most the threshold of a group with a quota."""
    # group -1 reads the entry appended at the end: a quota of 0, like a group of which nothing is taken
    open_group = np.append(quotas, 0)[groups] > 0
    mask: np.ndarray = open_group & (keys <= np.append(thresholds, np.uint64(0))[groups])
    return mask
