"""Training state to resume from: every parameter's fp32 weight and its two AdamW moments.

A state depends neither on the number of workers nor on the ZeRO stage that wrote it, so that any
number of workers may resume, under any stage.
"""

import logging
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import distributed

from s2l_ray.core.model.tensor_files import (
    FORMAT,
    Files,
    clear_folder,
    read_json,
    read_verified,
    unusable,
    write_json,
    write_tensors,
)
from s2l_ray.core.model.tensors import full_numel, full_shape
from s2l_ray.core.model.workers import Worker, from_worker
from s2l_ray.errors import UserError

log = logging.getLogger("s2l_ray")
# The newest, and the one before, should the newest be damaged.
STATES_KEPT = 2
# The fp32 weight and AdamW's two moments.
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def save_state(engine: Any, step: int, loss: float, files: Files, worker: Worker) -> None:
    """Write every parameter's weight and moments, then state.json; two states are kept.

    All workers call it together.

    Args:
        engine: a DeepSpeed engine that has taken at least one step.
        step: optimiser steps taken.
        loss: of the last step, for people who look into the file.
    """
    folder = _state_folder(step)
    from_worker(0, worker, lambda: clear_folder(files, folder))
    parameters = trained_parameters(engine)
    sizes = {name: full_numel(parameter) * 4 for name, parameter in parameters.items()}
    _link_moments(engine)
    records = []
    for kind in KINDS:

        def read(name: str, keep: bool, kind: str = kind) -> torch.Tensor | None:
            full = _full(parameters[name], kind)
            return full.detach().to("cpu", torch.float32, copy=True).contiguous() if keep else None

        written, _ = write_tensors(files, folder, kind, sizes, read, worker)
        records += [{"kind": kind, **record} for record in written]
    if worker.rank == 0:
        state = {
            "format": FORMAT,
            "step": step,
            "world_size": worker.world_size,
            "loss": loss,
            "files": records,
        }
        write_json(files, f"{folder}/state.json", state)
        kept = complete_states(files)[:STATES_KEPT]
        for name in files.list("state"):
            if name not in kept:
                files.delete(f"state/{name}")


def trained_parameters(engine: Any) -> dict[str, torch.nn.Parameter]:
    """By name; beside an adapter the model's own weights are not trained."""
    named = engine.module.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def complete_states(files: Files) -> list[str]:
    """Names of the complete training states, the newest first."""
    names = sorted(files.list("state"), reverse=True)
    return [name for name in names if "state.json" in files.list(f"state/{name}")]


def newest_state(files: Files, worker: Worker) -> dict[str, Any] | None:
    """The state.json of the newest complete training state without damage; None: there is no state.

    All workers call it together; each reads a share of the files.

    Raises:
        UserError: there are states, and all of them are damaged.
    """
    damages = []
    for name in from_worker(0, worker, lambda: complete_states(files)):
        found: list[Any] = [None] * worker.world_size
        own: dict[str, Any] | str
        try:
            own = read_state(files, name, worker.rank, worker.world_size)
        except UserError as error:
            own = str(error)
        distributed.all_gather_object(found, own)
        damage = next((each for each in found if isinstance(each, str)), None)
        if damage is None:
            state: dict[str, Any] = found[0]
            return state
        log.warning("going back to the state before: %s", damage)
        damages.append(damage)
    if damages:
        raise UserError(damages[0])
    return None


def read_state(files: Files, name: str, rank: int, world_size: int) -> dict[str, Any]:
    """The state.json of a state, of whose files every `world_size`-th is read and checked.

    Raises:
        UserError: it is of another format, or a file is missing or damaged.
    """
    path = f"state/{name}/state.json"
    state = read_json(files, path)
    if state.get("format") != FORMAT:
        came = state.get("format")
        raise unusable(path, f"format {FORMAT} was expected, {came} came", f"state/{name}")
    if not isinstance(state.get("step"), int) or not isinstance(state.get("files"), list):
        raise unusable(path, "its step or its files are missing", f"state/{name}")
    for record in state["files"][rank::world_size]:
        read_verified(files, f"state/{name}/{record['name']}", record)
    return state


