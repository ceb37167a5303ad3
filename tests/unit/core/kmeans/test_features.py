"""Features of trajectories against plain numpy, their invariances, and hostile rows."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from s2l_ray.config import Clusters
from s2l_ray.core.kmeans.features import AXES, check_finite, feature_steps, features
from s2l_ray.errors import UserError

STEPS = [[member, step] for member in (0, 1) for step in (0, 4, 8, 12, 16)]
KINDS = ("raw", "centred", "differences", "zscored", "relative")


def section(**fields: Any) -> Clusters:
    return Clusters.model_validate(fields)


def losses(rows: int, seed: int = 0, columns: int = len(STEPS)) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, (rows, columns)).astype(np.float32)


def plain(row: np.ndarray, kind: str) -> np.ndarray:
    """One member's chosen losses, in float64, as the definitions say."""
    x = row.astype(np.float64)
    if kind == "centred":
        return x - x.mean()
    if kind == "differences":
        return np.diff(x)
    if kind == "zscored":
        return (x - x.mean()) / x.std() if x.std() > 0 else np.zeros(len(x))
    if kind == "relative":
        first = max(abs(x[0]), np.abs(x).max() / 1024)
        return x / first if first > 0 else np.ones(len(x))
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("initial", [False, True])
def test_features_are_those_of_plain_numpy_row_by_row(kind: str, initial: bool) -> None:
    rows = losses(200)
    made = features(rows, STEPS, section(features=kind, initial=initial))
    first = 0 if initial else 1
    expected = [
        np.concatenate([plain(row[first:5], kind), plain(row[5 + first :], kind)]) for row in rows
    ]
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, np.array(expected), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_go_with_the_columns(kind: str) -> None:
    rows = np.tile([step + 100 * member + 1.0 for member, step in STEPS], (2, 1)).astype(np.float32)
    made = section(features=kind, steps=[16, 4, 12])
    labels = feature_steps(STEPS, made)
    later = [[0, 12], [0, 16], [1, 12], [1, 16]]
    assert labels == (later if kind == "differences" else sorted([*later, [0, 4], [1, 4]]))
    assert features(rows, STEPS, made).shape == (2, len(labels))
    if kind == "raw":
        assert features(rows, STEPS, made)[0].tolist() == [
            step + 100 * member + 1 for member, step in labels
        ]


@pytest.mark.parametrize("count", range(1, 13))
def test_evenly_spaced_steps_end_with_the_last(count: int) -> None:
    stored = [[0, 10 * step] for step in range(13)]
    steps = [step for _, step in feature_steps(stored, section(steps=count))]
    assert len(steps) == count
    assert steps[-1] == 120
    gaps = np.diff([0, *steps])
    assert gaps.max() - gaps.min() <= 10
    if count > 1:
        begun = [step for _, step in feature_steps(stored, section(steps=count, initial=True))]
        assert (len(begun), begun[0], begun[-1]) == (count, 0, 120)


def test_members_of_different_lengths_are_thinned_by_their_own_steps() -> None:
    stored = [[0, 0], [0, 5], [0, 10], [1, 0], [1, 2], [1, 4], [1, 6], [1, 8]]
    assert feature_steps(stored, section(steps=2)) == [[0, 5], [0, 10], [1, 4], [1, 8]]
    assert feature_steps(stored, section()) == [[0, 5], [0, 10], [1, 2], [1, 4], [1, 6], [1, 8]]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": [4, 5]}, r"no step 5; it has 0, 4, 8, 12, 16"),
        ({"steps": 5}, r"leaves 5 steps .* proxy number 0 .* has 4 of them"),
        ({"steps": 6, "initial": True}, r"leaves 5 steps"),
        (
            {"steps": [8], "features": "zscored"},
            r"zscored needs at least 2 steps of every proxy, got 1",
        ),
        ({"steps": [8], "features": "differences"}, r"needs at least 2 steps"),
        (
            {"weights": [1.0, 2.0]},
            r"clusters.weights has 2 numbers, but there are 8 feature columns, step 4 of proxy 0",
        ),
        ({"features": "differences", "weights": [1.0] * 8}, r"has 8 numbers, but there are 6"),
    ],
)
def test_what_cannot_be_made_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        features(losses(3), STEPS, section(**fields))


def test_a_step_that_one_member_lacks_is_refused() -> None:
    stored = [[0, 0], [0, 5], [0, 10], [1, 0], [1, 5], [1, 15]]
    assert feature_steps(stored, section(steps=[5])) == [[0, 5], [1, 5]]
    with pytest.raises(
        UserError, match=r"proxy number 1 \(from 0\) has no step 10; it has 0, 5, 15"
    ):
        feature_steps(stored, section(steps=[5, 10]))
    with pytest.raises(UserError, match="has no step 0; it has 5, 10"):
        feature_steps([[0, 5], [0, 10]], section(initial=True))


