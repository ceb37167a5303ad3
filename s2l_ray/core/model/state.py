"""Makes two kinds of folders from a model in training: checkpoints that Hugging Face loads, and training
state to resume from.

Every worker writes its own share of the tensors as safetensors, one tensor is gathered at a time, and worker
0 writes one JSON file last, which alone makes the folder complete (design, invariants 2 and 3). Both depend
neither on the number of workers nor on the ZeRO stage that wrote them.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import distributed

from s2l_ray.errors import UserError

FORMAT = 1
FILE_BYTES = 1 << 30  # a worker holds one file of tensors in memory while it writes or reads it
KINDS = ("weight", "exp_avg", "exp_avg_sq")  # the fp32 weight and AdamW's two moments
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Files(Protocol):
    """Where the bytes go: paths are relative to the artifact, a write is atomic, a folder that is not there
    lists as empty."""

    def write(self, path: str, data: bytes) -> None: ...
    def read(self, path: str) -> bytes: ...
    def list(self, folder: str) -> Sequence[str]: ...
    def delete(self, folder: str) -> None: ...


@dataclass(frozen=True)
class Worker:
    """This process's place among the workers, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Shard:
    """The tensors of one file and the worker that writes it."""

    rank: int
    names: tuple[str, ...]


def plan_shards(sizes: dict[str, int], world_size: int, limit: int = FILE_BYTES) -> list[Shard]:
    """Cut the tensors, in order, into files of at most `limit` bytes, each worker owning about the same
    number of bytes.

    A tensor belongs to the worker in whose share of all bytes it begins; one above the limit has a file of
    its own.
    """
    total = max(sum(sizes.values()), 1)
    shards: list[Shard] = []
    before = room = 0
    for name, size in sizes.items():
        rank = min(before * world_size // total, world_size - 1)
        if not shards or shards[-1].rank != rank or size > room:
            shards.append(Shard(rank, ()))
            room = limit
        shards[-1] = Shard(rank, (*shards[-1].names, name))
        before, room = before + size, room - size
    return shards


# ------------------------------------------------------------------------------------------------ checkpoints


def checkpoint_folder(step: int) -> str:
    """Folder of the checkpoint of a step, relative to the artifact."""
    return f"checkpoint/step-{step:06d}"


def checkpoint_files(files: Files, step: int) -> list[dict[str, Any]] | None:
    """Files of a complete checkpoint, [{"name" (inside its folder), "bytes", "sha256"}]; None if incomplete."""
    folder = checkpoint_folder(step)
    if "files.json" not in files.list(folder):
        return None
    return _json_object(files, f"{folder}/files.json")["files"]


def save_checkpoint(
    module: torch.nn.Module, step: int, dtype: str, files: Files, worker: Worker
) -> None:
    """Write the weights in `dtype` and config.json as a folder that `from_pretrained` loads. All workers call
    it together.

    A checkpoint that is complete already, written by an earlier life of this run, stays as it is.
    """
    folder = checkpoint_folder(step)
    if not from_worker(
        0, worker, lambda: _begin(files, folder, keep=checkpoint_files(files, step) is not None)
    ):
        return
    tensors = stored_tensors(module)
    sizes = {name: _numel(tensor) * DTYPES[dtype].itemsize for name, tensor in tensors.items()}

    def read(name: str, keep: bool) -> torch.Tensor | None:
        from deepspeed.runtime.zero import GatheredParameters

        tensor = tensors[name]
        with GatheredParameters([tensor]):
            if not keep:
                return None
            floating = tensor.is_floating_point()
            return (
                tensor.detach()
                .to("cpu", DTYPES[dtype] if floating else tensor.dtype, copy=True)
                .contiguous()
            )

    records, names_of = _write_tensors(files, folder, "model", sizes, read, worker)
    if worker.rank == 0:
        texts = {"config.json": _config_json(module, dtype)}
        if len(names_of) > 1:
            weight_map = {name: file for file, names in names_of.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            texts["model.safetensors.index.json"] = json.dumps(index, indent=1)
        records += [_write(files, folder, name, text.encode()) for name, text in texts.items()]
        done = {"format": FORMAT, "step": step, "files": records}
        files.write(f"{folder}/files.json", json.dumps(done, indent=1).encode())


def stored_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter once, tied ones under their first name, then the buffers that the model's own state
    dict would hold."""
    stored = module.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in module.named_buffers() if name in stored}
    return {**dict(module.named_parameters()), **buffers}


def _config_json(module: torch.nn.Module, dtype: str) -> str:
    config: Any = copy.deepcopy(module.config)
    config.dtype = DTYPES[dtype]
    config.architectures = [type(module).__name__]
    return config.to_json_string()


# ------------------------------------------------------------------------------------------------------ state


def save_state(engine: Any, step: int, loss: float, files: Files, worker: Worker) -> None:
    """Write every parameter's fp32 weight and AdamW moments, then state.json; then delete older states. All
    workers together.

    Args:
        engine: the DeepSpeed engine, at least one step old.
        step: optimisation steps taken.
        loss: of the last step, for people who look into the file.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    folder = _state_folder(step)
    from_worker(0, worker, lambda: _begin(files, folder))
    parameters = dict(engine.module.named_parameters())
    sizes = {name: _numel(parameter) * 4 for name, parameter in parameters.items()}
    records = []
    for kind in KINDS:

        def read(name: str, keep: bool, kind: str = kind) -> torch.Tensor | None:
            parameter = parameters[name]
            full = (
                safe_get_full_fp32_param(parameter)
                if kind == "weight"
                else safe_get_full_optimizer_state(parameter, kind)
            )
            return full.detach().to("cpu", torch.float32, copy=True).contiguous() if keep else None

        written, _ = _write_tensors(files, folder, kind, sizes, read, worker)
        records += [{"kind": kind, **record} for record in written]
    if worker.rank == 0:
        state = {
            "format": FORMAT,
            "step": step,
            "world_size": worker.world_size,
            "loss": loss,
            "files": records,
        }
        files.write(f"{folder}/state.json", json.dumps(state, indent=1).encode())
        for name in files.list("state"):
            if f"state/{name}" != folder:
                files.delete(f"state/{name}")


def newest_state(files: Files) -> dict[str, Any] | None:
    """The newest complete training state, as its state.json says; None when there is none. One without
    state.json is no state."""
    for name in sorted(files.list("state"), reverse=True):
        if "state.json" in files.list(f"state/{name}"):
            state = _json_object(files, f"state/{name}/state.json")
            if state.get("format") != FORMAT:
                raise _broken(
                    f"state/{name}/state.json",
                    f"format {FORMAT} was expected, {state.get('format')} came",
                    "state",
                )
            return state
    return None


def restore_state(
    engine: Any, state: dict[str, Any], files: Files, worker: Worker, blank_step: Callable[[], None]
) -> None:
    """Put a saved state into a new engine, whatever number of workers and ZeRO stage wrote it. All workers
    together.

    Args:
        engine: a DeepSpeed engine that has not stepped.
        state: from `newest_state`, the same on every worker.
        blank_step: takes one optimiser step with learning rate 0 and zero gradients. It makes the moments
            come into being and copies the fp32 weights to the ones the model computes with, so weights go in
            before it and moments after it.

    Raises:
        UserError: a file is missing or not the one that state.json names, or the tensors are not those of
            this model.
    """
    parameters = dict(engine.module.named_parameters())
    _load_kind("weight", parameters, state, files, worker)
    blank_step()
    for kind in KINDS[1:]:
        _load_kind(kind, parameters, state, files, worker)
    for values in engine.basic_optimizer.state.values():
        values["step"].fill_(state["step"])


def _load_kind(
    kind: str,
    parameters: dict[str, torch.nn.Parameter],
    state: dict[str, Any],
    files: Files,
    worker: Worker,
) -> None:
    """Read one kind's files, each by one worker in turn, which hands the tensors round one at a time."""
    folder = _state_folder(state["step"])
    missing = {name: _shape(parameter) for name, parameter in parameters.items()}
    records = [record for record in state["files"] if record["kind"] == kind]
    for number, record in enumerate(records):
        reader = number % worker.world_size
        path = f"{folder}/{record['name']}"
        tensors: dict[str, torch.Tensor] = {}

        def read(
            path: str = path, record: dict[str, Any] = record, tensors: dict = tensors
        ) -> list[tuple[str, tuple]]:
            tensors.update(safetensors.torch.load(_verified(files, path, record)))
            return [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]

        for name, shape in from_worker(reader, worker, read):
            if missing.get(name) != shape:
                expected = (
                    f"shape {missing[name]}"
                    if name in missing
                    else "no such tensor, or it came before"
                )
                raise _broken(
                    path, f"it holds {name!r} with shape {shape}, this model has {expected}", folder
                )
            value = tensors.pop(name).to(worker.device) if worker.rank == reader else None
            value = torch.empty(shape, device=worker.device) if value is None else value
            distributed.broadcast(value, src=reader)
            _set_full(parameters[name], value, kind, worker.rank)
            del missing[name]
    if missing:
        raise _broken(
            folder, f"no {kind} of {', '.join(sorted(missing)[:3])} ({len(missing)} in all)", folder
        )


def _set_full(parameter: Any, value: torch.Tensor, kind: str, rank: int) -> None:
    """Put this worker's part of a full fp32 tensor where ZeRO keeps it."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if kind == "weight":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        return
    # Under ZeRO-3 the library's own safe_set_full_* fails where the last worker's part is padded, so the part
    # is cut here.
    size = parameter.ds_tensor.numel()
    part = value.new_zeros(size)
    own = value.flatten()[rank * size : (rank + 1) * size]
    part[: own.numel()] = own
    if kind == "weight":
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, kind)


def _state_folder(step: int) -> str:
    return f"state/step-{step:09d}"


# ----------------------------------------------------------------------------------------------------- common


def from_worker(source: int, worker: Worker, make: Callable[[], Any]) -> Any:
    """make()'s result on one worker, handed to all; what it raises there stops them all, in the same words."""
    box: list[Any] = [None]
    failure: Exception | None = None
    if worker.rank == source:
        try:
            box = [(None, make())]
        except Exception as error:
            failure = error
            box = [(isinstance(error, UserError), str(error))]
    distributed.broadcast_object_list(box, src=source, device=worker.device)
    if failure is not None:
        raise failure
    told_user, result = box[0]
    if told_user is None:
        return result
    raise UserError(result) if told_user else RuntimeError(f"worker {source} failed: {result}")


def _write_tensors(
    files: Files,
    folder: str,
    stem: str,
    sizes: dict[str, int],
    read: Callable[[str, bool], torch.Tensor | None],
    worker: Worker,
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, ...]]]:
    """Write this worker's files; return the records of everybody's files, and the tensor names in each file.

    `read(name, keep)` is called for every tensor on every worker in the same order, as it may gather; it
    gives the tensor, on the CPU, to the one worker that keeps it.
    """
    shards = plan_shards(sizes, worker.world_size)
    records, names_of = [], {}
    for number, shard in enumerate(shards, 1):
        name = (
            f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else f"{stem}.safetensors"
        )
        names_of[name] = shard.names
        own = shard.rank == worker.rank
        tensors = ((tensor, read(tensor, own)) for tensor in shard.names)
        held = {tensor: value for tensor, value in tensors if value is not None}
        if own:
            records.append(
                _write(files, folder, name, safetensors.torch.save(held, metadata={"format": "pt"}))
            )
    everybody: list[Any] = [None] * worker.world_size
    distributed.all_gather_object(
        everybody, records
    )  # also a barrier: every file is there before worker 0 says so
    return [record for part in everybody for record in part], names_of


