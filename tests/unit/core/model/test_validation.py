"""Held-out rows during a training: what is measured, what is kept, and when it stops."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from s2l_ray.config import Validation
from s2l_ray.core.model.architecture import build
from s2l_ray.core.model.checkpoint import checkpoint_files
from s2l_ray.core.model.loading import load_weights, read_weights
from s2l_ray.core.model.losses import token_losses
from s2l_ray.core.model.schedule import TrainingSetup
from s2l_ray.core.model.training import kept_steps
from s2l_ray.core.model.validation import history, last_step
from s2l_ray.core.model.workers import Worker
from tests import one_worker, tiny

ROWS = tuple(one_worker.rows(13)[5:])


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    yield from one_worker.group()


def setup(every: int = 1, patience: int | None = None, **fields: Any) -> TrainingSetup:
    made = one_worker.setup(**fields)
    return replace(made, validation=Validation(every=every, patience=patience), held_out=ROWS)


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_the_held_out_loss_is_that_of_the_checkpoint(alone: Worker, deepspeed: str) -> None:
    files = one_worker.Memory()
    metrics = one_worker.trained(setup(every=3, deepspeed=deepspeed), alone, files)
    assert sorted(history(files)) == [3, 4]
    assert [entry.get("held_out_loss") for entry in metrics[2:]] == list(history(files).values())
    folder = "checkpoint/step-000004"
    weights = read_weights(
        lambda name: files.read(f"{folder}/{name}"), files.list(folder), "the checkpoint"
    )
    model = build(AutoConfig.for_model(**tiny.LLAMA)).eval()
    load_weights(model, weights, "the checkpoint")
    with torch.no_grad():
        losses = torch.cat(
            [
                token_losses(
                    model,
                    torch.from_numpy(row.input_ids[None].astype(np.int64)),
                    torch.from_numpy(row.learned[None]),
                )
                for row in ROWS
            ]
        )
    assert history(files)[4] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_looking_changes_no_step(alone: Worker) -> None:
    expected = one_worker.losses(one_worker.setup(), alone)
    assert one_worker.losses(setup(), alone) == expected


def test_the_best_checkpoint_stays_beside_the_last(
    alone: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr("s2l_ray.core.model.validation.held_out_loss", lambda *args: next(measured))
    files, training = one_worker.Memory(), setup()
    one_worker.trained(training, alone, files)
    assert kept_steps(training, files) == [2, 4]
    assert files.list("checkpoint") == ["step-000002", "step-000004"]


def test_a_training_stops_after_enough_looks_without_a_better_one(
    alone: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([3.0, 2.0, 2.5, 2.2, 2.1, 1.0])
    monkeypatch.setattr("s2l_ray.core.model.validation.held_out_loss", lambda *args: next(measured))
    files, training = one_worker.Memory(), setup(patience=2, steps=6)
    assert len(one_worker.trained(training, alone, files)) == 4
    assert kept_steps(training, files) == [2, 4]
    assert all(checkpoint_files(files, step) is not None for step in (2, 4))
    assert one_worker.trained(training, alone, files) == []


def test_a_resumed_training_knows_what_was_measured_before(
    alone: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([1.0, 2.0, 2.5, 0.5, 0.4])
    monkeypatch.setattr("s2l_ray.core.model.validation.held_out_loss", lambda *args: next(measured))
    files, training = one_worker.Memory(), setup(patience=3, steps=6, state_every=2)
    one_worker.trained(training, alone, files, stop_after=3)
    # Step 3 is measured again, with another result; the looks after it do not count yet.
    again = one_worker.trained(training, alone, files, stop_after=4)
    assert [entry["step"] for entry in again] == [3, 4]
    assert list(history(files).values()) == [1.0, 2.0, 0.5, 0.4]
    assert files.list("checkpoint") == ["step-000004"]


@pytest.mark.parametrize(
    ("losses", "patience", "last"),
    [
        ([3, 2, 1], 1, 9),
        ([3, 2, 2], 1, 3),
        ([3, 4, 2, 2, 2], 2, 5),
        ([3, 4, 5, 6], None, 9),
    ],
)
def test_patience_counts_looks_since_the_best(
    losses: list[float], patience: int | None, last: int
) -> None:
    training = replace(setup(patience=patience), total_steps=9)
    assert last_step(dict(enumerate(losses, 1)), training) == last
