"""The memory that a training is planned with, against storages that are counted one by one."""

import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2l_ray.config import Training, TrainingWorkers
from s2l_ray.core.model import footprint
from s2l_ray.core.model.architecture import build, load_config
from s2l_ray.core.model.output_layer import training_logits
from s2l_ray.errors import UserError

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500,
}  # fmt: skip
LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def section(config: dict[str, Any], **fields: Any) -> Training:
    return Training(model={"config": config}, tokenizer="bytes", steps=1, **fields)


class Storages(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.freed, key, size)

    def freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_on_fake_tensors_are_those_of_real_ones(checkpointing: bool) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 3, **SMALL}
    model = build(load_config(section(config).model)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids_BL = torch.randint(0, 500, (4, 128))
    with Storages() as storages:
        # Storages of the model are no activations.
        for tensor in [*model.parameters(), *model.buffers()]:
            storages.alive.add(tensor.untyped_storage()._cdata)
        where_M = torch.arange(4 * 127)
        logits_MV = training_logits(model, ids_BL, where_M)
        F.cross_entropy(logits_MV, ids_BL.flatten()[where_M], reduction="sum").backward()
    planned = footprint.activation_bytes(section(config).model, "fp32", 4, 128, checkpointing)
    assert planned == pytest.approx(storages.most, rel=0.05)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_layers_beyond_the_eighth_need_as_much_each(family: str) -> None:
    config = {"model_type": family, "num_hidden_layers": 10, **SMALL}
    if family == "gpt_neox":
        del config["num_key_value_heads"]
    if family == "gemma2":
        config["head_dim"] = 16
    model = section(config).model
    whole = footprint._measured(load_config(model), "bf16", 64, False)
    assert footprint.activation_bytes(model, "bf16", 1, 64) == pytest.approx(whole, rel=0.001)


def test_what_a_gpu_cannot_hold_is_refused_with_settings_that_fit() -> None:
    scaling = TrainingWorkers(gpus=1, accelerator_type="H100", micro_batch=4, workers=8)
    too_much = section(LLAMA_3_8B, max_length=2048, deepspeed="zero3", global_batch=128)
    with pytest.raises(UserError, match=r"an H100 has 73\.1 GiB\. It fits") as refused:
        footprint.check_fits(too_much, scaling, "target")
    assert "if you set scaling.target.activation_checkpointing = true" in str(refused.value)
    enough = scaling.model_copy(update={"activation_checkpointing": True})
    footprint.check_fits(too_much, enough, "target")


def test_what_no_setting_makes_fit_is_refused_too() -> None:
    scaling = TrainingWorkers(gpus=1, accelerator_type="L4", micro_batch=2)
    with pytest.raises(UserError, match=r"would need .* raise scaling\.target\.workers"):
        footprint.check_fits(section(LLAMA_3_8B, max_length=2048), scaling, "target")


def test_a_gpu_that_is_not_known_is_not_judged() -> None:
    scaling = TrainingWorkers(gpus=1, accelerator_type="X1", micro_batch=4)
    footprint.check_fits(section(LLAMA_3_8B), scaling, "target")