def _begin(files: Files, folder: str, keep: bool = False) -> bool:
    """Clear what a killed attempt left in the folder, unless it is to be kept; whether it is to be
    written."""
    if not keep and files.list(folder):
        files.delete(folder)
    return not keep


def _write(files: Files, folder: str, name: str, data: bytes) -> dict[str, Any]:
    files.write(f"{folder}/{name}", data)
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _verified(files: Files, path: str, record: dict[str, Any]) -> bytes:
    folder = path.rsplit("/", 1)[0]
    if record["name"] not in files.list(folder):
        raise _broken(path, "it is missing", folder)
    data = files.read(path)
    if len(data) != record["bytes"]:
        raise _broken(path, f"{record['bytes']} bytes were written, {len(data)} came", folder)
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise _broken(
            path,
            f"its content changed since it was written (sha256 {record['sha256']} was expected)",
            folder,
        )
    return data


def _json_object(files: Files, path: str) -> dict[str, Any]:
    try:
        value = json.loads(files.read(path))
    except ValueError as error:
        raise _broken(path, f"it is not JSON ({error})", path.rsplit("/", 1)[0]) from error
    if not isinstance(value, dict):
        raise _broken(
            path,
            f"a JSON object was expected, a {type(value).__name__} came",
            path.rsplit("/", 1)[0],
        )
    return value


def _broken(path: str, what: str, folder: str) -> UserError:
    return UserError(
        f"Resuming the training: {path} cannot be used: {what}. Delete the folder {folder} of this artifact to "
        "train without it, from an older state or from the start."
    )


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def total_numel(parameters: Iterable[torch.Tensor]) -> int:
    """Elements of all parameters, also where ZeRO-3 has cut them."""
    return sum(_numel(parameter) for parameter in parameters)
