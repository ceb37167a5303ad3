"""Stored checkpoints to numbers of every example.

Checkpoints are loaded, batches are cut, and numbers that are not finite are refused.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2l_ray.config import ModelWorkers, Training
from s2l_ray.core.memory import keep_freed_memory
from s2l_ray.core.model.architecture import build, load_config
from s2l_ray.core.model.cost import ANSWER_LOSS
from s2l_ray.core.model.loading import load_weights, read_weights, tensor_reader
from s2l_ray.core.model.statistics import example_statistics
from s2l_ray.core.model.tensors import stored_tensors
from s2l_ray.core.model.workers import check_gpu
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import FileEntry, Manifest
from s2l_ray.core.text.batching import dense_batches, pad
from s2l_ray.core.text.encoding import NO_LEARNED_TOKEN, Encoded, Encoder
from s2l_ray.errors import UserError

log = logging.getLogger("s2l_ray")


def files_of(manifest: Manifest) -> dict[str, list[Any]]:
    """Name -> [bytes, sha256] of an artifact's files, as `load_checkpoint` wants them."""
    return {entry.name: [entry.bytes, entry.sha256] for entry in manifest.files}


@dataclass(frozen=True)
class Weights:
    """What a model is made from: a transformers config and tensors by name.

    It also says where they are from, for messages.
    """

    config: Any
    tensors: dict[str, Any]
    what: str

    def model(self, dtype: str, device: Any, attention: str | None = None) -> Any:
        """The model, ready to score; see models.build."""
        made = build(self.config, dtype, attention)
        load_weights(made, self.tensors, self.what)
        return made.to(device).eval()


def load_checkpoint(
    artifact: Artifact, folder: str, files: dict[str, list[Any]], dtype: str, device: Any
) -> Any:
    """A model from a folder of an artifact, every file checked against the manifest."""
    return checkpoint_weights(artifact, folder, files).model(dtype, device)


def checkpoint_weights(artifact: Artifact, folder: str, files: dict[str, list[Any]]) -> Weights:
    """The weights in a folder of an artifact, every file checked against the manifest."""
    from transformers import AutoConfig

    def read(name: str) -> bytes:
        path = f"{folder}/{name}"
        if path not in files:
            raise UserError(
                f"loading {artifact.uri_of(folder)}: the manifest lists no {name}. Remove "
                f"{artifact.uri} and run again."
            )
        return artifact.read_file(FileEntry(path, *files[path]))

    names = [path[len(folder) + 1 :] for path in files if path.startswith(folder + "/")]
    raw = json.loads(read("config.json"))
    what = f"{artifact.uri}/{folder}"
    return Weights(
        AutoConfig.for_model(raw.pop("model_type"), **raw), read_weights(read, names, what), what
    )


def starting_weights(training: Training) -> Weights:
    """The weights that a training begins with: the model's, or random ones from the seed."""
    import torch

    what = str(training.model.path or training.model.hub or "the model's start")
    config, read = load_config(training.model), tensor_reader(training.model)
    torch.manual_seed(training.seed)
    with torch.device("meta" if read else "cpu"):
        made = build(config)
    tensors = stored_tensors(made)
    return Weights(
        config, {name: read(name) for name in tensors} if read else made.state_dict(), what
    )


def device_of(scaling: ModelWorkers) -> Any:
    """Where this worker computes, with its CPU threads and the C library's memory set up for it."""
    import torch

    keep_freed_memory()
    torch.set_num_threads(scaling.threads)
    check_gpu(scaling.gpus)
    return torch.device("cuda" if scaling.gpus else "cpu")


def checkpoint_labels(steps: Sequence[Sequence[int]]) -> list[list[str]]:
    """What to call the checkpoints of each proxy, given their steps.

    Where there are several proxies, the name says the proxy too.
    """
    several = len(steps) > 1
    return [
        [
            f"proxy {number} at step {step}" if several else f"the proxy at step {step}"
            for step in mine
        ]
        for number, mine in enumerate(steps)
    ]


def reason_of(versions: Sequence[Encoded]) -> str | None:
    """Why an example cannot be scored; None where every proxy's encoding learns some token."""
    for version in versions:
        if not version.learned.any():
            return version.reason or NO_LEARNED_TOKEN
    return None


