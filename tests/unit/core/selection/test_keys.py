"""Sorted keys of chunks, and what queries to them give."""

import numpy as np
import pytest

from s2l_ray.core.hashing import SUBSET, keyed_hash
from s2l_ray.core.query import Query
from s2l_ray.core.selection.keys import (
    HIGHEST,
    LOWEST,
    GroupSizes,
    Keys,
    KeysBetween,
    Points,
    Ranks,
    ordered_bits,
)

ROWS = 200_000
ALL_FROM, ALL_TO = Points.same(np.arange(50), LOWEST), Points.same(np.arange(50), HIGHEST)


def rows(scores: np.ndarray) -> Points:
    """Rows in 50 groups of very different sizes, and some that cannot be chosen."""
    rng = np.random.default_rng(0)
    groups = rng.choice(50, size=len(scores), p=rng.dirichlet(np.full(50, 0.3)))
    groups[::97] = -1
    return Points(groups, ordered_bits(scores), keyed_hash(SUBSET, 5, np.arange(len(scores))))


@pytest.mark.parametrize(
    "query",
    [
        GroupSizes(),
        Ranks(rows(np.arange(3000) / 7).at(np.arange(1, 90))),
        KeysBetween(ALL_FROM, ALL_TO),
        KeysBetween(ALL_FROM, ALL_TO, share=0.2, seed=3),
    ],
    ids=["sizes", "ranks", "keys", "sample"],
)
def test_answers_of_chunks_merge_into_that_of_all_rows(query: Query) -> None:
    points = rows(np.arange(3000) / 7)
    parts = np.zeros(3000, np.uint8)
    chunks = [
        Keys.of(points.at(own), parts[own], 50)
        for own in np.split(np.arange(3000), [0, 1000, 1001, 2500])
    ]
    whole = query.of(Keys.of(points, parts, 50))
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        first, *others = [query.of(chunks[number]) for number in order]
        merged = query.merge([first, query.merge(others)])
        if isinstance(whole, Points):
            assert len(whole.groups) > 100
            merged, whole = merged.sorted(), whole.sorted()
        np.testing.assert_array_equal(merged, whole)


def test_a_sample_has_about_its_share_of_the_keys_and_another_seed_draws_others() -> None:
    keys = Keys.of(rows(np.zeros(ROWS)), np.zeros(ROWS, np.uint8), 50)
    one, other = (KeysBetween(ALL_FROM, ALL_TO, 0.1, seed).of(keys).hashes for seed in (0, 1))
    for hashes in (one, other):
        assert abs(len(hashes) - 0.1 * len(keys.hashes)) < 1000
    assert abs(len(np.intersect1d(one, other)) - 0.01 * len(keys.hashes)) < 300


def test_keys_of_a_rule_without_a_score_keep_none() -> None:
    points, scored = rows(np.zeros(ROWS)), rows(np.arange(ROWS) / 7)
    parts = np.zeros(len(points.groups), np.uint8)
    keys, full = Keys.of(points, parts, 50), Keys.of(scored, parts, 50)
    num_rows = len(keys.hashes)
    assert len(full.scores) == num_rows
    assert len(keys.scores) == 1
    in_bytes = sum(column.nbytes for column in (keys.scores, keys.hashes, keys.parts))
    assert in_bytes == 8 + 9 * num_rows
    # and they answer as those do that keep the same score for every row
    kept = Keys(keys.starts, np.full(num_rows, keys.scores[0]), keys.hashes, keys.parts)
    sampled = KeysBetween(ALL_FROM, ALL_TO, share=0.01)
    some = sampled.of(kept)
    for own, all_ in zip(sampled.of(keys), some, strict=True):
        np.testing.assert_array_equal(own, all_)
    ranks = Ranks(some.sorted())
    np.testing.assert_array_equal(ranks.of(keys), ranks.of(kept))
    assert (Ranks(some).of(keys) >= 0).all()
    assert Ranks(some).of(keys).any()


def test_order_of_floats_is_the_order_of_their_bits() -> None:
    values = np.array([-np.inf, -1.7e308, -1.0, -5e-324, 0.0, 5e-324, 1.0, np.inf])
    assert (np.diff(ordered_bits(values).astype(object)) > 0).all()
    assert ordered_bits(np.array([-0.0])) == ordered_bits(np.array([0.0]))
    # what stands above every key
    assert ordered_bits(values).max() < 2**64 - 1
