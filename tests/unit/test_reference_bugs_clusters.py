"""Mistakes of the published S2L code in clusters, each with a test that it is not made here."""

import numpy as np
import pytest

from s2l_ray.config import Clusters
from s2l_ray.core.kmeans.features import check_finite, feature_steps, features
from s2l_ray.core.kmeans.process_rows import HeldRows
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.kmeans.sources import fit_source
from s2l_ray.core.query import ask_here
from s2l_ray.errors import UserError

STEPS = [[0, 500 * number] for number in range(13)]


def losses(rows: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(0, 1, (rows, len(STEPS))).astype(np.float32)


@pytest.mark.parametrize("count", range(1, 13))
def test_bug_9_checkpoints_in_the_order_of_an_unsorted_glob(count: int) -> None:
    """Columns are found by step number, so their order changes neither bits nor kept steps."""
    section, rows = Clusters(steps=count), losses(50)
    order = np.random.default_rng(count).permutation(len(STEPS))
    shuffled = [STEPS[column] for column in order]
    assert (
        feature_steps(shuffled, section)
        == feature_steps(STEPS, section)
        == sorted(feature_steps(STEPS, section))
    )
    assert (
        features(rows[:, order], shuffled, section).tobytes()
        == features(rows, STEPS, section).tobytes()
    )


@pytest.mark.parametrize("count", range(1, 13))
def test_bug_10_thinning_keeps_more_than_asked(count: int) -> None:
    """Every (12, n) keeps exactly n steps, the last among them.

    The published code keeps 6 of 12 for n = 5, and 12 for n = 7 or 8.
    """
    kept = [step for _, step in feature_steps(STEPS, Clusters(steps=count))]
    assert len(kept) == len(set(kept)) == count
    assert kept[-1] == 6000
    assert features(losses(4), STEPS, Clusters(steps=count)).shape == (4, count)


@pytest.mark.parametrize("size", [1, 5, 99])
def test_bug_12_a_source_with_fewer_points_than_k(size: int) -> None:
    """FAISS fails there; here such a source has one cluster a row, and the others have k."""
    rows = np.concatenate([losses(400), losses(size) + 3])[:, 1:]
    sources = np.repeat([0, 1], [400, size])
    held = HeldRows([(np.arange(len(rows)), rows, sources)])
    section = Clusters(
        k=100, within="source", max_rounds=20, tolerance=0.0, points_per_centroid=256
    )
    found = [fit_source(ask_here(held), source, section) for source in (0, 1)]
    assert [len(each.centroids) for each in found] == [100, size]
    assert found[1].sizes.tolist() == [1] * size


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_difference_3_nan_becomes_zero(bad: float) -> None:
    """A non-finite loss stops the run with its example, and makes no "very easy" cluster."""
    rows = losses(9)
    rows[4, 7] = bad
    with pytest.raises(UserError, match="example_id 4 at step 3500"):
        check_finite(np.arange(9), rows, STEPS)
    for kind in ("raw", "centred", "differences", "zscored", "relative"):
        made = features(rows, STEPS, Clusters(features=kind))
        with pytest.raises(UserError, match="for example_id 4 "):
            Shard([(np.arange(9), made)])
