"""Training state to resume from: of every trained parameter the master weight and AdamW's moments.

Every worker writes the parts of tensors that it holds, at the same time as the others and without
them, while the training goes on: it stops for a copy alone. A state is complete once each worker's
list of files is there. It says which elements of which tensor a part has, so any number of workers
may resume, under any ZeRO stage; each reads only what it will hold.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import safetensors.torch
import torch
from torch import distributed

from s2l_ray.core.model.fragments import KINDS, Fragment, fragments, link_moments
from s2l_ray.core.model.tensor_files import (
    FILE_BYTES,
    Files,
    clear_folder,
    read_json,
    read_verified,
    unusable,
    write_file,
    write_json,
)
from s2l_ray.core.model.tensors import full_shape
from s2l_ray.core.model.workers import Worker, from_worker
from s2l_ray.errors import UserError

log = logging.getLogger("s2l_ray")
# Of what a state consists of; a state of another format is not read.
FORMAT = 2
# The newest, and the one before, should the newest be damaged.
STATES_KEPT = 2


class StateWriter:
    """Writes the states of a training in the background, one at a time; ends with the `with`."""

    def __init__(self, files: Files, worker: Worker) -> None:
        self.files, self.worker = files, worker
        self._thread = ThreadPoolExecutor(1, "training state")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the last state; where the training failed, that failure counts."""
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise
            log.warning("the last training state could not be written", exc_info=True)
        finally:
            self._thread.shutdown()

    def wait(self) -> None:
        """Until the last state is written; raises what its writing raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def save(self, engine: Any, step: int, loss: float) -> None:
        """Copy this worker's part, and begin to write it. All workers call it together.

        Args:
            engine: a DeepSpeed engine that has taken at least one step.
            step: optimiser steps taken.
            loss: of the last step, for people who look into the file.
        """
        self.wait()
        folder = state_folder(step)
        from_worker(0, self.worker, lambda: clear_folder(self.files, folder))
        copies = [each.copied() for each in fragments(engine, self.worker)]
        part = {
            "format": FORMAT,
            "step": step,
            "loss": loss,
            "shapes": {name: full_shape(p) for name, p in trained_parameters(engine).items()},
        }
        self._writing = self._thread.submit(self._write, folder, copies, part)

    def _write(self, folder: str, copies: list[Fragment], part: dict[str, Any]) -> None:
        rank, records = self.worker.rank, []
        for number, group in enumerate(_groups(copies)):
            held = {f"{each.kind}@{each.start}@{each.name}": each.values for each in group}
            name = f"{rank:05d}-{number:05d}.safetensors"
            record = write_file(self.files, folder, name, safetensors.torch.save(held))
            records.append({**record, "fragments": [each.address for each in group]})
        part["files"] = records
        write_json(self.files, f"{folder}/{_list_name(rank, self.worker.world_size)}", part)
        if rank == 0:
            kept = complete_states(self.files)[:STATES_KEPT]
            for name in self.files.list("state"):
                # One that is newer is still being written, here or by another worker.
                if kept and name < kept[-1]:
                    self.files.delete(f"state/{name}")


def _groups(copies: Sequence[Fragment]) -> Iterator[list[Fragment]]:
    """Fragments of about a file each."""
    group: list[Fragment] = []
    room = FILE_BYTES
    for each in copies:
        size = each.values.nbytes
        if group and size > room:
            yield group
            group, room = [], FILE_BYTES
        group.append(each)
        room -= size
    if group:
        yield group


def state_folder(step: int) -> str:
    return f"state/step-{step:09d}"


def _list_name(rank: int, world_size: int) -> str:
    return f"part-{rank:05d}-of-{world_size:05d}.json"


def trained_parameters(engine: Any) -> dict[str, torch.nn.Parameter]:
    """By name; beside an adapter the model's own weights are not trained."""
    named = engine.module.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


# ----------------------------------------------------------------------------------------- reading


def complete_states(files: Files) -> list[str]:
    """Names of the complete training states, the newest first."""
    names = sorted(files.list("state"), reverse=True)
    return [name for name in names if _lists(files, name)]


