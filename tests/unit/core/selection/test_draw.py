"""Quotas and draws against brute force."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.config import Rule, Subset
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.selection.draw import (
    Draw,
    Keys,
    Points,
    draw,
    groups_of,
    merged,
    needs,
    ordered_bits,
    quotas,
    uses_at,
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
    """The published code raises on a source of 60 rows, a share of 40 and 100 clusters (the quotas' half of that bug)."""
    sizes = np.zeros((2, 100), np.int64)
    sizes[0, :60] = 1  # a cluster for each of its rows, the others empty
    sizes[1] = 9
    parents = np.repeat([0, 1], 100)
    for small in (0, 2):  # 2: all clusters of the first source are tiny, and used all the same
        taken = quotas(sizes.reshape(-1), 80, small, parents).reshape(2, 100)
        assert taken.sum(axis=1).tolist() == [40, 40]
        assert (taken <= sizes).all()


# -------------------------------------------------------------------------------------------------------------------- draw


def asking(chunks: list[Keys], fan_in: int = 1) -> Callable[[str, tuple[Any, ...]], Iterable[Any]]:
    """The engine's way to the chunks, which answer in another order every time; `fan_in` answers are merged, and what comes of it again."""
    turn = 0

    def ask(method: str, args: tuple[Any, ...]) -> Iterable[Any]:
        nonlocal turn
        turn += 1
        shift = turn % len(chunks)
        answers = [getattr(keys, method)(*args) for keys in chunks[shift:] + chunks[:shift]]
        while fan_in > 1 and len(answers) > fan_in:
            answers = [
                merged(method, answers[first : first + fan_in])
                for first in range(0, len(answers), fan_in)
            ]
        return answers

    return ask


def cut_up(points: Points, num_groups: int, cuts: list[int]) -> list[Keys]:
    pieces = np.split(np.arange(len(points.groups)), sorted(cuts))
    return [Keys.of(points.at(own), np.zeros(len(own), np.int32), num_groups) for own in pieces]


def full_sort(points: Points, taken: np.ndarray, take: str) -> np.ndarray:
    """What a draw must be: every group sorted as a whole, in Python's own order of tuples."""
    mask = np.zeros(len(points.groups), dtype=bool)
    keys = list(zip(points.scores.tolist(), points.hashes.tolist(), strict=True))
    for group, quota in enumerate(taken.tolist()):
        members = sorted(np.flatnonzero(points.groups == group).tolist(), key=keys.__getitem__)
        first = (len(members) - quota) // 2 if take == "middle" else 0
        mask[members[first : first + quota]] = True
    return mask


def draw_subset(
    points: Points,
    taken: np.ndarray,
    take: Literal["smallest", "middle"],
    cuts: list[int],
    fan_in: int = 1,
    **limits: int,
) -> Draw:
    chunks = cut_up(points, len(taken), cuts)
    sizes = merged("sizes", [keys.sizes() for keys in chunks])
    drawn = draw(asking(chunks, fan_in), sizes, taken, take, **limits)
    assert sum(int(keys.count(drawn, 1).sum()) for keys in chunks) == taken.sum()
    return drawn


EXTREME = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 5e-324, -5e-324, 1.7e308, np.pi]
scores_ = st.sampled_from(EXTREME) | st.floats(allow_nan=False) | st.integers(0, 3).map(float)


