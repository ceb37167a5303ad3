"""Held-out loss during a training: the best checkpoint is kept, and a training may stop early.

Every measurement is a file of the artifact, so that a training that resumes knows those before it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from s2l_ray.core.model.losses import token_losses
from s2l_ray.core.model.micro_batches import micro_batches, tensors
from s2l_ray.core.model.schedule import TrainingSetup
from s2l_ray.core.model.tensor_files import Files, read_json, write_json
from s2l_ray.core.model.workers import Worker, from_worker

FOLDER = "validation"


@dataclass(frozen=True)
class Judgement:
    """What a measurement means.

    Attributes:
        loss: mean over the learned tokens of the held-out rows; None: it was not measured.
        is_best: no measurement before it was lower.
        stops: there were enough measurements without a better one.
        worse: step of a checkpoint that was the best until now, and is of no use any more.
    """

    loss: float | None = None
    is_best: bool = False
    stops: bool = False
    worse: int | None = None


def validate(
    engine: Any, step: int, setup: TrainingSetup, files: Files, worker: Worker
) -> Judgement:
    """Measure, and store what came. All workers call it together."""
    loss = held_out_loss(engine, setup, worker)

    def judge() -> Judgement:
        before = {at: own for at, own in history(files).items() if at < step}
        write_json(files, f"{FOLDER}/step-{step:09d}.json", {"step": step, "loss": loss})
        best = best_step(before)
        is_best = best is None or loss < before[best]
        needed = best if is_best and best not in setup.checkpoint_steps else None
        stops = last_step({**before, step: loss}, setup) == step < setup.total_steps
        return Judgement(loss, is_best, stops, needed)

    judged: Judgement = from_worker(0, worker, judge)
    return judged


def history(files: Files) -> dict[int, float]:
    """Step -> held-out loss of all measurements."""
    found = (read_json(files, f"{FOLDER}/{name}") for name in sorted(files.list(FOLDER)))
    return {each["step"]: each["loss"] for each in found}


def best_step(measured: dict[int, float]) -> int | None:
    """The step of the lowest held-out loss, the first of equals; None where none was measured."""
    return min(measured, key=lambda step: (measured[step], step), default=None)


def last_step(measured: dict[int, float], setup: TrainingSetup) -> int:
    """The step at which measurements end a training, or else its last."""
    assert setup.validation is not None
    patience, best, since = setup.validation.patience, float("inf"), 0
    for step, loss in sorted(measured.items()):
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if patience is not None and since >= patience:
            return step
    return setup.total_steps


def held_out_loss(engine: Any, setup: TrainingSetup, worker: Worker) -> float:
    """Mean loss of the learned tokens of all held-out rows. All workers call it together."""
    rows = setup.held_out
    share = rows[worker.rank :: worker.world_size]
    most = -(-len(rows) // worker.world_size)
    passes = -(-most // setup.micro_batch)
    total = torch.zeros(2, dtype=torch.float64, device=worker.device)
    engine.module.eval()
    with torch.no_grad():
        for batch in micro_batches(share, setup.micro_batch, passes):
            losses = token_losses(engine, *tensors(batch, setup, worker.device))
            if batch:
                total += torch.stack([losses.double().sum(), total.new_tensor(len(losses))])
    engine.module.train()
    if worker.world_size > 1:
        distributed.all_reduce(total)
    return float(total[0] / total[1])