def _lists(files: Files, name: str) -> list[str]:
    """The lists of all workers that wrote a state; none where one is missing."""
    found = sorted(each for each in files.list(f"state/{name}") if each.startswith("part-"))
    wanted = [_list_name(rank, len(found)) for rank in range(len(found))]
    return found if found == wanted else []


def newest_state(files: Files, worker: Worker) -> dict[str, Any] | None:
    """The newest complete training state without damage; None: there is no state.

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
    """The lists of a state as one, of whose files every `world_size`-th is read and checked.

    Raises:
        UserError: it is of another format, or a file is missing or damaged.
    """
    folder = f"state/{name}"
    whole: dict[str, Any] = {}
    for each in _lists(files, name):
        path = f"{folder}/{each}"
        part = read_json(files, path)
        if part.get("format") != FORMAT:
            came = part.get("format")
            raise unusable(path, f"format {FORMAT} was expected, {came} came", folder)
        if not isinstance(part.get("step"), int) or not isinstance(part.get("files"), list):
            raise unusable(path, "its step or its files are missing", folder)
        whole.setdefault("step", part["step"])
        whole.setdefault("shapes", {}).update(part.get("shapes", {}))
        whole.setdefault("files", []).extend(part["files"])
    for record in whole["files"][rank::world_size]:
        read_verified(files, f"{folder}/{record['name']}", record)
    return whole


def restore_state(
    engine: Any, state: dict[str, Any], files: Files, worker: Worker, blank_step: Callable[[], None]
) -> None:
    """Load a saved state into a new engine. All workers call it together.

    Args:
        engine: a DeepSpeed engine that has taken no step.
        state: from `newest_state`, the same on every worker.
        blank_step: takes one optimiser step with learning rate 0 and zero gradients. It creates the
            moments, and copies the master weights to those that the model computes with; so
            weights are loaded before it and moments after it.

    Raises:
        UserError: a file is missing or is not the one that was written, or the tensors are not
            those of this model.
    """
    _check_shapes(engine, state)
    _load(engine, state, KINDS[:1], files, worker)
    blank_step()
    link_moments(engine)
    _load(engine, state, KINDS[1:], files, worker)
    for values in engine.basic_optimizer.state.values():
        # DeepSpeed's AdamW for CPUs counts in an int.
        counted = isinstance(values["step"], torch.Tensor)
        values["step"] = values["step"].fill_(state["step"]) if counted else state["step"]


def _check_shapes(engine: Any, state: dict[str, Any]) -> None:
    folder, parameters = state_folder(state["step"]), trained_parameters(engine)
    written = {name: tuple(shape) for name, shape in state["shapes"].items()}
    for name, shape in written.items():
        if name not in parameters or full_shape(parameters[name]) != shape:
            has = f"shape {full_shape(parameters[name])}" if name in parameters else "none"
            what = f"it holds {name!r} with shape {shape}, this model has {has}"
            raise unusable(folder, what, folder)
    missing = sorted(set(parameters) - set(written))
    if missing:
        named = ", ".join(missing[:3])
        raise unusable(folder, f"it has nothing of {named} ({len(missing)} in all)", folder)


def _load(
    engine: Any, state: dict[str, Any], kinds: Sequence[str], files: Files, worker: Worker
) -> None:
    """Fill what this worker holds from the files that have some of it."""
    folder = state_folder(state["step"])
    own = {(each.kind, each.name): each for each in fragments(engine, worker, kinds)}
    filled = dict.fromkeys(own, 0)
    for record in state["files"]:
        wanted = [
            (kind, name, start)
            for kind, name, start, stop in record["fragments"]
            if (kind, name) in own and own[kind, name].overlap(start, stop)
        ]
        if not wanted:
            continue
        path = f"{folder}/{record['name']}"
        tensors = safetensors.torch.load(read_verified(files, path, record))
        for kind, name, start in wanted:
            values = tensors.pop(f"{kind}@{start}@{name}")
            filled[kind, name] += own[kind, name].fill(start, values)
    for (kind, name), each in own.items():
        if filled[kind, name] != each.values.numel():
            raise unusable(folder, f"no {kind} of some elements of {name}", folder)
        each.put()
