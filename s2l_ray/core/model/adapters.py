"""Low-rank adapters (LoRA, DoRA, QLoRA) of peft: put into a model, merged for export, and stored.

Only their weights are trained. The model keeps its class, and a layer with an adapter keeps its own
weight in `base_layer`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from s2l_ray.config import Adapter, Model
from s2l_ray.core.model.places import local_folder
from s2l_ray.core.model.tensors import full_shape, stored_tensors
from s2l_ray.errors import UserError

# Under which peft knows a model's only adapter.
NAME = "default"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_adapter(module: Any, adapter: Adapter, device: torch.device) -> None:
    """Freeze a model's weights and put an adapter beside its layers, drawn by torch's generator.

    Raises:
        UserError: the model has no layers of the names that are to be adapted.
    """
    from peft import inject_adapter_in_model
    from transformers.integrations import HfDeepSpeedConfig

    if adapter.kind == "qlora":
        _quantize(module, device)
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    # By this object, while it lives, peft knows that ZeRO-3 must gather a weight to measure it.
    sharded = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}) if is_sharded else None
    try:
        inject_adapter_in_model(_peft_config(adapter, None), module)
    except ValueError as error:
        raise UserError(
            f"adding the adapter: {error} Correct adapter.modules, or leave it out for all linear "
            "layers."
        ) from None
    del sharded
    module.to(device)


def _peft_config(adapter: Adapter, base: str | None) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules=list(adapter.modules) or "all-linear",
    )


def _quantize(module: Any, device: torch.device) -> None:
    """Store the weights of all linear layers but the output layer in 4 bits (NF4)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    module.is_loaded_in_4bit = True
    for name, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear or layer is module.get_output_embeddings():
            continue
        made = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
        )
        made.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        made.bias = layer.bias
        # Its way to the GPU is what quantizes it.
        module.set_submodule(name, made.to(device))


def adapter_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the adapter, under the names that peft's files give them."""
    return {
        f"base_model.model.{name}".replace(f".{NAME}", ""): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def adapter_files(
    module: nn.Module, adapter: Adapter, base: str | None
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files that peft loads an adapter from. All workers call it."""
    from deepspeed.runtime.zero import GatheredParameters

    weights = adapter_weights(module)
    with GatheredParameters(list(weights.values())):
        held = {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in weights.items()
        }
    yield WEIGHTS, safetensors.torch.save(held, metadata={"format": "pt"})
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in _peft_config(adapter, base).to_dict().items()
    }
    yield CONFIG, json.dumps({**settings, "inference_mode": True}, indent=1, default=str).encode()


def check_adapter(module: nn.Module, start: str, model: Model) -> dict[str, torch.Tensor]:
    """The weights of a stored adapter, by their names in peft's files.

    Raises:
        UserError: it is none of this model.
    """
    folder = local_folder(start)
    try:
        settings = json.loads((Path(folder) / CONFIG).read_bytes())
        stored = safetensors.torch.load_file(f"{folder}/{WEIGHTS}")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"reading the adapter {start}: {error}. Expected a folder of peft with {CONFIG} and "
            f"{WEIGHTS}; correct adapter.start."
        ) from None
    expected = {name: full_shape(value) for name, value in adapter_weights(module).items()}
    came = {name: tuple(value.shape) for name, value in stored.items()}
    wrong = sorted(name for name in {*expected, *came} if expected.get(name) != came.get(name))
    if wrong:
        own = model.path or model.hub or "the model of model.config"
        raise UserError(
            f"reading the adapter {start}: it is one for another model "
            f"({settings.get('base_model_name_or_path')}) or of another form than {own} has here: "
            f"{wrong[0]} was expected with shape {expected.get(wrong[0])} and came with "
            f"{came.get(wrong[0])}. Correct adapter.start, or rank, kind and modules."
        )
    return stored


# ------------------------------------------------------------------------------------------ export


@dataclass(frozen=True)
class Export:
    """A tensor to store: what must be whole for it, its shape and dtype, and how it is made."""

    parts: list[torch.Tensor]
    like: torch.Tensor
    make: Callable[[], torch.Tensor]


def exports(module: nn.Module) -> dict[str, Export]:
    """The tensors that a checkpoint stores by name, adapters merged into the weights they adapt."""
    found = {}
    adapters = {parameter for name, parameter in module.named_parameters() if ".lora_" in name}
    for name, tensor in stored_tensors(module).items():
        if tensor in adapters or ".lora_" in name or ".quant_" in name:
            continue
        path, base, last = name.rpartition(".base_layer.")
        if not base:
            found[name] = Export([tensor], tensor, lambda tensor=tensor: tensor)  # type: ignore[misc]
        elif last == "weight":
            layer: Any = module.get_submodule(path)
            like = torch.empty(_shape(layer), dtype=tensor.dtype, device="meta")
            parts = list(layer.parameters())
            found[f"{path}.weight"] = Export(parts, like, lambda layer=layer: _merged(layer))  # type: ignore[misc]
        elif last == "bias":
            found[f"{path}.bias"] = Export([tensor], tensor, lambda tensor=tensor: tensor)  # type: ignore[misc]
    return found


def _shape(layer: Any) -> tuple[int, ...]:
    """Of a layer's weight, which 4 bits store in another."""
    base = layer.get_base_layer()
    is_quantized = hasattr(base.weight, "quant_state")
    return (base.out_features, base.in_features) if is_quantized else full_shape(base.weight)


def _merged(layer: Any) -> torch.Tensor:
    """W + s B A in fp32; for DoRA its rows are scaled to the learned lengths (Liu et al. 2024)."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
    weight = weight + layer.get_delta_weight(NAME).detach().float()
    if NAME not in getattr(layer, "lora_magnitude_vector", {}):
        return weight
    rows = weight.T if layer.fan_in_fan_out else weight
    lengths = layer.lora_magnitude_vector[NAME].weight.detach().float()
    rows = rows * (lengths / rows.norm(dim=1)).unsqueeze(1)
    return rows.T if layer.fan_in_fan_out else rows
