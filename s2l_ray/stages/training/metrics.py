"""The metrics of a training's steps: its first worker stores them, they are read at any time."""

import json
import time
from collections.abc import Sequence

from s2l_ray.core.storage.info import Curve, TrainingInfo
from s2l_ray.stages.training.place import Place

SECONDS_BETWEEN_WRITES = 5.0
STEPS_PER_FILE = 1_000
CURVE_POINTS = 2_000


class MetricsWriter:
    """Collects the metrics of every step and stores them every few seconds; only rank 0 gets any.

    They are stored before each training state too, so that a training that resumes from a state has
    the metrics of every step before it.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.entries: list[dict[str, float]] = []
        self.stored = time.monotonic()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._store()

    def step(self, entry: dict[str, float]) -> None:
        self.entries.append({**entry, "began": time.time() - entry["seconds"]})
        late = time.monotonic() - self.stored > SECONDS_BETWEEN_WRITES
        if late or entry["state"]:
            self._store()

    def _store(self) -> None:
        if self.entries:
            self.stored = time.monotonic()
            self.place.write(
                f"metrics/from-{int(self.entries[0]['step']):08d}.json",
                json.dumps(self.entries).encode(),
            )
        # what is written every few seconds must not grow with the training
        if len(self.entries) >= STEPS_PER_FILE:
            self.entries = []


def read_metrics(place: Place) -> Sequence[dict[str, float]]:
    """One entry a step; where two attempts did the same step, the later one counts."""
    by_step: dict[int, dict[str, float]] = {}
    for name in place.list("metrics"):
        by_step.update(
            {int(entry["step"]): entry for entry in json.loads(place.read(f"metrics/{name}"))}
        )
    return [by_step[step] for step in sorted(by_step)]


def latest_metrics(place: Place) -> dict[str, float]:
    """The metrics of the last step that were stored; of step 0 before any."""
    names = place.list("metrics")
    return json.loads(place.read(f"metrics/{names[-1]}"))[-1] if names else {"step": 0}


def training_info(
    metrics: Sequence[dict[str, float]], total_steps: int, examples: int
) -> TrainingInfo:
    """Size, cost and curve of a training from the metrics of all its steps.

    `flops` is 6 * parameters * tokens: forward and backward pass (Kaplan et al. 2020, section 2.1).
    """
    thin = metrics[:: max(1, len(metrics) // CURVE_POINTS)]
    size = int(metrics[-1].get("parameters", 0)) if metrics else 0
    tokens = sum(int(entry["tokens"]) for entry in metrics)
    return TrainingInfo(
        total_steps=total_steps,
        examples=examples,
        tokens=tokens,
        parameters=size or None,
        flops=6.0 * size * tokens if size else None,
        train_seconds=round(sum(entry["seconds"] for entry in metrics), 3),
        wait_seconds=round(sum(entry["wait_seconds"] for entry in metrics), 3),
        curve=Curve(
            step=[int(entry["step"]) for entry in thin],
            loss=[round(entry["loss"], 6) for entry in thin],
            learning_rate=[round(entry["learning_rate"], 6) for entry in thin],
        ),
    )
