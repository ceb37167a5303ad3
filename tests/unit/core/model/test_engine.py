"""What the engine is told of how to train changes no loss; a training of one worker each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from s2l_ray.core.model import engine
from s2l_ray.core.model.tensors import DTYPES
from s2l_ray.core.model.workers import Worker
from s2l_ray.errors import UserError
from tests import one_worker


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    yield from one_worker.group()


@pytest.fixture(scope="module")
def expected(alone: Worker) -> list[float]:
    return one_worker.losses(one_worker.setup(), alone)


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3", "zero3_offload"])
def test_every_preset_has_the_same_losses(
    alone: Worker, expected: list[float], deepspeed: str
) -> None:
    found = one_worker.losses(one_worker.setup(deepspeed=deepspeed), alone)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_missing_compiler_is_told_before_any_weight_is_read(
    alone: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    settings = engine._settings(one_worker.setup(deepspeed="zero3_offload"), alone, 1)
    with pytest.raises(
        UserError, match=r"(?s)compiling DeepSpeed's AdamW .*needs a C\+\+ compiler"
    ):
        engine._build_operators(settings)


@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3"])
def test_activations_computed_twice_change_neither_losses_nor_norms(
    alone: Worker, deepspeed: str
) -> None:
    plain = one_worker.setup(deepspeed=deepspeed)
    again = one_worker.with_scaling(plain, activation_checkpointing=True)
    found, expected = (one_worker.trained(setup, alone) for setup in (again, plain))
    for name in ("loss", "grad_norm"):
        assert [e[name] for e in found] == pytest.approx([e[name] for e in expected], rel=1e-6)


def test_layers_are_computed_twice_where_that_is_asked_for(
    alone: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, forward = [], LlamaMLP.forward

    def counted(self: LlamaMLP, x: object) -> object:
        calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    plain = one_worker.setup(steps=1)
    counts = []
    for setup in (plain, one_worker.with_scaling(plain, activation_checkpointing=True)):
        calls.clear()
        one_worker.losses(setup, alone)
        counts.append(len(calls))
    layers, passes = 2, 2
    assert counts[1] - counts[0] == layers * passes


def test_every_attention_has_the_same_losses(alone: Worker, expected: list[float]) -> None:
    for attention in ("sdpa", "eager"):
        setup = one_worker.setup({"attention": attention})
        assert one_worker.losses(setup, alone) == pytest.approx(expected, rel=1e-5)


def test_attention_that_is_not_installed_is_refused(alone: Worker) -> None:
    setup = one_worker.setup({"attention": "flash_attention_2"})
    with pytest.raises(UserError, match=r"with attention: flash_attention_2: .*leave out"):
        one_worker.losses(setup, alone)


@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3"])
def test_a_state_in_bf16_is_resumed_from_with_the_same_bits(alone: Worker, deepspeed: str) -> None:
    setup = one_worker.setup(
        deepspeed=deepspeed, dtype="bf16", state_dtype="bf16", state_every=2, learning_rate=1e-2
    )
    whole, died = one_worker.Memory(), one_worker.Memory()
    expected = one_worker.trained(setup, alone, whole)
    one_worker.trained(setup, alone, died, stop_after=3)
    resumed = one_worker.trained(setup, alone, died)
    assert [entry["step"] for entry in resumed] == [3, 4]
    assert [e["loss"] for e in resumed] == [e["loss"] for e in expected[2:]]
    name = "checkpoint/step-000004/model.safetensors"
    assert whole.read(name) == died.read(name)
    full = one_worker.losses(one_worker.setup(dtype="bf16", learning_rate=1e-2), alone)
    assert [e["loss"] for e in expected] == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_master_weights_and_moments_have_the_dtype_that_is_asked_for(
    alone: Worker, monkeypatch: pytest.MonkeyPatch, deepspeed: str, state_dtype: str
) -> None:
    kept = []
    monkeypatch.setattr("s2l_ray.core.model.training.save_checkpoint", lambda *args: None)

    def keep(*args: Any) -> Any:
        kept.append(engine.make_engine(*args, resuming=False))
        return kept[0]

    monkeypatch.setattr(
        "s2l_ray.core.model.training.make_engine", lambda *args, resuming: keep(*args)
    )
    setup = one_worker.setup(
        deepspeed=deepspeed, dtype="bf16", state_dtype=state_dtype, global_batch=4, steps=1
    )
    monkeypatch.setattr("deepspeed.runtime.engine.DeepSpeedEngine.destroy", lambda self: None)
    one_worker.losses(setup, alone)
    optimizer = kept[0].basic_optimizer
    held = [value for group in optimizer.param_groups for value in group["params"]]
    held += [
        moment
        for state in optimizer.state.values()
        for name, moment in state.items()
        if name != "step"
    ]
    assert {value.dtype for value in held} == {DTYPES[state_dtype]}


def test_memory_that_runs_out_is_told_with_the_micro_batch_that_may_fit(
    alone: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("s2l_ray.core.model.training.token_losses", full)
    with pytest.raises(
        UserError,
        match=r"training step 1 with micro-batches of 4 .*micro_batch .* to 2, or set activation",
    ):
        one_worker.losses(one_worker.setup(), alone)
    alone_in_a_pass = one_worker.setup({"micro_batch": 1, "activation_checkpointing": True})
    with pytest.raises(UserError, match=r"One of these helps: choose deepspeed: zero3"):
        one_worker.losses(alone_in_a_pass, alone)
