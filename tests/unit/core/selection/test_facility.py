"""Facility location against plain greedy, the optimum of small inputs, and greedy on all rows."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.hashing import COVERING, keyed_hash
from s2l_ray.core.selection import facility, merge_tree
from s2l_ray.core.selection.facility import Candidates, candidates, facility_location, merge
from s2l_ray.core.selection.merge_tree import blocks, run_tree


def curves(num: int, seed: int = 0, steps: int = 6) -> np.ndarray:
    draw = np.random.default_rng(seed)
    speed, level = draw.choice([0.0, 0.2, 1.0], (num, 1)), draw.lognormal(0.5, 0.6, (num, 1))
    return (level * np.exp(-speed * np.arange(steps)) + draw.normal(0, 0.1, (num, steps))).astype(
        np.float32
    )


def distances(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return np.sqrt(((wide[:, None] - wide) ** 2).sum(axis=2))


def total(rows: np.ndarray, chosen: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """Weighted sum of distances to the nearest chosen row."""
    wide = rows.astype(np.float64)
    squares = ((wide[:, None] - wide[chosen]) ** 2).sum(axis=2)
    return float((np.sqrt(squares.min(axis=1)) * weights).sum())


def similarity(rows: np.ndarray, chosen: Sequence[int]) -> float:
    """f(S) with s = largest distance less distance."""
    d = distances(rows)
    return float((d.max() - d[:, list(chosen)].min(axis=1)).sum())


def plain_greedy(rows: np.ndarray, weights: np.ndarray, count: int, keys: np.ndarray) -> list[int]:
    """Every gain of every row computed again for every choice."""
    d, nearest, chosen = distances(rows), np.full(len(rows), np.inf), []
    for _ in range(count):
        sums = (np.minimum(nearest[:, None], d) * weights[:, None]).sum(axis=0)
        rest = [row for row in range(len(rows)) if row not in chosen]
        best = min(rest, key=lambda row: (round(float(sums[row]), 6), keys[row]))
        chosen.append(best)
        nearest = np.minimum(nearest, d[:, best])
    return chosen


IDS = np.arange(5000) * 3 + (7 << 40)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["curves", "grid", "duplicates", "one column"])
def test_the_choice_is_that_of_plain_greedy(kind: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = {
        "curves": curves(60, seed),
        # many equal distances, many equal rows
        "grid": draw.integers(0, 4, (60, 2)).astype(np.float32),
        "duplicates": curves(6, seed)[draw.integers(0, 6, 60)],
        "one column": np.round(64 * curves(60, seed)[:, :1]) / 64,
    }[kind]
    weights = draw.integers(1, 9, 60) if seed % 2 else np.ones(60, np.int64)
    for count in (1, 2, 9, 30, 60):
        expected = plain_greedy(rows, weights, count, keyed_hash(COVERING, seed, IDS[:60]))
        kept = merge([Candidates(IDS[:60], rows, weights)], count, seed)
        assert kept.ids.tolist() == sorted(IDS[expected].tolist()), count


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_of_greedy_holds(seed: int) -> None:
    rows = np.random.default_rng(seed).standard_t(2, (11, 2)).astype(np.float32)
    for count in (1, 2, 3, 4):
        found = similarity(
            rows, np.flatnonzero(facility_location(IDS[:11], rows, count, seed)).tolist()
        )
        best = max(similarity(rows, choice) for choice in itertools.combinations(range(11), count))
        assert (1 - 1 / math.e) * best <= found <= best + 1e-9


def test_a_larger_budget_only_adds_rows() -> None:
    rows, before = curves(200), np.zeros(200, bool)
    sums = []
    for budget in range(1, 60):
        chosen = facility_location(IDS[:200], rows, budget, 5)
        assert chosen.sum() == budget
        assert (chosen >= before).all()
        before = chosen
        sums.append(total(rows, chosen))
    gains = -np.diff(sums)
    assert (gains >= 0).all()
    # submodular: every further row gains less
    assert (np.diff(gains) <= 1e-5).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_rows_and_of_parts_does_not_matter(seed: int) -> None:
    rows = np.random.default_rng(0).integers(0, 3, (300, 2)).astype(np.float32)
    ids, order = IDS[:300], np.random.default_rng(seed).permutation(300)
    chosen = facility_location(ids, rows, 40, seed)
    np.testing.assert_array_equal(
        facility_location(ids[order], rows[order], 40, seed), chosen[order]
    )
    kept = [
        candidates(ids[a:b], rows[a:b], 30, seed) for a, b in ((0, 100), (100, 190), (190, 300))
    ]
    merged = merge(kept, 40, seed)
    again = merge(kept[::-1], 40, seed)
    for one, other in zip(
        (merged.ids, merged.rows, merged.weights),
        (again.ids, again.rows, again.weights),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("distances", ["all kept", "none kept"])
def test_ties_are_decided_by_the_seed(monkeypatch: pytest.MonkeyPatch, distances: str) -> None:
    if distances == "none kept":
        # Every choice looks at a sample then, which here holds all rows.
        monkeypatch.setattr(facility, "KEPT_DISTANCES", 0)
    rows = np.zeros((50, 3), np.float32)
    for seed in (0, 1, 2):
        chosen = facility_location(IDS[:50], rows, 7, seed)
        expected = np.argsort(keyed_hash(COVERING, seed, IDS[:50]))[:7]
        assert np.flatnonzero(chosen).tolist() == sorted(expected.tolist())


def test_candidates_carry_the_rows_that_are_nearest_to_them() -> None:
    rows = curves(400)
    kept = candidates(IDS[:400], rows, 25, 0)
    place = np.searchsorted(IDS[:400], kept.ids)
    np.testing.assert_array_equal(kept.rows, rows[place])
    nearest = distances(rows)[:, place].argmin(axis=1)
    assert kept.weights.tolist() == np.bincount(nearest, minlength=25).tolist()
    merged = merge([kept, candidates(IDS[400:700], curves(300, 1), 20, 0)], 10, 0)
    assert merged.weights.sum() == 700
    assert len(merged.ids) == 10


def test_a_weight_stands_for_so_many_equal_rows() -> None:
    rows, weights = curves(40), np.random.default_rng(1).integers(1, 6, 40)
    copies = np.repeat(rows, weights, axis=0)
    weighted = merge([Candidates(IDS[:40], rows, weights)], 12, 0)
    expanded = candidates(IDS[: len(copies)], copies, 12, 0)
    assert sorted(map(tuple, weighted.rows.tolist())) == sorted(map(tuple, expanded.rows.tolist()))


# --------------------------------------------------------------------------- more rows than a block


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a part of the distances only, as in a large merge, and samples that are samples."""
    monkeypatch.setattr(facility, "KEPT_DISTANCES", 60_000)
    monkeypatch.setattr(facility, "MIN_SAMPLE", 40)


