"""Draws against a full sort."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.hashing import SUBSET, keyed_hash
from s2l_ray.core.query import Query
from s2l_ray.core.selection.draw import Ask, Draw, draw
from s2l_ray.core.selection.keys import GroupSizes, Keys, Points, ordered_bits
from s2l_ray.core.selection.quotas import quotas


def asking(chunks: list[Keys], fan_in: int = 1) -> Ask:
    """Puts a query to all chunks, which answer in another order every time.

    From `fan_in` 2 on, that many answers are merged, and what comes of it is merged again.
    """
    turn = 0

    def ask(query: Query[Keys, Any], /) -> Any:
        nonlocal turn
        turn += 1
        shift = turn % len(chunks)
        answers = [query.of(keys) for keys in chunks[shift:] + chunks[:shift]]
        while fan_in > 1 and len(answers) > fan_in:
            answers = [
                query.merge(answers[first : first + fan_in])
                for first in range(0, len(answers), fan_in)
            ]
        return query.merge(answers)

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
    sizes = asking(chunks)(GroupSizes())
    drawn = draw(asking(chunks, fan_in), sizes, taken, take, **limits)
    assert sum(int(drawn.rows_of_parts(keys, 1).sum()) for keys in chunks) == taken.sum()
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
    return Points(groups, ordered_bits(scores), keyed_hash(SUBSET, 5, np.arange(rows))), quotas(
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

    def ask(query: Query[Keys, Any], /) -> Any:
        answers = [query.of(keys) for keys in chunks]
        exchanged.append(sum(len(a.groups if isinstance(a, Points) else a) for a in answers))
        return query.merge(answers)

    sizes = asking(chunks)(GroupSizes())
    found = draw(ask, sizes, taken, take, sample=4096, gathered=8192)
    np.testing.assert_array_equal(found.chosen(points), full_sort(points, taken, take))
    # sample, count, perhaps once more, and the keys at the ends
    assert len(exchanged) <= 5
    # a sample of 4096 is about that many; counts come from all four chunks
    assert max(exchanged) < 4 * 9000


def test_many_groups_are_found_all_at_once() -> None:
    points, _ = realistic("heavy tails", rows=60_000, num_groups=10_000)
    sizes = np.bincount(points.groups[points.groups >= 0], minlength=10_000)
    taken = quotas(sizes, 9_000)
    found = draw_subset(points, taken, "smallest", [20_000, 40_000], sample=2_000, gathered=15_000)
    np.testing.assert_array_equal(found.chosen(points), full_sort(points, taken, "smallest"))


def test_keys_that_repeat_and_quotas_that_do_not_fit_are_refused() -> None:
    twice = Points(np.zeros(4, np.int64), np.zeros(4, np.uint64), np.array([1, 2, 2, 3], np.uint64))
    with pytest.raises(ValueError, match="ids must be distinct"):
        draw_subset(twice, np.array([2]), "smallest", [2])
    with pytest.raises(ValueError, match="do not fit"):
        draw_subset(twice, np.array([5]), "smallest", [2])
