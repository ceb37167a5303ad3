"""Where models and tokenizers are, and what identifies them."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from s2l_ray.config import Model
from s2l_ray.core.storage.manifest import fingerprint
from s2l_ray.core.storage.store import filesystem
from s2l_ray.core.text.byte_tokenizer import BYTES
from s2l_ray.errors import UserError

NOT_IDENTITY = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".md")


def identity(model: Model, tokenizer: str | None) -> dict[str, Any]:
    """What names a model and its tokenizer in a fingerprint.

    Folders are named by content hashes, Hub names by commits, a config by itself.

    Raises:
        UserError: a folder that is not there, or a Hub name whose commit is not known.
    """
    if model.path is not None:
        weights: Any = {"files": folder_hashes(model.path)}
        if "config.json" not in weights["files"]:
            raise UserError(
                f"reading the model folder {model.path}: it has no config.json. Name a Hugging "
                "Face model folder."
            )
    elif model.hub is not None:
        weights = {"commit": _hub_commit(model.hub)}
    else:
        weights = {"config": model.config}
    if tokenizer in (None, BYTES):
        return {"model": weights, "tokenizer": tokenizer}
    words = folder_hashes(tokenizer) if is_folder(tokenizer) else _hub_commit(tokenizer)
    return {"model": weights, "tokenizer": words}


def at_hand(model: Model, tokenizer: str | None = BYTES) -> bool:
    """Whether a model and its tokenizer can be read without the Hugging Face Hub."""
    if model.hub is not None:
        return False
    return all(name in (None, BYTES) or _is_there(name) for name in (model.path, tokenizer))


def _is_there(folder: str) -> bool:
    try:
        filesystem_, path = filesystem(folder)
        return bool(filesystem_.get_file_info(path).type == pafs.FileType.Directory)
    except (OSError, UserError):
        return False


def folder_hashes(uri: str) -> dict[str, str]:
    """Relative name -> SHA-256 of the files of a model or tokenizer folder that can matter.

    These are the files at its top, without pickles and prose.
    """
    filesystem_, path = filesystem(uri)
    if filesystem_.get_file_info(path).type != pafs.FileType.Directory:
        raise UserError(
            f"reading the model folder {uri}: there is no such folder. Correct model.path or "
            "tokenizer."
        )
    infos = filesystem_.get_file_info(pafs.FileSelector(path))
    hashes = {}
    for info in infos:
        name = info.path[len(path.rstrip("/")) + 1 :]
        if info.type != pafs.FileType.File or name.startswith(".") or name.endswith(NOT_IDENTITY):
            continue
        digest = hashlib.sha256()
        with filesystem_.open_input_stream(info.path, compression=None) as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
        hashes[name] = digest.hexdigest()
    return hashes


def is_folder(name: str) -> bool:
    """Whether the name is that of a folder, and not of the Hugging Face Hub."""
    return "://" in name or os.path.isdir(os.path.expanduser(name))


def _hub_commit(name: str) -> str:
    from huggingface_hub import model_info

    repository, _, revision = name.partition("@")
    try:
        return str(model_info(repository, revision=revision or None).sha)
    # whatever its HTTP library raises; the cause is kept in the message
    except Exception as error:
        raise UserError(
            f"looking up {name} on the Hugging Face Hub: {type(error).__name__}: {error}. Download "
            "the model and name its folder as model.path, or give this machine access to the Hub."
        ) from None


def local_folder(uri: str) -> str:
    """A local path with the content of a folder.

    A remote folder is copied once per content to the machine's temporary folder.
    """
    filesystem_, path = filesystem(uri)
    if isinstance(filesystem_, pafs.LocalFileSystem):
        return path
    target = Path(tempfile.gettempdir()) / f"s2l_ray-{fingerprint([uri, folder_hashes(uri)])}"
    if not target.exists():
        copy = tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent)
        pafs.copy_files(
            path, copy, source_filesystem=filesystem_, destination_filesystem=pafs.LocalFileSystem()
        )
        try:
            os.rename(copy, target)
        # another worker of this machine was faster; what it copied has the same content
        except OSError:
            shutil.rmtree(copy)
    return str(target)


def pretrained(model: Model) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` of transformers takes: a folder or name, and options."""
    if model.path is not None:
        return local_folder(model.path), {}
    repository, _, revision = str(model.hub).partition("@")
    return repository, {"revision": revision or None}
