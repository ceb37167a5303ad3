"""Adapters: what is trained and kept, what is exported, and adapters of other models."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from s2l_ray.config import Training, TrainingWorkers
from s2l_ray.core.model.architecture import build, load_config
from s2l_ray.core.model.workers import Worker
from s2l_ray.errors import UserError
from s2l_ray.stages.training.declared import check_training
from tests import one_worker, tiny

CHECKPOINT = "checkpoint/step-000004"
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 260,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 256,
}


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    yield from one_worker.group()


def setup(kind: str = "lora", model: dict[str, Any] | None = None, **fields: Any) -> Any:
    adapter = {"kind": kind, "rank": 4, "alpha": 8, **fields.pop("adapter", {})}
    return one_worker.setup(
        adapter=adapter, model={"config": model or tiny.LLAMA}, learning_rate=3e-2, **fields
    )


def written(files: one_worker.Memory, folder: Path) -> Path:
    """The checkpoint in a folder."""
    for name, data in files.files.items():
        if name.startswith(CHECKPOINT):
            path = folder / name[len(CHECKPOINT) + 1 :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


@pytest.mark.parametrize("model", [tiny.LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_checkpoint_computes_what_peft_does_with_the_adapter(
    alone: Worker, tmp_path: Path, kind: str, model: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    files, training = one_worker.Memory(), setup(kind, model)
    metrics = one_worker.trained(training, alone, files)
    assert len(metrics) == one_worker.STEPS
    folder = written(files, tmp_path)
    merged, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    torch.manual_seed(training.section.seed)
    base = build(load_config(training.section.model), dropout=False)
    ids = torch.arange(1, 40)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert (before - adapted(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_zero_stages_train_an_adapter_alike(alone: Worker, kind: str, deepspeed: str) -> None:
    expected = one_worker.losses(setup(kind), alone)
    assert one_worker.losses(setup(kind, deepspeed=deepspeed), alone) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_a_state_holds_the_adapter_alone_and_is_resumed_from(alone: Worker, deepspeed: str) -> None:
    training = setup("dora", deepspeed=deepspeed, state_every=2)
    torch.manual_seed(1)
    weights = dict(build(load_config(training.section.model)).state_dict())
    whole, died = one_worker.Memory(), one_worker.Memory()
    one_worker.trained(training, alone, whole, load_weight=weights.__getitem__)
    one_worker.trained(training, alone, died, stop_after=3, load_weight=weights.__getitem__)
    state = [load(data) for name, data in died.files.items() if name.endswith(".safetensors")]
    assert state
    assert all(".lora_" in name for file in state for name in file)
    one_worker.trained(training, alone, died, load_weight=weights.__getitem__)
    name = f"{CHECKPOINT}/model.safetensors"
    assert whole.read(name) == died.read(name)
    frozen = load(whole.read(name))["model.embed_tokens.weight"]
    torch.testing.assert_close(frozen, weights["model.embed_tokens.weight"], rtol=0, atol=0)


def test_dropout_in_the_adapter_depends_not_on_micro_batches(alone: Worker) -> None:
    drawn = setup(adapter={"dropout": 0.5})
    one, other = (one_worker.with_scaling(drawn, micro_batch=size) for size in (2, 8))
    expected = one_worker.losses(one, alone)
    assert one_worker.losses(other, alone) == pytest.approx(expected, rel=1e-6)
    assert one_worker.losses(setup(), alone)[-1] != pytest.approx(expected[-1], rel=1e-4)


def test_a_stored_adapter_is_begun_with(alone: Worker, tmp_path: Path) -> None:
    files = one_worker.Memory()
    one_worker.trained(setup(), alone, files)
    written(files, tmp_path)
    fresh = one_worker.losses(setup(), alone)
    begun = one_worker.losses(setup(adapter={"start": str(tmp_path / "adapter")}), alone)
    assert begun[0] < fresh[0] - 0.05


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_an_adapter_of_another_model_is_refused(
    alone: Worker, tmp_path: Path, deepspeed: str
) -> None:
    files = one_worker.Memory()
    one_worker.trained(setup(), alone, files)
    written(files, tmp_path)
    start = str(tmp_path / "adapter")
    for other in (
        setup(model=tiny.GPT_NEOX, adapter={"start": start}, deepspeed=deepspeed),
        setup(adapter={"start": start, "rank": 8}, deepspeed=deepspeed),
    ):
        with pytest.raises(UserError, match="it is one for another model"):
            one_worker.losses(other, alone)
    none = setup(adapter={"start": str(tmp_path)}, deepspeed=deepspeed)
    with pytest.raises(UserError, match=r"Expected a folder of peft"):
        one_worker.losses(none, alone)


def test_layers_that_the_model_has_not_are_refused(alone: Worker) -> None:
    with pytest.raises(UserError, match=r"adding the adapter: .*q_prj.*Correct adapter.modules"):
        one_worker.losses(setup(adapter={"modules": ["q_prj"]}), alone)


def test_only_named_layers_get_an_adapter(alone: Worker) -> None:
    files = one_worker.Memory()
    one_worker.trained(setup(adapter={"modules": ["q_proj"]}), alone, files)
    names = load(files.read(f"{CHECKPOINT}/adapter/adapter_model.safetensors"))
    assert {name.rsplit(".", 3)[1] for name in names} == {"q_proj"}
    settings = json.load(io.BytesIO(files.read(f"{CHECKPOINT}/adapter/adapter_config.json")))
    assert settings["target_modules"] == ["q_proj"]


def planned(kind: str, scaling: dict[str, Any], **fields: Any) -> str:
    section: Training = setup(kind, **fields).section
    with pytest.raises(UserError) as caught:
        check_training([section], TrainingWorkers(micro_batch=4, **scaling), "target")
    return str(caught.value)


def test_four_bits_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scaling.target.gpus is 0" in planned("qlora", {})
    assert "bitsandbytes is not installed" in planned("qlora", {"gpus": 1})
    monkeypatch.setattr("s2l_ray.stages.training.declared.find_spec", lambda name: name)
    assert "cannot be sharded" in planned("qlora", {"gpus": 1}, deepspeed="zero3")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2l_ray.stages.training.declared.find_spec", lambda name: None)
    assert "Install s2l_ray[adapters]" in planned("lora", {})
