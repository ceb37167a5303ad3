"""Learning rates, checkpoint steps and gradient accumulation of a training section."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.config import Model, Training, TrainingWorkers
from s2l_ray.core.model.schedule import (
    TrainingSetup,
    accumulation,
    checkpoint_steps,
    learning_rate_at,
)
from s2l_ray.errors import UserError
from tests import tiny

SECTION = Training(
    model=Model(config=tiny.LLAMA),
    tokenizer="bytes",
    steps=40,
    global_batch=8,
    learning_rate=2e-5,
)
SETUP = TrainingSetup(
    SECTION, total_steps=40, checkpoint_steps=(40,), scaling=TrainingWorkers(micro_batch=2)
)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.26])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_learning_rates_are_those_of_transformers(schedule: str, warmup: float) -> None:
    from transformers import get_scheduler

    section = SECTION.model_copy(update={"schedule": schedule, "warmup_ratio": warmup})
    setup = replace(SETUP, section=section)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.learning_rate)
    warmup_steps = int(np.ceil(setup.total_steps * warmup))
    scheduler = get_scheduler(schedule, optimizer, warmup_steps, setup.total_steps)
    for step in range(setup.total_steps):
        assert learning_rate_at(step, setup) == pytest.approx(
            scheduler.get_last_lr()[0], rel=1e-12, abs=1e-20
        )
        optimizer.step()
        scheduler.step()


@given(st.integers(1, 10_000), st.integers(1, 200))
def test_checkpoint_steps_are_distinct_and_end_at_the_end(total: int, count: int) -> None:
    if count > total:
        with pytest.raises(UserError, match="fewer checkpoints"):
            checkpoint_steps(total, count)
        return
    steps = checkpoint_steps(total, count)
    assert len(set(steps)) == len(steps) == count
    assert steps == tuple(sorted(steps))
    assert steps[-1] == total
    assert all(abs(step - i * total / count) <= 0.5 for i, step in enumerate(steps, 1))


def test_checkpoint_steps_of_an_uneven_number() -> None:
    assert checkpoint_steps(10, 4) == (3, 5, 8, 10)


def test_accumulation_divides_or_says_so() -> None:
    assert accumulation(SETUP, 2) == 2
    with pytest.raises(
        UserError, match="8 examples cannot be cut into equal micro-batches of 2 on 3 workers"
    ):
        accumulation(SETUP, 3)
