"""What of k-means is stored between rounds, and read again."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from s2l_ray.core.kmeans.state import FitState, Round
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.records import to_bytes
from s2l_ray.core.storage.store import Store
from s2l_ray.stages.clusters.make import _saved_states, state_name


def test_a_saved_state_that_cannot_be_read_is_told_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = Artifact(Store(str(tmp_path)), "clusters", "f")
    work: Any = SimpleNamespace(label="clusters f", artifact=artifact)
    centroids = np.array([[0.1, -1e-30], [3e38, 2.5]], np.float32)
    state = FitState(centroids, centroids[::-1], (Round(0.1, (3, 4), 7, 0.25, 0),))
    artifact.write(state_name("a"), to_bytes(state))
    artifact.write(state_name("b"), to_bytes(state)[:-9])
    artifact.write(state_name("c"), b'{"centroids": [[1.0]], "source": "c"}')
    with caplog.at_level(logging.INFO, "s2l_ray"):
        (saved,) = _saved_states(work, ["a", "b", "c", "d"]).items()
    assert saved[0] == "a"
    np.testing.assert_array_equal(saved[1].centroids, centroids)
    np.testing.assert_array_equal(saved[1].previous, centroids[::-1])
    assert saved[1].centroids.dtype == np.float32
    assert saved[1].history == state.history
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "clusters f of a",
        "clusters f of b",
        "clusters f of c",
    ]
    assert "begins anew" in caplog.messages[1]
    assert "begins anew" in caplog.messages[2]
