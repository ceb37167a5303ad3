"""What shifted losses change."""

import numpy as np
import pytest

from s2l_ray.config import Clusters
from s2l_ray.core.fidelity import shifts
from s2l_ray.core.storage.info import ClustersInfo
from tests.committed import info_with, manifest


def test_a_shift_names_its_place_and_the_rows_that_move() -> None:
    losses = np.array([[1.0, 2.0], [0.001, 3.0], [5.0, 6.0]], np.float32)
    other = losses.copy()
    other[1, 0] += 0.02
    other[2, 1] -= 0.5
    found = shifts.shift(losses, other, np.array([0, 1, 2]), np.array([0, 2, 2]))
    assert (found.row, found.column, found.moved) == (2, 1, 1)
    assert found.absolute == pytest.approx(0.5)
    assert found.relative == pytest.approx(2.0, rel=1e-5), "small losses count as 0.01"


def test_rows_go_to_the_nearest_centroid_that_serves_their_source() -> None:
    section, steps = Clusters(k=2), [[0, 0], [0, 5], [0, 9]]
    centroids = [[1, 1], [4, 4], [1.1, 1.1]]
    infos = [
        info_with(ClustersInfo, centroids=centroids, cluster_sources=sources)
        for sources in (["a", "a", "b"], [None] * 3)
    ]
    own, shared = (manifest("clusters", info=info) for info in infos)
    grouping = shifts.committed_grouping(own, steps, section)
    losses = np.array([[9, 1, 1.1], [9, 1, 1.1], [0, 5, 5], [0, 5, 5]], np.float32)
    assert grouping.labels(losses, ["a", "b", "a", "b"]).tolist() == [0, 2, 1, 2]
    assert shifts.committed_grouping(shared, steps, section).labels(
        losses, ["a", "b", "a", "b"]
    ).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("rows", "distinct", "k", "expected"),
    [(40, 40, 5, 5), (40, 40, 100, 10), (40, 3, 100, 3), (2, 2, 100, 1)],
)
def test_without_committed_clusters_the_rows_make_their_own(
    rows: int, distinct: int, k: int, expected: int
) -> None:
    draw = np.random.default_rng(0)
    losses = draw.normal(3, 1, (distinct, 3))[np.arange(rows) % distinct].astype(np.float32)
    for steps, complete in (([[0, 0], [0, 5], [0, 9]], True), ([[0, 0], [0, 7], [0, 9]], False)):
        section = Clusters(
            k=k, features="differences" if complete else "raw", steps=None if complete else [5, 9]
        )
        grouping = shifts.fresh_grouping(losses, np.arange(rows), steps, section, complete)
        assert f"{len(grouping.centroids)} clusters of these rows alone" == grouping.origin
        assert len(grouping.centroids) == expected
        assert (
            np.bincount(grouping.labels(losses, ["s"] * rows), minlength=len(grouping.centroids))
            > 0
        ).all()