@given(st.data())
@settings(max_examples=200)
def test_the_engine_equals_a_full_sort_for_any_cut_into_chunks_and_any_merging(
    data: st.DataObject,
) -> None:
    num_groups = data.draw(st.integers(1, 5))
    groups = np.array(
        data.draw(st.lists(st.integers(-1, num_groups - 1), max_size=60)), dtype=np.int64
    )
    many = {"min_size": len(groups), "max_size": len(groups)}
    scores = ordered_bits(np.array(data.draw(st.lists(scores_, **many)), dtype=np.float64))
    narrow = (
        st.sampled_from([0, 1, 2**52, 2**64 - 1, 2**64 - 2])
        | st.integers(0, 2**64 - 1)
        | st.integers(0, 70)
    )
    hashes = np.array(data.draw(st.lists(narrow, unique=True, **many)), dtype=np.uint64)
    points = Points(groups, scores, hashes)
    sizes = np.bincount(groups[groups >= 0], minlength=num_groups)
    taken = np.array(
        [data.draw(st.sampled_from(sorted({0, int(s), int(s) // 2, (s + 2) // 3}))) for s in sizes]
    )
    cuts = data.draw(st.lists(st.integers(0, len(groups)), max_size=4))
    take = data.draw(st.sampled_from(["smallest", "middle"]))
    limits = {"sample": data.draw(st.integers(0, 9)), "gathered": data.draw(st.integers(0, 9))}
    found = draw_subset(points, taken, take, cuts, data.draw(st.integers(1, 3)), **limits)
    np.testing.assert_array_equal(found.chosen(points), full_sort(points, taken, take))


def realistic(kind: str, rows: int = 200_000, num_groups: int = 50) -> tuple[Points, np.ndarray]:
    rng = np.random.default_rng(0)
    groups = rng.choice(num_groups, size=rows, p=rng.dirichlet(np.full(num_groups, 0.3)))
    groups[::97] = -1
    scores = {
        "hash": np.zeros(rows),
        "few values": rng.integers(0, 3, rows).astype(float),
        "heavy tails": rng.standard_cauchy(rows),
        "in order": np.arange(rows) / 7,
    }[kind]
    sizes = np.bincount(groups[groups >= 0], minlength=num_groups)
    return Points(groups, ordered_bits(scores), keyed_hash(5, np.arange(rows))), quotas(
        sizes, rows // 10
    )


@pytest.mark.parametrize("take", ["smallest", "middle"])
@pytest.mark.parametrize("kind", ["hash", "few values", "heavy tails", "in order"])
def test_a_realistic_draw_is_exact_and_exchanges_few_keys(
    kind: str, take: Literal["smallest", "middle"]
) -> None:
    points, taken = realistic(kind)
    chunks = cut_up(points, 50, [10, 65_536, 199_993])
    exchanged: list[int] = []

    def ask(method: str, args: tuple[Any, ...]) -> Iterable[Any]:
        answers = list(asking(chunks)(method, args))
        exchanged.append(sum(len(a.groups) if method == "between" else len(a) for a in answers))
        return answers

    sizes = np.sum([keys.sizes() for keys in chunks], axis=0)
    found = draw(ask, sizes, taken, take, sample=4096, gathered=8192)
    np.testing.assert_array_equal(found.chosen(points), full_sort(points, taken, take))
    assert len(exchanged) <= 5  # sample, count, perhaps once more, and the keys at the ends
    assert (
        max(exchanged) < 4 * 9000
    )  # a sample of 4096 is about that many; counts come from all four chunks


def test_keys_of_a_rule_without_a_score_keep_none() -> None:
    points, _ = realistic("hash")
    scored, _ = realistic("in order")
    parts = np.zeros(len(points.groups), np.uint8)
    keys, full = Keys.of(points, parts, 50), Keys.of(scored, parts, 50)
    rows = len(keys.hashes)
    assert len(full.scores) == rows
    assert len(keys.scores) == 1
    in_bytes = sum(column.nbytes for column in (keys.scores, keys.hashes, keys.parts))
    assert in_bytes == 8 + 9 * rows
    # and they answer as those do that keep the same score for every row
    kept = Keys(keys.starts, np.full(rows, keys.scores[0]), keys.hashes, keys.parts)
    low, high = (
        Points.same(np.arange(50), np.uint64(0)),
        Points.same(np.arange(50), np.uint64(2**64 - 1)),
    )
    some = kept.between(low, high, share=0.01)
    for own, all_ in zip(keys.between(low, high, share=0.01), some, strict=True):
        np.testing.assert_array_equal(own, all_)
    np.testing.assert_array_equal(keys.ranks(some.sorted()), kept.ranks(some.sorted()))
    assert (keys.ranks(some) >= 0).all()
    assert keys.ranks(some).any()


def test_many_groups_are_found_all_at_once() -> None:
    points, _ = realistic("heavy tails", rows=60_000, num_groups=10_000)
    sizes = np.bincount(points.groups[points.groups >= 0], minlength=10_000)
    taken = quotas(sizes, 9_000)
    found = draw_subset(points, taken, "smallest", [20_000, 40_000], sample=2_000, gathered=15_000)
    np.testing.assert_array_equal(found.chosen(points), full_sort(points, taken, "smallest"))


def test_order_of_floats_is_the_order_of_their_bits() -> None:
    values = np.array([-np.inf, -1.7e308, -1.0, -5e-324, 0.0, 5e-324, 1.0, np.inf])
    assert (np.diff(ordered_bits(values).astype(object)) > 0).all()
    assert ordered_bits(np.array([-0.0])) == ordered_bits(np.array([0.0]))
    assert ordered_bits(values).max() < 2**64 - 1  # what stands above every key


def test_keys_that_repeat_and_quotas_that_do_not_fit_are_refused() -> None:
    twice = Points(np.zeros(4, np.int64), np.zeros(4, np.uint64), np.array([1, 2, 2, 3], np.uint64))
    with pytest.raises(ValueError, match="ids must be distinct"):
        draw_subset(twice, np.array([2]), "smallest", [2])
    with pytest.raises(ValueError, match="do not fit"):
        draw_subset(twice, np.array([5]), "smallest", [2])


# ------------------------------------------------------------------------------------------------------------------ groups


def test_groups_have_numbers_and_names() -> None:
    sources, clusters = np.array([0, 1, 1]), np.array([2, 0, 2])

    def of(group: str, cluster_sources: list[str] | None = None) -> tuple[list[int], list[str]]:
        made = groups_of(Rule(group=group), ["a", "b"], 3, cluster_sources)
        return np.broadcast_to(made.numbers(sources, clusters), 3).tolist(), list(made.names)

    assert of("all") == ([0, 0, 0], ["all"])
    assert of("source") == ([0, 1, 1], ["a", "b"])
    assert of("cluster") == ([2, 0, 2], ["0", "1", "2"])
    pairs = ["a / 0", "a / 1", "a / 2", "b / 0", "b / 1", "b / 2"]
    assert of("(source, cluster)") == of("source/cluster") == ([2, 3, 5], pairs)
    # clusters within sources are pairs by themselves
    assert of("source / cluster", ["b", "b", "a"]) == ([2, 0, 2], ["b / 0", "b / 1", "a / 2"])
    nested = groups_of(Rule(group="source / cluster"), ["a", "b"], 3, ["b", "b", "a"])
    assert nested.parents is not None
    assert nested.parents.tolist() == [1, 1, 0]
    assert groups_of(Rule(group="(source, cluster)"), ["a", "b"], 3, None).parents is None


@pytest.mark.parametrize(
    ("rule", "columns"),
    [
        ("s2l", {"cluster"}),
        ("s2l_within_sources", {"source", "cluster"}),
        ("random", set()),
        ("source_balanced", {"source"}),
        ("longest", {"num_tokens"}),
        ("ifd", {"losses", "answer_loss"}),
        ("medoid", {"cluster", "distance"}),
        ("facility_location", {"losses"}),
        (Rule(group="source", score="at(el2n) * distance"), {"source", "el2n", "distance"}),
    ],
)
def test_a_rule_reads_no_more_columns_than_it_names(rule: str | Rule, columns: set[str]) -> None:
    assert needs(Subset(rule=rule)) == columns


def test_only_some_rules_look_at_one_step() -> None:
    assert uses_at(Subset(rule="el2n"))
    assert not uses_at(Subset(rule="variability"))
    assert not uses_at(Subset(rule="facility_location"))
