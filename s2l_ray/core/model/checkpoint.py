"""Checkpoints of a model in training, as folders that Hugging Face loads.

Their content depends neither on the number of workers nor on the ZeRO stage.
"""

import copy
import json
from typing import Any

import torch

from s2l_ray.config import Training
from s2l_ray.core.model.adapters import adapter_files, exports
from s2l_ray.core.model.tensor_files import (
    FORMAT,
    Files,
    clear_folder,
    read_json,
    write_file,
    write_json,
    write_tensors,
)
from s2l_ray.core.model.tensors import DTYPES, full_numel
from s2l_ray.core.model.workers import Worker, from_worker


def checkpoint_folder(step: int) -> str:
    """Folder of the checkpoint of a step, relative to the artifact."""
    return f"checkpoint/step-{step:06d}"


def checkpoint_files(files: Files, step: int) -> list[dict[str, Any]] | None:
    """Records of a complete checkpoint's files, names relative to it; None if incomplete."""
    folder = checkpoint_folder(step)
    if "files.json" not in files.list(folder):
        return None
    return read_json(files, f"{folder}/files.json")["files"]


def save_checkpoint(
    module: torch.nn.Module, step: int, section: Training, files: Files, worker: Worker
) -> None:
    """Write the weights and config.json as a folder that `from_pretrained` loads.

    An adapter is merged into the weights, and stored in `adapter/` in peft's format too. All
    workers call it together. A checkpoint that an earlier attempt completed stays as it is.
    """
    folder, dtype = checkpoint_folder(step), section.dtype
    base = section.model.path or section.model.hub
    adapter = None if section.adapter is None else (section.adapter, base)

    def begin() -> bool:
        if checkpoint_files(files, step) is not None:
            return False
        clear_folder(files, folder)
        return True

    if not from_worker(0, worker, begin):
        return
    tensors = exports(module)
    sizes = {n: full_numel(made.like) * DTYPES[dtype].itemsize for n, made in tensors.items()}

    def read(name: str, keep: bool) -> torch.Tensor | None:
        from deepspeed.runtime.zero import GatheredParameters

        made = tensors[name]
        with GatheredParameters(made.parts):
            if not keep:
                return None
            tensor = made.make()
            stored = DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to("cpu", stored, copy=True).contiguous()

    records, names_of = write_tensors(files, folder, "model", sizes, read, worker)
    # All workers gather what one writes.
    beside = dict(adapter_files(module, *adapter)) if adapter else {}
    if worker.rank == 0:
        texts = {"config.json": _config_json(module, dtype).encode()}
        if len(names_of) > 1:
            texts["model.safetensors.index.json"] = _index_json(sizes, names_of).encode()
        texts |= {f"adapter/{name}": content for name, content in beside.items()}
        records += [write_file(files, folder, name, text) for name, text in texts.items()]
        done = {"format": FORMAT, "step": step, "files": records}
        write_json(files, f"{folder}/files.json", done)


def _config_json(module: torch.nn.Module, dtype: str) -> str:
    config: Any = copy.deepcopy(module.config)
    config.dtype = DTYPES[dtype]
    config.architectures = [type(module).__name__]
    return config.to_json_string()


def _index_json(sizes: dict[str, int], names_of: dict[str, tuple[str, ...]]) -> str:
    weight_map = {name: file for file, names in names_of.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return json.dumps(index, indent=1)
