"""What a training tells of its steps, stored in files of bounded size, over several lives of the run."""

import json
from pathlib import Path

from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from s2l_ray.stages.training.make import STEPS_PER_FILE, _Metrics, _Place


def live(place: _Place, first: int, last: int, loss: float) -> None:
    with _Metrics(place, state_every=100) as metrics:
        for step in range(first, last + 1):
            metrics.step({"step": step, "loss": loss, "seconds": 0.5})


def test_every_step_counts_once_and_the_later_life_wins(tmp_path: Path) -> None:
    place = _Place(Artifact(Store(str(tmp_path)), "proxy", "p"), "member-0/")
    assert place.latest() == {"step": 0}
    live(place, 1, 2550, 1.0)
    live(place, 2501, 3600, 2.0)  # from the state of step 2,500
    metrics = place.metrics()
    assert [entry["step"] for entry in metrics] == list(range(1, 3601))
    assert [entry["loss"] for entry in metrics] == [1.0] * 2500 + [2.0] * 1100
    latest = place.latest()
    assert (latest["step"], latest["loss"]) == (3600, 2.0)
    sizes = [len(place.read(f"metrics/{name}")) for name in place.list("metrics")]
    longest = max(len(json.dumps(entry)) for entry in metrics)
    assert max(sizes) <= (STEPS_PER_FILE + 1) * (longest + len(", "))
