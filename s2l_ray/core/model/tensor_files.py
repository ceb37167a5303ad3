"""Folders of safetensors files that all workers of a training write together.

Every worker writes its own share of the tensors, one tensor is gathered at a time, and worker 0
writes one JSON file last, which alone makes the folder complete: a crash at any moment leaves
either a complete folder or one that counts as absent.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import distributed

from s2l_ray.core.model.workers import Worker
from s2l_ray.errors import UserError

FORMAT = 1
# A worker holds one file of tensors in memory while it writes or reads it.
FILE_BYTES = 1 << 30


class Files(Protocol):
    """Where the bytes go.

    Paths are relative to the artifact, a write is atomic, and a folder that does not exist lists as
    empty.
    """

    def write(self, path: str, data: bytes) -> None: ...
    def read(self, path: str) -> bytes: ...
    def list(self, folder: str) -> Sequence[str]: ...
    def delete(self, folder: str) -> None: ...


@dataclass(frozen=True)
class TensorFile:
    """The names of the tensors in one file, and the rank of the worker that writes it."""

    rank: int
    names: tuple[str, ...]


def split_tensors(
    sizes: dict[str, int], world_size: int, limit: int = FILE_BYTES
) -> list[TensorFile]:
    """Split tensors, in order, into files of at most `limit` bytes, about equal bytes a worker.

    A tensor belongs to the worker in whose share of all bytes it begins. One that is larger than
    the limit has a file of its own.

    Args:
        sizes: bytes of each tensor by name.
    """
    total = max(sum(sizes.values()), 1)
    files: list[TensorFile] = []
    before = room = 0
    for name, size in sizes.items():
        rank = min(before * world_size // total, world_size - 1)
        if not files or files[-1].rank != rank or size > room:
            files.append(TensorFile(rank, ()))
            room = limit
        files[-1] = TensorFile(rank, (*files[-1].names, name))
        before, room = before + size, room - size
    return files


def write_tensors(
    files: Files,
    folder: str,
    stem: str,
    sizes: dict[str, int],
    read: Callable[[str, bool], torch.Tensor | None],
    worker: Worker,
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, ...]]]:
    """Write this worker's files. All workers call it together.

    Args:
        sizes: bytes of each tensor by name.
        read: `read(name, keep)` is called for every tensor on every worker in the same order, as it
            may gather; where `keep` is true it returns the tensor, on the CPU.

    Returns:
        Records of all workers' files, and the names of the tensors in each file.
    """
    split = split_tensors(sizes, worker.world_size)
    records, names_of = [], {}
    for number, file in enumerate(split, 1):
        part = f"-{number:05d}-of-{len(split):05d}" if len(split) > 1 else ""
        name = f"{stem}{part}.safetensors"
        names_of[name] = file.names
        own = file.rank == worker.rank
        tensors = ((tensor, read(tensor, own)) for tensor in file.names)
        held = {tensor: value for tensor, value in tensors if value is not None}
        if own:
            data = safetensors.torch.save(held, metadata={"format": "pt"})
            records.append(write_file(files, folder, name, data))
    everybody: list[Any] = [None] * worker.world_size
    # Also a barrier: every file exists before worker 0 declares the folder complete.
    distributed.all_gather_object(everybody, records)
    return [record for part in everybody for record in part], names_of


def clear_folder(files: Files, folder: str) -> None:
    """Delete what an attempt that was killed left in the folder."""
    if files.list(folder):
        files.delete(folder)


def write_file(files: Files, folder: str, name: str, data: bytes) -> dict[str, Any]:
    """Write a file; its record for `read_verified`."""
    files.write(f"{folder}/{name}", data)
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_json(files: Files, path: str, content: dict[str, Any]) -> None:
    files.write(path, json.dumps(content, indent=1).encode())


def read_verified(files: Files, path: str, record: dict[str, Any]) -> bytes:
    """The content of a file.

    Raises:
        UserError: it is missing, or is not the one that its record names.
    """
    folder = path.rsplit("/", 1)[0]
    if record["name"] not in files.list(folder):
        raise unusable(path, "it is missing", folder)
    data = files.read(path)
    if len(data) != record["bytes"]:
        raise unusable(path, f"{record['bytes']} bytes were written, {len(data)} came", folder)
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        changed = "its content changed since it was written"
        raise unusable(path, f"{changed} (sha256 {record['sha256']} was expected)", folder)
    return data


def read_json(files: Files, path: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file holds something else.
    """
    folder = path.rsplit("/", 1)[0]
    try:
        value = json.loads(files.read(path))
    except ValueError as error:
        raise unusable(path, f"it is not JSON ({error})", folder) from error
    if not isinstance(value, dict):
        came = type(value).__name__
        raise unusable(path, f"a JSON object was expected, a {came} came", folder)
    return value


def unusable(path: str, why: str, folder: str) -> UserError:
    """The error for a file that a training cannot resume from."""
    return UserError(
        f"Resuming the training: {path} cannot be used: {why}. Delete the folder {folder} of this "
        "artifact to train without it, from an older state or from the start."
    )