def score(
    models: Sequence[Any],
    examples: Sequence[Encoded],
    pad_id: int,
    tokens_per_batch: int,
    device: Any,
    labels: Sequence[str] = (),
) -> np.ndarray:
    """Mean loss over the learned tokens of each example under each model.

    Returns float32 [n, number of models].

    Args:
        labels: what to call each model in a message.

    Raises:
        UserError: a loss that is not finite, naming the example and the model.
    """
    losses = _one_pass(models, examples, (), pad_id, tokens_per_batch, device)["loss"]
    check_finite("loss", losses, examples, labels)
    return losses


def score_statistics(
    models: Sequence[Any],
    examples: Sequence[Encoded],
    names: Sequence[str],
    encoder: Encoder,
    tokens_per_batch: int,
    device: Any,
    labels: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """`loss` and the named statistics (trajectories.statistics) of each example.

    Each is float32 [n, number of models].

    All come from one forward pass (statistics.example_statistics) but `answer_loss`. That is the
    loss of the learned tokens without the prompt, which takes another pass over `answers`.

    Raises:
        UserError: a value that is not finite, naming the example and the model.
    """
    together = [name for name in names if name != ANSWER_LOSS]
    made = _one_pass(models, examples, together, encoder.pad, tokens_per_batch, device)
    if ANSWER_LOSS in names:
        alone = answers(examples, encoder.bos, encoder.end)
        made[ANSWER_LOSS] = _one_pass(models, alone, (), encoder.pad, tokens_per_batch, device)[
            "loss"
        ]
    for name, values in made.items():
        check_finite(name, values, examples, labels)
    return made


def answers(examples: Sequence[Encoded], start: int | None, end: int) -> list[Encoded]:
    """The learned tokens of each example alone, behind one token that stands for the prompt.

    It is the start token where the example begins with it, or else the end token.

    So exactly the tokens that are predicted with the prompt are predicted without it, and the
    quotient of the two losses is IFD (Li et al. 2023, "From Quantity to Quality": their
    Instruction-Following Difficulty).
    """
    made = []
    for example in examples:
        first = start if example.input_ids[0] == start else end
        ids = np.array([first, *example.input_ids[example.learned]], np.int32)
        made.append(Encoded(example.example_id, ids, np.arange(len(ids)) > 0))
    return made


def _one_pass(
    models: Sequence[Any],
    examples: Sequence[Encoded],
    names: Sequence[str],
    pad_id: int,
    tokens_per_batch: int,
    device: Any,
) -> dict[str, np.ndarray]:
    import torch

    made = {name: np.empty((len(examples), len(models)), np.float32) for name in ("loss", *names)}

    def compute(batch: list[int]) -> None:
        arrays = pad([examples[row] for row in batch], pad_id)
        input_ids_BL, learned_BL = (torch.from_numpy(array).to(device) for array in arrays)
        for column, model in enumerate(models):
            for name, values_B in example_statistics(
                model, input_ids_BL, learned_BL, names
            ).items():
                made[name][batch, column] = values_B.cpu().numpy()

    compute_in_batches([len(each.input_ids) for each in examples], tokens_per_batch, compute)
    return made


def compute_in_batches(
    lengths: Sequence[int], tokens_per_batch: int, compute: Callable[[list[int]], None]
) -> None:
    """Call `compute` with the rows of each batch; the limit is halved where memory runs out.

    Raises:
        UserError: a row alone does not fit into the device's memory.
    """
    import torch

    left = list(range(len(lengths)))
    while left:
        done: set[int] = set()
        try:
            for batch in dense_batches([lengths[row] for row in left], tokens_per_batch):
                rows = [left[place] for place in batch]
                compute(rows)
                done.update(rows)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise UserError(
                    f"scoring a row of {lengths[rows[0]]:,} tokens: the GPU has not enough memory "
                    f"({str(error).splitlines()[0]}). Lower max_length, or use a larger GPU."
                ) from None
            tokens_per_batch = max(1, min(tokens_per_batch, sum(lengths[row] for row in rows)) // 2)
        left = [row for row in left if row not in done]
        if left:
            log.info("batches have at most %d tokens now: memory ran out", tokens_per_batch)
            torch.cuda.empty_cache()


def check_finite(
    name: str, values: np.ndarray, examples: Sequence[Encoded], labels: Sequence[str]
) -> None:
    if np.isfinite(values).all():
        return
    row, column = np.argwhere(~np.isfinite(values))[0]
    where = f" under {labels[column]}" if labels else ""
    raise UserError(
        f"scoring examples: {name} of example_id {examples[row].example_id}{where} is "
        f"{values[row, column]}, expected a finite number. The model has diverged or overflows: "
        "lower its learning_rate, or set dtype to fp32."
    )
