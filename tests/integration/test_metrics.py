"""The metrics of a training's steps: stored in files of bounded size, over several attempts."""

import json
from pathlib import Path

from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from s2l_ray.stages.training.metrics import (
    STEPS_PER_FILE,
    MetricsWriter,
    latest_metrics,
    read_metrics,
)
from s2l_ray.stages.training.place import Place


def attempt(place: Place, first: int, last: int, loss: float) -> None:
    with MetricsWriter(place) as metrics:
        for step in range(first, last + 1):
            metrics.step({"step": step, "loss": loss, "seconds": 0.5, "state": step % 100 == 0})


def test_every_step_counts_once_and_the_later_attempt_wins(tmp_path: Path) -> None:
    place = Place(Artifact(Store(str(tmp_path)), "proxy", "p"), "member-0/")
    assert latest_metrics(place) == {"step": 0}
    attempt(place, 1, 2550, 1.0)
    # from the state of step 2,500
    attempt(place, 2501, 3600, 2.0)
    metrics = read_metrics(place)
    assert [entry["step"] for entry in metrics] == list(range(1, 3601))
    assert [entry["loss"] for entry in metrics] == [1.0] * 2500 + [2.0] * 1100
    latest = latest_metrics(place)
    assert (latest["step"], latest["loss"]) == (3600, 2.0)
    sizes = [len(place.read(f"metrics/{name}")) for name in place.list("metrics")]
    longest = max(len(json.dumps(entry)) for entry in metrics)
    assert max(sizes) <= (STEPS_PER_FILE + 1) * (longest + len(", "))
