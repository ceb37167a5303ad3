"""Packed rows: none sees another, and the losses are those of rows by themselves."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.config import TrainingWorkers
from s2l_ray.core.model import losses
from s2l_ray.core.model.lookahead import check_packing
from s2l_ray.core.model.losses import token_losses
from s2l_ray.core.model.workers import Worker
from s2l_ray.core.text.batching import pack, packed_batches
from s2l_ray.core.text.encoding import Encoded
from s2l_ray.errors import UserError
from s2l_ray.stages.training.declared import check_training
from tests import one_worker
from tests.families import examples, model

PACKABLE = ["gpt_neox", "gpt2", "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma2"]


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    yield from one_worker.group()


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", PACKABLE)
def test_a_packed_row_has_the_losses_that_it_has_alone(family: str, attention: str | None) -> None:
    made = model(family)
    if attention is not None:
        made.set_attn_implementation(attention)
    rows = [row for row in examples(0) if row.learned.any()][:6]
    ids, learned, positions = (torch.from_numpy(array) for array in pack(rows))
    with torch.no_grad():
        found = token_losses(made, ids, learned, positions)
        expected = torch.cat(
            [
                token_losses(
                    made,
                    torch.from_numpy(row.input_ids[None].astype(np.int64)),
                    torch.from_numpy(row.learned[None]),
                )
                for row in rows
            ]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    check_packing(made, "cpu", family)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_family_without_positions_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"the rows of a pack would see each other"):
        check_packing(model(family), "cpu", family)


@given(st.lists(st.integers(2, 30), max_size=40), st.integers(30, 90))
def test_packs_hold_every_row_once_and_few_gaps(lengths: list[int], budget: int) -> None:
    rows = [
        Encoded(number, np.zeros(length, np.int32), np.ones(length, np.bool_))
        for number, length in enumerate(lengths)
    ]
    packs = packed_batches(rows, budget)
    assert sorted(row.example_id for batch in packs for row in batch) == list(range(len(rows)))
    filled = [sum(len(row.input_ids) for row in batch) for batch in packs]
    assert all(tokens <= budget for tokens in filled)
    # No two of them could be one.
    assert all(a + b > budget for n, a in enumerate(filled) for b in filled[n + 1 :])


@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3"])
def test_a_training_on_packed_rows_has_the_same_losses(alone: Worker, deepspeed: str) -> None:
    plain = one_worker.setup(deepspeed=deepspeed, max_length=32)
    packed = one_worker.with_scaling(plain, packing=True, micro_batch=2)
    again = one_worker.with_scaling(packed, activation_checkpointing=True)
    expected = one_worker.losses(plain, alone)
    assert one_worker.losses(packed, alone) == pytest.approx(expected, rel=1e-5)
    assert one_worker.losses(again, alone) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_losses_of_a_few_positions_at_a_time_are_the_same(
    alone: Worker, monkeypatch: pytest.MonkeyPatch, deepspeed: str
) -> None:
    setup = one_worker.setup(deepspeed=deepspeed)
    expected = one_worker.losses(setup, alone)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 260 * 5)
    assert one_worker.losses(setup, alone) == pytest.approx(expected, rel=1e-6)


def test_dropout_and_packing_exclude_each_other() -> None:
    section = one_worker.setup(dropout=True).section
    with pytest.raises(UserError, match=r"scaling.target.packing .* Choose one of them"):
        check_training([section], TrainingWorkers(packing=True, micro_batch=8), "target")
