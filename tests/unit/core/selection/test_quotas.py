"""Quotas against the rule written as a loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.core.selection.quotas import quotas
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
def test_quotas_follow_the_rule_spend_the_budget_and_fill_like_water(
    case: tuple[np.ndarray, int],
) -> None:
    sizes, budget = case
    taken = quotas(sizes, budget)
    ascending = sorted(range(len(sizes)), key=lambda group: (sizes[group], group))
    assert dict(enumerate(taken.tolist())) == visit(ascending, sizes, budget)
    assert taken.sum() == budget
    assert (taken <= sizes).all()
    cut = taken[taken < sizes]
    if len(cut):
        assert cut.max() - cut.min() <= 1
        # no group got more than one that could have given more
        assert taken.max() <= cut.min() + 1


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


@given(sizes_and_budgets(), st.integers(0, 8))
def test_small_groups_are_used_last_and_the_budget_is_spent_all_the_same(
    case: tuple[np.ndarray, int], small: int
) -> None:
    sizes, budget = case
    taken = quotas(sizes, budget, small)
    assert taken.sum() == budget
    is_small = sizes <= small
    if taken[is_small].any():
        assert (taken == sizes)[~is_small].all()
    else:
        np.testing.assert_array_equal(taken[~is_small], quotas(sizes[~is_small], budget))


@given(st.data(), st.integers(0, 3))
def test_nested_quotas_share_over_sources_first_then_over_their_clusters(
    data: st.DataObject, small: int
) -> None:
    table = np.array(
        data.draw(
            st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5)
        )
    )
    table[0, 0] += 1
    parents = np.repeat(np.arange(len(table)), 4)
    budget = data.draw(st.integers(1, int(table.sum())))
    taken = quotas(table.reshape(-1), budget, small, parents).reshape(table.shape)
    of_source = quotas(table.sum(axis=1), budget)
    np.testing.assert_array_equal(taken.sum(axis=1), of_source)
    for own, sizes, share in zip(taken, table, of_source, strict=True):
        if share:
            np.testing.assert_array_equal(own, quotas(sizes, int(share), small))


def test_groups_of_nested_quotas_may_lie_in_any_order() -> None:
    sizes, parents = np.array([4, 90, 5, 90]), np.array([0, 1, 0, 1])
    assert quotas(sizes, 20, parents=parents).tolist() == [4, 5, 5, 6]


def test_bug_12_a_source_with_more_rows_than_its_share_and_fewer_than_clusters() -> None:
    """The published code raises on a source of 60 rows, a share of 40 and 100 clusters.

    This is the quotas' half of that bug.
    """
    sizes = np.zeros((2, 100), np.int64)
    # a cluster for each of its rows, the others empty
    sizes[0, :60] = 1
    sizes[1] = 9
    parents = np.repeat([0, 1], 100)
    # 2: all clusters of the first source are tiny, and used all the same
    for small in (0, 2):
        taken = quotas(sizes.reshape(-1), 80, small, parents).reshape(2, 100)
        assert taken.sum(axis=1).tolist() == [40, 40]
        assert (taken <= sizes).all()
