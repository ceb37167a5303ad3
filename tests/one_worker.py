"""Trainings of a tiny model in this process, which is their only worker; files lie in memory."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import distributed

from s2l_ray.config import Model, Training, TrainingWorkers
from s2l_ray.core.model.architecture import build, load_config
from s2l_ray.core.model.schedule import TrainingSetup
from s2l_ray.core.model.training import train
from s2l_ray.core.model.workers import Worker
from s2l_ray.core.text.encoding import Encoded
from tests import tiny

STEPS, BATCH = 4, 8


class Memory:
    """Files by path."""

    def __init__(self, files: dict[str, Any] | None = None) -> None:
        files = files or {}
        self.files = {path: json.dumps(value).encode() for path, value in files.items()}

    def read(self, path: str) -> bytes:
        return self.files[path]

    def write(self, path: str, data: bytes) -> None:
        self.files[path] = data

    def list(self, folder: str) -> list[str]:
        below = [path for path in self.files if path.startswith(f"{folder}/")]
        return sorted({path[len(folder) + 1 :].split("/")[0] for path in below})

    def delete(self, folder: str) -> None:
        self.files = {path: v for path, v in self.files.items() if not path.startswith(folder)}


def group() -> Iterator[Worker]:
    """The only worker of a process group; for a fixture."""
    # Other tests of this process may have left theirs.
    is_new = not distributed.is_initialized()
    if is_new:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Worker(0, 1, torch.device("cpu"))
    if is_new:
        distributed.destroy_process_group()


def setup(scaling: dict[str, Any] | None = None, **fields: Any) -> TrainingSetup:
    """A training of STEPS steps; `fields` are those of its section."""
    given: dict[str, Any] = {
        "model": Model(config=tiny.LLAMA),
        "tokenizer": "bytes",
        "steps": STEPS,
        "global_batch": BATCH,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.0,
        "weight_decay": 0.1,
        "dtype": "fp32",
        "seed": 5,
        **fields,
    }
    section = Training(**given)
    workers = TrainingWorkers(**{"micro_batch": 4, **(scaling or {})})
    steps = int(section.steps or 0)
    return TrainingSetup(section, steps, (steps,), workers)


def rows(count: int = STEPS * BATCH, vocabulary: int = 260, longest: int = 24) -> list[Encoded]:
    """Random tokens of several lengths, about half of them learned."""
    draw = np.random.default_rng(0)
    made = []
    for example_id in range(count):
        length = int(draw.integers(3, longest))
        learned = draw.random(length) < 0.5
        learned[:2] = False, True
        ids = draw.integers(1, vocabulary, length).astype(np.int32)
        made.append(Encoded(example_id, ids, learned))
    return made


def trained(
    setup: TrainingSetup,
    worker: Worker,
    files: Memory | None = None,
    stop_after: int | None = None,
    load_weight: Any = None,
    examples: list[Encoded] | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda entry: None,
    preempted: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """The metrics of each step that was taken; `stop_after` steps the machine is lost."""
    made: list[dict[str, float]] = []
    config = load_config(setup.section.model)
    size = setup.section.global_batch
    examples = rows(setup.total_steps * BATCH) if examples is None else examples

    def batches(step: int) -> Iterator[list[Encoded]]:
        for number in range(step, setup.total_steps):
            if number == stop_after:
                raise InterruptedError("the machine is gone")
            batch = examples[number * size : (number + 1) * size]
            yield batch[worker.rank :: worker.world_size]

    with contextlib.suppress(InterruptedError):
        train(
            lambda: build(config, attention=setup.scaling.attention, dropout=False),
            load_weight,
            setup,
            batches,
            Memory() if files is None else files,
            worker,
            lambda entry: (made.append(entry), on_step(entry)),
            preempted,
        )
    return made


def losses(setup: TrainingSetup, worker: Worker, **options: Any) -> list[float]:
    return [entry["loss"] for entry in trained(setup, worker, **options)]


def with_scaling(setup: TrainingSetup, **fields: Any) -> TrainingSetup:
    """The same with other values of scaling."""
    return replace(setup, scaling=setup.scaling.model_copy(update=fields))
