"""What is derived from a training section before the first step: learning rates, steps, batches."""

import math
from dataclasses import dataclass

from s2l_ray.config import Config, Training, TrainingWorkers, Validation
from s2l_ray.core.text.encoding import Encoded
from s2l_ray.errors import UserError


@dataclass(frozen=True)
class TrainingSetup:
    """A training section and what is derived from it, from the data and from the workers.

    Attributes:
        section: everything else that decides what is learned.
        total_steps: optimiser steps.
        checkpoint_steps: at how many steps taken a checkpoint is made; 0: of the initial weights.
        scaling: how its workers go about it.
        validation: when held-out rows are looked at.
        held_out: these rows.
    """

    section: Training
    total_steps: int
    checkpoint_steps: tuple[int, ...]
    scaling: TrainingWorkers
    validation: Validation | None = None
    held_out: tuple[Encoded, ...] = ()

    @property
    def micro_batch(self) -> int:
        """Examples of one worker in one forward pass."""
        return self.scaling.micro_batch_of(self.section)


def learning_rate_at(step: int, setup: TrainingSetup) -> float:
    """Learning rate of the step taken after `step` steps, by the schedules of transformers.

    Linear warm-up from 0 over ceil(total_steps * warmup_ratio) steps, then what `schedule` names:
    a decay to 0, or the same rate to the end. `constant` has no warm-up.
    """
    section, total_steps = setup.section, setup.total_steps
    if section.schedule == "constant":
        return section.learning_rate
    warmup = math.ceil(total_steps * section.warmup_ratio)
    if step < warmup:
        return section.learning_rate * step / warmup
    if section.schedule == "constant_with_warmup":
        return section.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    linear = section.schedule == "linear"
    left = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
    return section.learning_rate * max(0.0, left)


def checkpoint_steps(total_steps: int, count: int) -> tuple[int, ...]:
    """`count` evenly spaced steps: i * total_steps / count, rounded half up, for i = 1..count.

    Raises:
        UserError: more checkpoints than steps.
    """
    if not 1 <= count <= total_steps:
        raise UserError(
            f"Planning the checkpoints of a training: {count} checkpoints were asked for, and "
            f"{total_steps} steps allow 1 to {total_steps}. Ask for fewer checkpoints, or train "
            "for more epochs or with a smaller batch."
        )
    return tuple((2 * i * total_steps + count) // (2 * count) for i in range(1, count + 1))


def stored_steps(config: Config, rows: int) -> list[list[int]]:
    """The steps of each proxy that trajectories will have, step 0 first.

    None at all where they cannot be known before the work: of a proxy that is used, and of epochs
    over rows that may be rejected.

    Args:
        rows: of the raw files.
    """
    if config.proxy.use is not None:
        return []
    made = []
    for section in config.proxy.each():
        if section.steps is None and config.examples.on_bad_row == "reject":
            return []
        total = section.steps or -(-rows * int(section.epochs or 0) // section.global_batch)
        if 1 <= section.checkpoints <= total:
            made.append([0, *checkpoint_steps(total, section.checkpoints)])
    return made


def accumulation(setup: TrainingSetup, world_size: int) -> int:
    """Forward passes of a worker in a step: global_batch / world_size / micro_batch.

    Raises:
        UserError: this is not a whole number.
    """
    global_batch, of_all_workers = setup.section.global_batch, world_size * setup.micro_batch
    if global_batch % of_all_workers:
        raise UserError(
            f"Preparing a training: a global batch of {global_batch} examples cannot be cut into "
            f"equal micro-batches of {setup.micro_batch} on {world_size} workers. Choose a batch "
            f"that is a multiple of {of_all_workers}, a smaller micro-batch, or another number of "
            "workers."
        )
    return global_batch // of_all_workers
