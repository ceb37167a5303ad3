"""A model that is larger than one GPU, layer by layer over several of one worker."""

from typing import Any

import torch
from torch import nn

from s2l_ray.errors import UserError


def spread(model: Any, gpus: int) -> Any:
    """The model on the worker's first GPUs, between which hidden states travel.

    Inputs and logits are on the first one. (accelerate moves what a layer is given to its GPU.)

    Raises:
        UserError: a GPU has too little memory for its share.
    """
    from accelerate import dispatch_model

    places = layout(model, gpus)
    free = [torch.cuda.mem_get_info(number)[0] for number in range(gpus)]
    check_room(model, places, free)
    return dispatch_model(model, places)


def layout(model: nn.Module, gpus: int) -> dict[str, int]:
    """Module -> GPU: the layers in order, about equal shares of bytes; all else on the first.

    With embeddings, last norm and output layer on one GPU, losses are taken on that one.
    """
    name, layers = _layers(model)
    sizes = [_bytes(layer) for layer in layers]
    beside = _bytes(model) - sum(sizes)
    share = (beside + sum(sizes)) / gpus
    places, filled = {}, float(beside)
    for number, size in enumerate(sizes):
        # A layer is where most of it lies, of the GPUs' shares laid end to end.
        places[f"{name}.{number}"] = min(gpus - 1, int((filled + size / 2) / share))
        filled += size
    return {**_others(model, name), **places}


def check_room(model: nn.Module, places: dict[str, int], free: list[int]) -> None:
    """Refuse a layout of which a GPU cannot hold its share."""
    modules = dict(model.named_modules())
    for number, room in enumerate(free):
        parts = [_bytes(modules[name]) for name, place in places.items() if place == number]
        if sum(parts) > room:
            raise UserError(
                f"loading the target for evaluation: GPU {number} of {len(free)} would hold "
                f"{sum(parts) / 2**30:,.1f} GiB of it, and {room / 2**30:,.1f} GiB are free. Raise "
                "scaling.evaluation.gpus, or set target.dtype: bf16."
            )


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of layers: the largest of the model's lists."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UserError(
            f"loading the target for evaluation: {type(model).__name__} has no list of layers to "
            "divide. Set scaling.evaluation.gpus to 1."
        )
    return max(lists, key=lambda entry: _bytes(entry[1]))


def _others(model: nn.Module, layers: str) -> dict[str, int]:
    """Every module beside the list of layers and what holds it, on the first GPU."""
    above = {layers.rpartition(".")[0], layers}
    while (outer := min(above, key=len)) != "":
        above.add(outer.rpartition(".")[0])
    return {
        name: 0
        for name, _ in model.named_modules()
        if name not in above and name.rpartition(".")[0] in above - {layers}
    }


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