def test_without_room_for_all_distances_the_choice_is_nearly_as_good(cramped: None) -> None:
    rows = curves(1500, steps=3)
    exact = plain_greedy(rows, np.ones(1500), 120, keyed_hash(COVERING, 0, IDS[:1500]))
    greedy = facility._Greedy(rows, np.ones(1500, np.int64), IDS[:1500], 0)
    assert greedy.closer is None
    chosen = greedy.run(120)
    assert greedy.closer is not None, "the lists never fitted"
    assert len(set(chosen)) == 120
    assert total(rows, np.array(chosen)) < 1.02 * total(rows, np.array(exact))
    random = np.random.default_rng(0).choice(1500, 120, replace=False)
    assert total(rows, np.array(chosen)) < 0.75 * total(rows, random)
    order = np.random.default_rng(1).permutation(1500)
    again = facility_location(IDS[:1500][order], rows[order], 120, 0)
    np.testing.assert_array_equal(again, np.isin(order, chosen))


def test_lists_that_would_not_fit_are_given_up(
    cramped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facility, "KEPT_DISTANCES", 0)
    rows = curves(300)
    chosen = facility_location(IDS[:300], rows, 300, 0)
    assert chosen.all()
    some = facility_location(IDS[:300], rows, 50, 0)
    assert some.sum() == 50
    exact = plain_greedy(rows, np.ones(300), 50, keyed_hash(COVERING, 0, IDS[:300]))
    assert total(rows, some) < 1.1 * total(rows, np.array(exact))


# -------------------------------------------------------------------------------------- many blocks


def local(
    ids: np.ndarray, rows: np.ndarray, cuts: list[tuple[int, int]], budget: int, seed: int
) -> Any:
    """All tasks in this process: what is chosen, and the candidates that the blocks passed on."""
    passed: list[Candidates] = []

    def first(number: int, count: int) -> Candidates:
        start, stop = cuts[number]
        passed.append(candidates(ids[start:stop], rows[start:stop], count, seed))
        return passed[-1]

    sizes = [stop - start for start, stop in cuts]
    return run_tree(sizes, budget, first, lambda parts, count: merge(parts, count, seed)), passed


