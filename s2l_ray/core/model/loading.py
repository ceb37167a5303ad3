"""Tokenizers, encoders and weights: how they are read. No code of theirs is run."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from s2l_ray.config import Model, Training
from s2l_ray.core.model.architecture import build, load_config
from s2l_ray.core.model.places import is_folder, local_folder, pretrained
from s2l_ray.core.storage.store import filesystem
from s2l_ray.core.text.byte_tokenizer import BYTES, byte_tokenizer
from s2l_ray.core.text.encoding import Encoder
from s2l_ray.errors import UserError


def load_tokenizer(training: Training) -> Any:
    """The tokenizer of a training section."""
    name = training.tokenizer or ""
    if name == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    named = Model(path=name) if is_folder(name) else Model(hub=name)
    try:
        place, options = pretrained(named if name else training.model)
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
    # first: transformers reads the config for the tokenizer too
    vocabulary = load_config(training.model).vocab_size
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
        training.thoughts == "needed",
    )


def tensor_reader(model: Model) -> Callable[[str], Any] | None:
    """Reads one tensor of the model's weights by name, from safetensors only.

    None for a model with random weights.
    """
    if model.config is not None:
        return None
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    name, options = pretrained(model)
    folder = (
        name
        if model.path is not None
        else snapshot_download(name, allow_patterns=["*.safetensors", "*.json"], **options)
    )
    files = _headers(folder)
    # By the names that they have in the model of the text part alone.
    owner = {
        text_name(stored): (file, stored) for file, shapes in files.items() for stored in shapes
    }

    def read(tensor: str) -> Any:
        if tensor not in owner:
            raise UserError(
                f"loading weights from {folder}: no tensor {tensor!r}. Is config.json that of "
                "these weights?"
            )
        name, stored = owner[tensor]
        with safe_open(Path(folder) / name, framework="pt") as file:
            return file.get_tensor(stored)

    return read


def text_name(stored: str) -> str:
    """A stored tensor's name in the text part of a model of text and images."""
    for prefix in ("model.language_model.", "language_model.model."):
        if stored.startswith(prefix):
            return "model." + stored.removeprefix(prefix)
    return stored.removeprefix("language_model.")


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
        shapes |= {text_name(stored): shape for stored, shape in file.items()}
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