def test_weights_weigh_squared_distances() -> None:
    rows, weights = losses(50), [0.0, 0.25, 1.0, 4.0, 9.0, 0.5, 2.0, 3.0]
    bare, weighted = (
        features(rows, STEPS, section(features="centred", **w)).astype(np.float64)
        for w in ({}, {"weights": weights})
    )
    expected = ((bare[:, None] - bare) ** 2 * weights).sum(axis=2)
    np.testing.assert_allclose(
        ((weighted[:, None] - weighted) ** 2).sum(axis=2), expected, rtol=1e-5, atol=1e-10
    )
    assert (weighted[:, 0] == 0).all()


# -------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_depend_neither_on_order_nor_on_the_cut(kind: str) -> None:
    rows, made = losses(1000), section(features=kind, initial=True, weights=None)
    whole = features(rows, STEPS, made)
    order = np.random.default_rng(1).permutation(1000)
    assert features(rows[order], STEPS, made).tobytes() == whole[order].tobytes()
    assert features(np.asfortranarray(rows), STEPS, made).tobytes() == whole.tobytes()
    for start, stop in ((0, 1), (1, 8), (8, 511), (511, 1000), (1000, 1000)):
        assert features(rows[start:stop], STEPS, made).tobytes() == whole[start:stop].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_found_by_their_labels(kind: str) -> None:
    rows, made = losses(100), section(features=kind, steps=3)
    order = np.random.default_rng(2).permutation(len(STEPS))
    shuffled = [STEPS[column] for column in order]
    assert feature_steps(shuffled, made) == feature_steps(STEPS, made)
    assert (
        features(rows[:, order], shuffled, made).tobytes() == features(rows, STEPS, made).tobytes()
    )


@pytest.mark.parametrize(
    ("kind", "change", "exact"),
    [
        ("centred", lambda rows: rows + 1, False),
        ("differences", lambda rows: rows + 1, True),
        ("relative", lambda rows: rows * 8, True),
        ("zscored", lambda rows: rows * 8 + 1, False),
    ],
)
def test_what_a_feature_leaves_out_does_not_matter(kind: str, change: Any, exact: bool) -> None:
    rows = np.random.default_rng(3).integers(1, 4096, (300, len(STEPS))).astype(np.float32)
    before, after = (features(each, STEPS, section(features=kind)) for each in (rows, change(rows)))
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-4)
    assert (after.tobytes() == before.tobytes()) or not exact
    assert not np.allclose(
        features(change(rows), STEPS, section()), features(rows, STEPS, section())
    )


# ------------------------------------------------------------------------------------- hostile rows


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 0.1, 3.3, 1e30, 3.4e38])
def test_constant_rows(value: float) -> None:
    rows = np.full((2, len(STEPS)), value, np.float32)
    for kind, expected in (("centred", 0), ("differences", 0), ("zscored", 0), ("relative", 1)):
        assert (features(rows, STEPS, section(features=kind)) == expected).all(), kind


HOSTILE = arrays(
    np.float32,
    (3, len(STEPS)),
    elements=st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=True),
)


@given(HOSTILE, st.sampled_from(KINDS), st.booleans())
@settings(max_examples=200)
def test_any_finite_row_gives_finite_features(rows: np.ndarray, kind: str, initial: bool) -> None:
    made = features(rows, STEPS, section(features=kind, initial=initial))
    assert np.isfinite(made).all()
    if kind == "relative":
        assert np.abs(made).max() <= 1024
    if kind == "zscored":
        assert np.abs(made).max() <= len(STEPS) ** 0.5


def test_a_tiny_first_loss_is_bounded_by_the_largest() -> None:
    rows = np.array([[9, 0, 1, 2, 4], [9, 1e-45, 0, 0, 1], [9, 2, 1, 1, 4]], np.float32)
    made = features(rows, STEPS[:5], section(features="relative"))
    assert made.tolist() == [
        [0, 256, 512, 1024],
        [pytest.approx(0, abs=1e-40), 0, 0, 1024],
        [1, 0.5, 0.5, 2],
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_are_named(bad: float) -> None:
    rows = losses(9)
    check_finite(np.arange(9), rows, STEPS)
    rows[4, 7] = bad
    with pytest.raises(
        UserError, match=f"got {bad} for example_id 104 at step 8 of proxy number 1"
    ):
        check_finite(np.arange(100, 109), rows, STEPS)


def test_every_kind_has_its_words() -> None:
    kinds = Clusters.model_fields["features"].annotation.__args__  # type: ignore[union-attr]
    assert set(AXES) == set(kinds) == set(KINDS)