def cut(num_rows: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


@pytest.mark.parametrize(
    ("limit", "loss"), [(10_000, 1.07), (150, 1.15)], ids=["one merge", "a tree of merges"]
)
@pytest.mark.parametrize("budget", [1, 30, 220, 1100, 2000])
def test_blocks_together_choose_nearly_as_well_as_greedy_on_all_rows(
    budget: int, limit: int, loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_tree, "MERGED_CANDIDATES", limit)
    rows = curves(2000)
    found, passed = local(IDS[:2000], rows, cut(2000, 512), budget, 3)
    ids = np.concatenate([part.ids for part in found])
    assert len(ids) == budget
    assert (np.diff(ids) > 0).all()
    place = np.searchsorted(IDS[:2000], ids)
    whole = np.flatnonzero(facility_location(IDS[:2000], rows, budget, 3))
    assert total(rows, place) <= loss * total(rows, whole) + 1e-9
    if 30 <= budget < 2000:
        random = np.random.default_rng(0).choice(2000, budget, replace=False)
        assert total(rows, place) < total(rows, random)
    # what is promised: no further than the candidates are, plus what these are from the choice
    to_candidates = 0.0
    for (start, stop), part in zip(cut(2000, 512), passed, strict=True):
        own = np.searchsorted(IDS[start:stop], part.ids)
        to_candidates += total(rows[start:stop], own)
    everyone = Candidates(
        *(np.concatenate([getattr(p, name) for p in passed]) for name in ("ids", "rows", "weights"))
    )
    squares = ((everyone.rows[:, None].astype(np.float64) - rows[place]) ** 2).sum(axis=2)
    further = float((np.sqrt(squares.min(axis=1)) * everyone.weights).sum())
    assert total(rows, place) <= to_candidates + further + 1e-6


@given(
    st.lists(st.integers(1, 4096), min_size=1, max_size=60),
    st.floats(0, 1),
    st.sampled_from([200, 5000, 32_768]),
)
@settings(max_examples=300)
def test_a_tree_spends_exactly_the_budget(sizes: list[int], share: float, limit: int) -> None:
    budget = max(1, int(share * sum(sizes)))
    passed, merges = [], []

    def first(number: int, count: int) -> tuple[int, int]:
        assert 1 <= count <= sizes[number]
        passed.append(count)
        return number, count

    def join(parts: Sequence[tuple[int, int]], count: int) -> tuple[int, int]:
        have = sum(own for _, own in parts)
        assert 1 <= count <= have
        assert have <= limit or len(parts) == 1
        assert [number for number, _ in parts] == sorted(number for number, _ in parts)
        merges.append(len(parts))
        return parts[0][0], count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_tree, "MERGED_CANDIDATES", limit)
        found = run_tree(sizes, budget, first, join)
    assert sum(count for _, count in found) == budget
    assert sum(passed) <= merge_tree.OVERSAMPLING * budget + sum(
        sizes
    ) / merge_tree.ROWS_PER_CANDIDATE + 2 * len(sizes)
    assert len(merges) <= 3 * len(sizes) + 1


@pytest.mark.parametrize("budget", [0, -1, 31])
def test_a_budget_that_cannot_be_spent_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget from 1 to 30, got {budget}"):
        run_tree([10, 20], budget, lambda number, count: number, lambda parts, count: 0)
    with pytest.raises(ValueError, match="expected finite rows"):
        facility_location(IDS[:30], curves(30), budget, 0)


def test_blocks_of_a_part_hold_at_most_4096_rows() -> None:
    assert blocks(0) == []
    assert blocks(1) == [(0, 1)]
    assert blocks(4096) == [(0, 4096)]
    assert blocks(10_000) == [(0, 4096), (4096, 8192), (8192, 10_000)]


# ------------------------------------------------------------------------------------- hostile rows


@pytest.mark.parametrize("scale", [1e38, 1.0, 1e-30, 1e-38])
def test_any_magnitude_gives_the_same_choice(scale: float) -> None:
    rows = curves(100, steps=2)
    rows /= np.float32(np.abs(rows).max())
    expected = facility_location(IDS[:100], rows, 10, 0)
    power = np.float32(2.0 ** round(math.log2(scale)))
    np.testing.assert_array_equal(facility_location(IDS[:100], rows * power, 10, 0), expected)


def test_two_far_values_are_both_chosen() -> None:
    rows = np.full((40, 3), -3e38, np.float32)
    rows[17] = 3e38
    assert facility_location(IDS[:40], rows, 2, 0)[17]


def test_what_is_no_set_of_rows_is_refused() -> None:
    rows = curves(5)
    with pytest.raises(ValueError, match="distinct ids"):
        facility_location(np.array([1, 2, 3, 3, 4]), rows, 2, 0)
    rows[3, 1] = np.nan
    with pytest.raises(ValueError, match="finite rows"):
        facility_location(IDS[:5], rows, 2, 0)
