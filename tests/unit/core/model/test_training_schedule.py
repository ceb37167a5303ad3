"""The pure parts of training: learning rates, checkpoint steps, micro-batches, shares of tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.core.model.state import plan_shards
from s2l_ray.core.model.training import (
    Encoded,
    TrainingPlan,
    _micro_batches,
    accumulation,
    checkpoint_steps,
    learning_rate_at,
)
from s2l_ray.errors import UserError

PLAN = TrainingPlan(
    total_steps=40, checkpoint_steps=(40,), global_batch=8, micro_batch=2, learning_rate=2e-5
)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.26])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule: str, warmup: float) -> None:
    from transformers import get_scheduler

    plan = replace(PLAN, schedule=schedule, warmup_ratio=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    warmup_steps = int(np.ceil(plan.total_steps * warmup))
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, warmup_steps, plan.total_steps)
    for step in range(plan.total_steps):
        assert learning_rate_at(step, plan) == pytest.approx(
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
    assert accumulation(PLAN, 2) == 2
    with pytest.raises(
        UserError, match="8 examples cannot be cut into equal micro-batches of 2 on 3 workers"
    ):
        accumulation(PLAN, 3)


def test_micro_batches_hold_useful_examples_of_similar_length_and_fill_up_with_empty_ones() -> None:
    def example(example_id: int, length: int, useful: bool = True) -> Encoded:
        learned = np.zeros(length, np.bool_)
        learned[-1] = useful
        return Encoded(example_id, np.arange(length, dtype=np.int32), learned)

    share = [
        example(0, 9),
        example(1, 3),
        example(2, 5, useful=False),
        example(3, 8),
        example(4, 3),
    ]
    cut = _micro_batches(share, 2, 3)
    assert [[e.example_id for e in batch] for batch in cut] == [[1, 4], [3, 0], []]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 60))
def test_shards_hold_every_tensor_once_in_order_and_within_the_limit(
    sizes: list[int], workers: int, limit: int
) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    shards = plan_shards(named, workers, limit)
    assert [name for shard in shards for name in shard.names] == list(named)
    ranks = [shard.rank for shard in shards]
    assert ranks == sorted(ranks)
    assert set(ranks) <= set(range(workers))
    for shard in shards:
        assert len(shard.names) == 1 or sum(named[name] for name in shard.names) <= limit
    for rank in range(workers):
        share = sum(named[name] for shard in shards if shard.rank == rank for name in shard.names)
        assert share < sum(sizes) / workers + max(sizes)
