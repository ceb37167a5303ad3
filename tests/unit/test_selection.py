"""Quotas and thresholds against brute force; run with `pytest tests/unit/test_selection.py`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.selection import (
    RULES,
    boundary,
    boundary_keys,
    chosen,
    leading_histogram,
    quotas,
    thresholds,
)
from s2l_ray.errors import UserError


@st.composite
def sizes_and_budgets(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    sizes = np.array(draw(st.lists(st.integers(0, 40), min_size=1, max_size=12)), dtype=np.int64)
    sizes[draw(st.integers(0, len(sizes) - 1))] += 1
    return sizes, draw(st.integers(1, int(sizes.sum())))


def visit(order: list[int], sizes: np.ndarray, budget: int) -> dict[int, int]:
    """The paper's rule, literally, in a given order of groups."""
    taken: dict[int, int] = {}
    for position, group in enumerate(order):
        share = (budget - sum(taken.values())) // (len(order) - position)
        taken[group] = int(sizes[group]) if sizes[group] <= share else share
    return taken


@given(sizes_and_budgets())
def test_quotas_follow_the_rule_spend_the_budget_and_fill_like_water(case: tuple[np.ndarray, int]) -> None:
    sizes, budget = case
    taken = quotas(sizes, budget)
    ascending = sorted(range(len(sizes)), key=lambda group: (sizes[group], group))
    assert dict(enumerate(taken.tolist())) == visit(ascending, sizes, budget)
    assert taken.sum() == budget
    assert (taken <= sizes).all()
    cut = taken[taken < sizes]
    if len(cut):
        assert cut.max() - cut.min() <= 1
        assert taken.max() <= cut.min() + 1  # no group got more than one that could have given more


def test_quotas_of_equal_groups_give_what_the_floors_leave_to_the_last() -> None:
    assert quotas(np.array([5, 5, 5]), 8).tolist() == [2, 3, 3]
    assert quotas(np.array([9, 0, 1, 9]), 12).tolist() == [5, 0, 1, 6]
    assert quotas(np.array([3, 2]), 1).tolist() == [1, 0]


def test_descending_order_leaves_budget_unspent() -> None:
    # why groups are visited smallest first: nobody is left to take what the small ones cannot give
    sizes = np.array([1000, 100, 10])
    assert sum(visit([0, 1, 2], sizes, 600).values()) == 310
    assert quotas(sizes, 600).tolist() == [490, 100, 10]


@pytest.mark.parametrize("budget", [0, -3, 7])
def test_a_budget_that_cannot_be_spent_is_refused_with_the_numbers(budget: int) -> None:
    with pytest.raises(UserError, match=rf"between 1 and .*6, got {budget}"):
        quotas(np.array([4, 2]), budget)


def draw_subset(
    groups: np.ndarray, keys: np.ndarray, taken: np.ndarray, cuts: list[int], bits: int
) -> np.ndarray:
    """The engine over the parts between `cuts`, in reverse order."""
    parts = list(zip(np.split(groups, cuts), np.split(keys, cuts), strict=True))[::-1]
    histogram = sum(leading_histogram(g, k, num_groups=len(taken), bits=bits) for g, k in parts)
    where = boundary(np.asarray(histogram), taken)
    found = [boundary_keys(g, k, where) for g, k in parts]
    last = thresholds(np.concatenate([g for g, _ in found]), np.concatenate([k for _, k in found]), where)
    return np.concatenate([chosen(g, k, quotas=taken, thresholds=last) for g, k in parts[::-1]])


def full_sort(groups: np.ndarray, keys: np.ndarray, taken: np.ndarray) -> np.ndarray:
    mask = np.zeros(len(groups), dtype=bool)
    for group, quota in enumerate(taken):
        members = np.flatnonzero(groups == group)
        mask[members[np.argsort(keys[members])[:quota]]] = True
    return mask


@given(st.data())
@settings(max_examples=200)
def test_the_engine_equals_a_full_sort_for_any_cut_into_parts(data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, 5))
    groups = np.array(data.draw(st.lists(st.integers(-1, num_groups - 1), max_size=60)), dtype=np.int32)
    narrow = (
        st.sampled_from([0, 1, 2**52, 2**64 - 1, 2**64 - 2]) | st.integers(0, 2**64 - 1) | st.integers(0, 70)
    )
    raw = st.lists(narrow, min_size=len(groups), max_size=len(groups), unique=True)
    keys = np.array(data.draw(raw), dtype=np.uint64)
    sizes = np.bincount(groups[groups >= 0], minlength=num_groups)
    taken = np.array([data.draw(st.sampled_from(sorted({0, int(s), int(s) // 2}))) for s in sizes])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(groups)), max_size=4)))
    mask = draw_subset(groups, keys, taken, cuts, data.draw(st.sampled_from([1, 4, 12])))
    np.testing.assert_array_equal(mask, full_sort(groups, keys, taken))


def test_a_realistic_draw_is_exact_and_collects_few_keys() -> None:
    rng = np.random.default_rng(0)
    groups = rng.choice(50, size=200_000, p=rng.dirichlet(np.full(50, 0.3))).astype(np.int32)
    groups[::97] = -1
    keys = keyed_hash(5, np.arange(len(groups)))
    taken = quotas(np.bincount(groups[groups >= 0], minlength=50), 20_000)
    mask = draw_subset(groups, keys, taken, [10, 65_536, 199_993], 12)
    assert mask.sum() == 20_000
    np.testing.assert_array_equal(mask, full_sort(groups, keys, taken))
    where = boundary(leading_histogram(groups, keys, num_groups=50), taken)
    assert len(boundary_keys(groups, keys, where)[0]) < 200  # about N / 4096 = 49


def test_missing_or_equal_boundary_keys_are_refused() -> None:
    groups, keys = np.zeros(4, dtype=np.int32), np.array([1, 2, 2, 3], dtype=np.uint64)
    where = boundary(leading_histogram(groups, keys, num_groups=1), np.array([2]))
    with pytest.raises(ValueError, match="occurs twice"):
        thresholds(groups, keys, where)
    with pytest.raises(ValueError, match="expected at least 2 boundary keys, got 1"):
        thresholds(groups[:1], keys[:1], where)
    with pytest.raises(ValueError, match="do not fit"):
        boundary(leading_histogram(groups, keys, num_groups=1), np.array([5]))


def test_the_named_rules_are_a_group_and_a_score() -> None:
    assert {name: (rule.group, rule.score) for name, rule in RULES.items()} == {
        "s2l": ("cluster", "hash"),
        "random": ("all", "hash"),
        "source_balanced": ("source", "hash"),
    }
