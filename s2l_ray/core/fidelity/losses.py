"""Losses of the same rows in several settings, and of each row by itself.

The reference is the model's own forward pass over one row at a time, unpadded, in fp32; only the
cross-entropy is ours. Shapes: n rows, S columns of losses (member, step).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from s2l_ray.config import Proxy
from s2l_ray.core.fidelity.rows import EncodedRows
from s2l_ray.core.model.architecture import build
from s2l_ray.core.model.lookahead import check_causal
from s2l_ray.core.model.scoring import (
    Weights,
    check_finite,
    checkpoint_labels,
    checkpoint_weights,
    files_of,
    score,
    starting_weights,
)
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import ProxyInfo, info_of
from s2l_ray.core.text.encoding import Encoded, Encoder


@dataclass(frozen=True)
class Setting:
    """How to score.

    Attributes:
        tokens: padded tokens of a batch; 1 takes every row alone.
        attention: None is the model's default.
    """

    dtype: str
    tokens: int
    attention: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model to look at.

    Attributes:
        label: what people are told of it by.
        column: [member, step].
        encoder, examples: of that member, and the rows as it reads them.
        load: its weights.
    """

    label: str
    column: list[int]
    encoder: Encoder
    examples: list[Encoded]
    load: Callable[[], Weights]


def checkpoints_of(
    proxies: Sequence[Proxy], artifact: Artifact, rows: EncodedRows, at_most: int | None
) -> tuple[list[Checkpoint], bool]:
    """The checkpoints of a proxy, members one after the other, and whether these are all.

    They are those of the committed artifact. Without one it is the model of each member at its
    start.

    Args:
        at_most: of each member; None takes all.
    """
    manifest = artifact.committed()
    if manifest is None:
        steps = [[0] for _ in proxies]
        loads = [[partial(starting_weights, section)] for section in proxies]
        complete = False
    else:
        members, files = info_of(manifest, ProxyInfo).members, files_of(manifest)
        places = [_evenly(len(member.steps), at_most) for member in members]
        steps = [[m.steps[i] for i in own] for m, own in zip(members, places, strict=True)]
        loads = [
            [partial(checkpoint_weights, artifact, member.folders[i], files) for i in own]
            for member, own in zip(members, places, strict=True)
        ]
        complete = all(len(m.steps) == len(own) for m, own in zip(members, steps, strict=True))
    labels = checkpoint_labels(steps)
    made = [
        Checkpoint(label, [number, step], rows.encoders[number], rows.examples[number], load)
        for number in range(len(steps))
        for label, step, load in zip(labels[number], steps[number], loads[number], strict=True)
    ]
    return made, complete


def _evenly(count: int, at_most: int | None) -> list[int]:
    """Places of the checkpoints to look at, the last and, where there are several, the first."""
    if at_most is None or at_most >= count:
        return list(range(count))
    return sorted(
        {count - 1 - round(place * (count - 1) / max(1, at_most - 1)) for place in range(at_most)}
    )


def settings(
    checkpoints: Sequence[Checkpoint], tokens_per_batch: int, eager_too: bool
) -> list[Setting]:
    """Both dtypes, rows alone and in batches of two sizes; eager attention if it is no default.

    The larger size is the job's, or what all rows make in one batch where that is less.
    """
    padded = max(
        len(one.examples) * max(len(example.input_ids) for example in one.examples)
        for one in checkpoints
    )
    longest = max(len(example.input_ids) for one in checkpoints for example in one.examples)
    whole = min(tokens_per_batch, padded)
    sizes = sorted({1, max(longest, whole // 4), whole})
    made = [Setting(dtype, tokens) for dtype in ("fp32", "bf16") for tokens in sizes]
    if eager_too:
        made += [Setting(dtype, whole, "eager") for dtype in ("fp32", "bf16")]
    return sorted(made, key=lambda one: (one.dtype != "fp32", one.attention or "", one.tokens))


def job_setting(in_settings: Sequence[Setting], dtype: str) -> Setting:
    """The one that the job itself uses: its dtype, its batches, the models' own attention."""
    return max(
        (s for s in in_settings if s.dtype == dtype and s.attention is None), key=lambda s: s.tokens
    )


def default_attention(config: Any) -> str:
    """The implementation of attention that transformers chooses here for a model of that config."""
    with torch.device("meta"):
        return str(build(config).config._attn_implementation)


def measure(
    checkpoints: Sequence[Checkpoint],
    in_settings: Sequence[Setting],
    device: Any,
    on_pass: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, dict[Setting, np.ndarray]]:
    """Losses of the rows under each checkpoint, float32 [n, S]: the reference, and every setting's.

    Args:
        in_settings: ordered by dtype and attention, since each such pair needs a model of its own.
        on_pass: called after each of the (1 + number of settings) * S passes over the rows.

    Raises:
        UserError: a loss that is not finite, naming example and checkpoint.
    """
    shape = len(checkpoints[0].examples), len(checkpoints)
    reference = np.empty(shape, np.float32)
    found = {setting: np.empty(shape, np.float32) for setting in in_settings}
    for column, checkpoint in enumerate(checkpoints):
        weights, examples = checkpoint.load(), checkpoint.examples
        model = weights.model("fp32", device)
        check_causal(model, device, checkpoint.label)
        reference[:, column] = [plain_loss(model, example, device) for example in examples]
        check_finite("loss", reference[:, column : column + 1], examples, [checkpoint.label])
        on_pass()
        for (dtype, attention), group in groupby(
            in_settings, key=lambda one: (one.dtype, one.attention)
        ):
            model = weights.model(dtype, device, attention)
            for setting in group:
                pad, tokens, label = checkpoint.encoder.pad, setting.tokens, [checkpoint.label]
                found[setting][:, column] = score([model], examples, pad, tokens, device, label)[
                    :, 0
                ]
                on_pass()
    return reference, found


@torch.inference_mode()
def plain_loss(model: Any, example: Encoded, device: Any) -> float:
    """Mean loss of the learned tokens of one row from a plain forward pass without padding."""
    ids = torch.from_numpy(example.input_ids).long().to(device)
    where = torch.from_numpy(example.learned).to(device).nonzero().squeeze(1)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, where - 1]
    return F.cross_entropy(logits.double(), ids[where]).item()
