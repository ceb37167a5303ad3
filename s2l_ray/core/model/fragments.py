"""The elements of master weights and moments that this worker holds, under each ZeRO stage.

ZeRO 1 and 2 cut all parameters together into equal parts for the workers, ZeRO-3 each parameter by
itself. A fragment is what a worker holds of one tensor: a range of its flattened elements.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import distributed

from s2l_ray.core.model.tensors import full_shape
from s2l_ray.core.model.workers import Worker

# The master weight and AdamW's two moments.
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements start to stop, all inside the tensor or padding, of one kind of a parameter.

    Attributes:
        values: 1-D; on the worker's device, where changes count, or a copy of it.
        put: makes changes of `values` count where they are not in place.
    """

    kind: str
    name: str
    start: int
    values: torch.Tensor
    put: Callable[[], None] = field(default=lambda: None)

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def address(self) -> tuple[str, str, int, int]:
        """What a list of files says of it."""
        return self.kind, self.name, self.start, self.stop

    def copied(self) -> "Fragment":
        """The same on the CPU; the training goes on with the original."""
        return replace(self, values=self.values.detach().to("cpu", copy=True), put=lambda: None)

    def overlap(self, start: int, stop: int) -> bool:
        return start < self.stop and self.start < stop

    def fill(self, start: int, values: torch.Tensor) -> int:
        """Take over the elements that both have, from a fragment that begins at `start`."""
        first, last = max(start, self.start), min(start + values.numel(), self.stop)
        own = self.values[first - self.start : last - self.start]
        own.copy_(values[first - start : last - start])
        return last - first


def fragments(engine: Any, worker: Worker, kinds: Sequence[str] = KINDS) -> Iterator[Fragment]:
    """All fragments of this worker; moments are there after the first step."""
    link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        for kind in kinds:
            found = (
                _of_one(parameter, name, kind, worker)
                if hasattr(parameter, "ds_id")
                else _of_all(parameter, name, kind)
            )
            if found is not None and found.values.numel():
                yield found


def _of_one(parameter: Any, name: str, kind: str, worker: Worker) -> Fragment | None:
    """Under ZeRO-3; without the padding of the last part."""
    from deepspeed import utils

    size, start = parameter.ds_tensor.numel(), worker.rank * parameter.ds_tensor.numel()
    if kind == "weight":
        held = utils.safe_get_local_fp32_param(parameter)
    else:
        held = utils.safe_get_local_optimizer_state(parameter, kind)

    def put() -> None:
        if kind == "weight":
            utils.safe_set_local_fp32_param(parameter, held)
        else:
            utils.safe_set_local_optimizer_state(parameter, held, kind)

    held = held.detach()
    inside = max(0, min(size, parameter.ds_numel - start))
    return Fragment(kind, name, start, held[:inside], put)


def _of_all(parameter: Any, name: str, kind: str) -> Fragment | None:
    """Under ZeRO 1 and 2; None where other workers hold all of it."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    held = mapping.get_hp_fragment(None if kind == "weight" else kind).detach()
    return Fragment(kind, name, mapping.lp_fragment_address.start, held)


def link_moments(engine: Any) -> None:
    """Let ZeRO 1 and 2 find the moments of all groups of parameters.

    DeepSpeed 0.19 links them once, after the step of the first group, when others have none yet.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked") and engine.basic_optimizer.state:
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def set_full(parameter: Any, value: torch.Tensor | None, source: int, worker: Worker) -> None:
    """Put a full fp32 weight, which worker `source` has, where ZeRO keeps it, a part a worker.

    All workers call it together.
    """
    device = worker.device
    whole = torch.empty(full_shape(parameter), device=device) if value is None else value.to(device)
    distributed.broadcast(whole, src=source)
    if hasattr(parameter, "ds_id"):
        found = _of_one(parameter, "", "weight", worker)
    else:
        found = _of_all(parameter, "", "weight")
    if found is not None:
        found.fill(0, whole.flatten())
        found.put()
