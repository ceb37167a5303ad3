"""A model's tensors in full, whether this process holds them whole or ZeRO-3 has cut them up."""

from collections.abc import Iterable

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stored_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter once, tied ones under their first name, then the state dict's buffers."""
    stored = module.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in module.named_buffers() if name in stored}
    return {**dict(module.named_parameters()), **buffers}


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def full_numel(tensor: torch.Tensor) -> int:
    """Number of elements of the whole tensor."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def total_numel(parameters: Iterable[torch.Tensor]) -> int:
    """Number of elements of all parameters."""
    return sum(full_numel(parameter) for parameter in parameters)
