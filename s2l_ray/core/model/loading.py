"""Models and tokenizers: where they are, what identifies them, and how their weights are read.

No code of theirs is run.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from s2l_ray.config import Model, Training
from s2l_ray.core.storage.manifest import fingerprint
from s2l_ray.core.storage.store import filesystem
from s2l_ray.core.text.byte_tokenizer import BYTES, byte_tokenizer
from s2l_ray.core.text.encoding import Encoder
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
    words = folder_hashes(tokenizer) if _is_folder(tokenizer) else _hub_commit(tokenizer)
    return {"model": weights, "tokenizer": words}


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


def _is_folder(name: str) -> bool:
    return "://" in name or os.path.isdir(os.path.expanduser(name))


def _hub_commit(name: str) -> str:
    from huggingface_hub import model_info

    repository, _, revision = name.partition("@")
    try:
        return str(model_info(repository, revision=revision or None).sha)
    except Exception as error:  # whatever its HTTP library raises; the cause is kept in the message
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
        except (
            OSError
        ):  # another worker of this machine was faster; what it copied has the same content
            shutil.rmtree(copy)
    return str(target)


def _pretrained(model: Model) -> tuple[str, dict[str, Any]]:
    if model.path is not None:
        return local_folder(model.path), {}
    repository, _, revision = str(model.hub).partition("@")
    return repository, {"revision": revision or None}


def load_config(model: Model) -> Any:
    """The transformers config of a model.

    Raises:
        UserError: it cannot be found or is not one that transformers knows.
    """
    from transformers import AutoConfig

    try:
        if model.config is not None:
            return AutoConfig.for_model(**model.config)
        name, options = _pretrained(model)
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = model.path or model.hub or f"model.config {model.config}"
        raise UserError(
            f"reading the config of {what}: {error}. Correct the section's model."
        ) from None


def load_tokenizer(training: Training) -> Any:
    """The tokenizer of a training section."""
    name = training.tokenizer or ""
    if name == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    named = Model(path=name) if _is_folder(name) else Model(hub=name)
    try:
        place, options = _pretrained(named if name else training.model)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        what = name or training.model.path or training.model.hub
        raise UserError(
            f"loading the tokenizer {what}: {error}. Correct the section's tokenizer."
        ) from None


def template_text(training: Training) -> str | None:
    """Content of the section's own chat template; None where the tokenizer's is meant."""
    if training.template is None:
        return None
    filesystem_, path = filesystem(training.template)
    try:
        with filesystem_.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read()).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"reading the chat template {training.template}: {error}. Expected a UTF-8 file with a "
            "Jinja chat template; correct `template`."
        ) from None


def load_encoder(training: Training) -> Encoder:
    """The encoder of a training section, checked against the model's vocabulary."""
    vocabulary = load_config(
        training.model
    ).vocab_size  # first: transformers reads the config for the tokenizer too
    encoder = make_encoder(training)
    encoder.check_vocabulary(
        vocabulary, training.tokenizer or str(training.model.path or training.model.hub)
    )
    return encoder


def make_encoder(training: Training) -> Encoder:
    """The same without checks, which needs no model's config.

    So it needs no torch where the tokenizer needs none.
    """
    return Encoder(
        load_tokenizer(training),
        training.prompt,
        training.max_length,
        training.learn,
        training.truncation,
        template_text(training),
    )


