"""How many rows are chosen: the budget, and the share of it that each group gets (its quota)."""

import math
from fractions import Fraction

import numpy as np

from s2l_ray.errors import UserError


def budget_rows(budget: int | float, eligible: int) -> int:
    """The exact number of rows to choose out of `eligible`.

    Args:
        budget: a count, or a share (float), which is rounded down but gives at least 1 row.
        eligible: number of rows that can be chosen.

    Raises:
        UserError: the count is larger than `eligible`.
    """
    # The decimal number as written: 0.29 of 100 is 29, though the float 0.29 is a little less.
    rows = (
        budget if isinstance(budget, int) else max(1, math.floor(Fraction(str(budget)) * eligible))
    )
    if rows > eligible:
        raise UserError(
            f"choosing the subset: subset.budget asks for {rows} rows, but only {eligible} can be "
            "chosen (scored rows). Lower the budget, or add data."
        )
    return rows


def quotas(
    sizes: np.ndarray, budget: int, small_last: int = 0, parents: np.ndarray | None = None
) -> np.ndarray:
    """How many rows to choose of each group: int64 [G], summing to exactly `budget`.

    Groups are visited ascending by size, ties by group number. Each gets

        quota = min(size, R),  R = floor(remaining budget / groups left, this one included).

    A group smaller than R leaves budget over, which the groups after it share. Those are at least
    as large, so the budget is always spent, and the quotas of groups that are not chosen whole
    differ by at most 1. (S2L, Yang et al. 2024, section 4; descending order would leave budget
    unspent.)

    Args:
        sizes: rows of each group, int64 [G].
        small_last: groups of at most this many rows get a share only when all others are chosen
            whole, as in the authors' code.
        parents: the set that each group belongs to, int64 [G]. The budget is then shared by the
            same rule over the sets first, and the share of a set over its groups, as the authors'
            code does with sources and the clusters within them.

    Raises:
        UserError: `budget` is below 1 or above the number of rows.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    if not 1 <= budget <= total:
        raise UserError(
            "Choosing the subset: expected subset.budget between 1 and the number of examples to "
            f"choose from, {total}, got {budget}. Change subset.budget."
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
    """The quotas of `_fill` over the large groups first, then over the small ones."""
    large = np.where(sizes > small_last, sizes, 0)
    first = min(budget, int(large.sum()))
    return _fill(large, first) + _fill(sizes - large, budget - first)


def _fill(sizes: np.ndarray, budget: int) -> np.ndarray:
    """The formula of `quotas`; `budget` is at most the number of rows."""
    taken = np.zeros(len(sizes), dtype=np.int64)
    remaining = budget
    for num_done, group in enumerate(np.argsort(sizes, kind="stable")):
        taken[group] = min(int(sizes[group]), remaining // (len(sizes) - num_done))
        remaining -= int(taken[group])
    return taken