def restore_state(
    engine: Any, state: dict[str, Any], files: Files, worker: Worker, blank_step: Callable[[], None]
) -> None:
    """Load a saved state into a new engine. All workers call it together.

    Args:
        engine: a DeepSpeed engine that has taken no step.
        state: from `newest_state`, the same on every worker.
        blank_step: takes one optimiser step with learning rate 0 and zero gradients. It creates the
            moments, and copies the fp32 weights to those that the model computes with; so weights
            are loaded before it and moments after it.

    Raises:
        UserError: a file is missing or is not the one that state.json names, or the tensors are not
            those of this model.
    """
    parameters = trained_parameters(engine)
    _load_kind("weight", parameters, state, files, worker)
    blank_step()
    _link_moments(engine)
    for kind in KINDS[1:]:
        _load_kind(kind, parameters, state, files, worker)
    for values in engine.basic_optimizer.state.values():
        # DeepSpeed's AdamW for CPUs counts in an int.
        counted = isinstance(values["step"], torch.Tensor)
        values["step"] = values["step"].fill_(state["step"]) if counted else state["step"]


def _load_kind(
    kind: str,
    parameters: dict[str, torch.nn.Parameter],
    state: dict[str, Any],
    files: Files,
    worker: Worker,
) -> None:
    """Load one kind's files; the workers take turns to read one and broadcast its tensors."""
    folder = _state_folder(state["step"])
    missing = {name: full_shape(parameter) for name, parameter in parameters.items()}
    records = [record for record in state["files"] if record["kind"] == kind]
    for number, record in enumerate(records):
        reader = number % worker.world_size
        path = f"{folder}/{record['name']}"
        tensors: dict[str, torch.Tensor] = {}

        def read(
            path: str = path, record: dict[str, Any] = record, tensors: dict = tensors
        ) -> list[tuple[str, tuple]]:
            tensors.update(safetensors.torch.load(read_verified(files, path, record)))
            return [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]

        for name, shape in from_worker(reader, worker, read):
            if missing.get(name) != shape:
                known = name in missing
                expected = (
                    f"shape {missing[name]}" if known else "no such tensor, or it came before"
                )
                what = f"it holds {name!r} with shape {shape}, this model has {expected}"
                raise unusable(path, what, folder)
            value = tensors.pop(name) if worker.rank == reader else None
            set_full(parameters[name], value, kind, reader, worker)
            del missing[name]
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise unusable(folder, f"no {kind} of {names} ({len(missing)} in all)", folder)


def _link_moments(engine: Any) -> None:
    """Let ZeRO 1 and 2 find the moments of all groups of parameters.

    DeepSpeed 0.19 links them once, after the step of the first group, when others have none yet.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _full(parameter: Any, kind: str) -> torch.Tensor:
    """The full fp32 tensor; a collective call under ZeRO."""
    from deepspeed import utils

    if kind == "weight":
        return utils.safe_get_full_fp32_param(parameter)
    return utils.safe_get_full_optimizer_state(parameter, kind)


def set_full(
    parameter: Any, value: torch.Tensor | None, kind: str, source: int, worker: Worker
) -> None:
    """Put a full fp32 tensor, which worker `source` has, where ZeRO keeps it, a part a worker.

    All workers call it together.
    """
    from deepspeed import utils

    shape, device = full_shape(parameter), worker.device
    value = torch.empty(shape, device=device) if value is None else value.to(device)
    distributed.broadcast(value, src=source)
    if not hasattr(parameter, "ds_id"):
        if kind == "weight":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        return
    # Under ZeRO-3 the library's own safe_set_full_* fails where the last worker's part is padded,
    # so the part is cut here.
    size = parameter.ds_tensor.numel()
    part = value.new_zeros(size)
    own = value.flatten()[worker.rank * size : (worker.rank + 1) * size]
    part[: own.numel()] = own
    if kind == "weight":
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, kind)


def _state_folder(step: int) -> str:
    return f"state/step-{step:09d}"