def build(config: Any, dtype: str = "fp32", attention: str | None = None) -> Any:
    """A causal LM of that config with weights drawn from torch's current generator.

    Args:
        attention: one of transformers' implementations, such as eager or sdpa; default: the one
            that it chooses itself.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, **options
    )


def parameters(model: Model) -> int | None:
    """Number of parameters without making any.

    None where neither the config nor `model.parameters` is at hand.
    """
    import torch

    if model.parameters is not None:
        return model.parameters
    if model.hub is not None:
        return None
    with torch.device("meta"):
        built = build(load_config(model))
    return sum(tensor.numel() for tensor in built.parameters())


def output_shape(model: Model) -> tuple[int, int]:
    """V and H of the output layer; zeros for Hub names, whose config is not at hand."""
    if model.hub is not None:
        return 0, 0
    config = load_config(model)
    return config.vocab_size, config.hidden_size


def tensor_reader(model: Model) -> Callable[[str], Any] | None:
    """Reads one tensor of the model's weights by name, from safetensors only.

    None for a model with random weights.
    """
    if model.config is not None:
        return None
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    name, options = _pretrained(model)
    folder = (
        name
        if model.path is not None
        else snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], **options)
    )
    files = _headers(folder)
    owner = {tensor: file for file, shapes in files.items() for tensor in shapes}

    def read(tensor: str) -> Any:
        if tensor not in owner:
            raise UserError(
                f"loading weights from {folder}: no tensor {tensor!r}. Is config.json that of "
                "these weights?"
            )
        with safe_open(Path(folder) / owner[tensor], framework="pt") as file:
            return file.get_tensor(tensor)

    return read


def _headers(folder: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """File -> tensor -> shape of a local folder of safetensors, from the files' headers alone."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in weight_files(
        lambda name: (Path(folder) / name).read_bytes(), os.listdir(folder), folder
    ):
        try:
            with safe_open(Path(folder) / file, framework="pt") as opened:
                found[file] = {
                    name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())
                }
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"loading weights from {folder}/{file}: {error}. The file is damaged; restore it."
            ) from None
    return found


def check_weights(model: Model) -> None:
    """Refuse a model folder without all tensors of its config in their shapes.

    It reads headers only, before anything is started.

    Raises:
        UserError: naming the first tensor that is missing or has another shape.
    """
    import torch

    from s2l_ray.core.model.tensors import stored_tensors

    if model.path is None:
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _headers(local_folder(model.path)).values():
        shapes |= file
    with torch.device("meta"):
        expected = stored_tensors(build(load_config(model)))
    for name, tensor in expected.items():
        if shapes.get(name) != tuple(tensor.shape):
            what = f"came with {shapes[name]}" if name in shapes else "is not there"
            raise UserError(
                f"checking the weights in {model.path}: {name} was expected with shape "
                f"{tuple(tensor.shape)} and {what}. Complete the folder, or correct its "
                "config.json: the weights and the config do not belong together."
            )


def weight_files(read: Callable[[str], bytes], names: Iterable[str], what: str) -> list[str]:
    """The safetensors files of a folder, with or without an index.

    Raises:
        UserError: no safetensors, or a shard that the index names is missing.
    """
    names, index = sorted(names), "model.safetensors.index.json"
    if index in names:
        try:
            files = sorted({str(file) for file in json.loads(read(index))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"loading weights from {what}/{index}: not JSON with a weight_map ({error}). The "
                "file is damaged; restore it."
            ) from None
        missing = sorted(set(files) - set(names))
        if missing:
            raise UserError(
                f"loading weights from {what}: the index names {missing[0]}, which is missing. "
                "Complete the folder."
            )
        return files
    if "model.safetensors" not in names:
        raise UserError(
            f"loading weights from {what}: expected model.safetensors or an index of shards, got "
            f"{names}. Only safetensors are read, because other formats can run code; convert the "
            "weights."
        )
    return ["model.safetensors"]


def read_weights(read: Callable[[str], bytes], names: list[str], what: str) -> dict[str, Any]:
    """All tensors of a folder that is read through `read`, for models that fit on one worker."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    weights: dict[str, Any] = {}
    for file in weight_files(read, names, what):
        try:
            weights.update(load(read(file)))
        except (SafetensorError, ValueError) as error:
            raise UserError(
                f"loading weights from {what}/{file}: {error}. The file is damaged; restore it."
            ) from None
    return weights


def load_weights(model: Any, weights: dict[str, Any], what: str) -> None:
    """Fill a model in place; names must match but for tied weights, which are stored once."""
    try:
        result = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"loading weights from {what}: {error}. Is config.json that of these weights?"
        ) from None
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in result.missing_keys if name not in tied]
    if missing or result.unexpected_keys:
        raise UserError(
            f"loading weights from {what}: {len(missing)} tensors are missing ({missing[:3]}) and "
            f"{len(result.unexpected_keys)} unexpected ({result.unexpected_keys[:3]}). Is "
            "config.json that of these weights?"
        )
