"""Intervals and paired tests by the bootstrap, beside formulas and other ways to compute them."""

import numpy as np
import pytest

from s2l_ray.core.answers.resampling import Resampled, counts, difference, estimate, holm


def resampled(values: np.ndarray, sources: list[str], parts: int = 1) -> Resampled:
    made = Resampled()
    for some in np.array_split(np.arange(len(values)), parts):
        made.add(some, [sources[n] for n in some], {"score": values[some]})
    return made


def test_rows_count_poisson_times() -> None:
    drawn = counts(np.arange(200), 1000)
    assert drawn.mean() == pytest.approx(1.0, abs=0.02)
    assert drawn.var() == pytest.approx(1.0, abs=0.02)
    assert (drawn == 0).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.15
    assert np.array_equal(counts(np.array([7, 3]), 50)[1], counts(np.array([3]), 50)[0])


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    right = (np.arange(1000) % 10 < 3).astype(float)
    found = estimate(resampled(right, ["s"] * 1000).macro_means("score"))
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert found.mean == pytest.approx(0.3)
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((half, half), rel=0.1)


def test_the_cut_into_parts_and_the_order_do_not_matter() -> None:
    values, sources = np.random.default_rng(1).random(100), ["a", "b"] * 50
    whole, cut = resampled(values, sources), resampled(values, sources, 7)
    assert whole.rows == cut.rows == {"a": 50, "b": 50}
    assert whole.same == cut.same
    assert whole.macro_means("score") == pytest.approx(cut.macro_means("score"))


def test_sources_weigh_equally_and_missing_values_are_left_out() -> None:
    values, sources = np.array([1.0, 1.0, 1.0, 0.0, np.nan]), ["a", "a", "a", "b", "b"]
    made = resampled(values, sources)
    assert made.macro_means("score")[0] == 0.5
    assert made.rows == {"a": 3, "b": 2}
    assert resampled(np.full(2, np.nan), ["a", "a"]).metrics == []


def test_a_paired_test_sees_what_unpaired_intervals_do_not() -> None:
    generator = np.random.default_rng(2)
    right = (generator.random(500) < 0.5).astype(float)
    better = np.maximum(right, generator.random(500) < 0.04)
    one, other = (resampled(values, ["s"] * 500) for values in (right, better))
    apart, p = difference(other.macro_means("score"), one.macro_means("score"))
    assert apart.mean == pytest.approx(better.mean() - right.mean())
    assert apart.low > 0
    assert p < 0.01
    assert estimate(other.macro_means("score")).low < estimate(one.macro_means("score")).high
    same, p = difference(one.macro_means("score"), one.macro_means("score"))
    assert (same.mean, p) == (0.0, 1.0)


def test_other_rows_are_told_apart() -> None:
    made = [Resampled() for _ in range(2)]
    for own, first in zip(made, (0, 1), strict=True):
        own.add(np.arange(first, first + 3), ["s"] * 3, {"score": np.ones(3)})
    assert made[0].same != made[1].same


def test_p_values_are_corrected_by_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
