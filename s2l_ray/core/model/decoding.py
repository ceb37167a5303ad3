"""Greedy answers of a model to the prompts of rows."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from s2l_ray.core.model.architecture import most_positions
from s2l_ray.core.text.batching import token_batches
from s2l_ray.core.text.encoding import Encoder
from s2l_ray.errors import UserError

log = logging.getLogger(__name__)
# Share of the spread of logits by which padding may move them in bf16. Where a family that heeds
# padding moves more, decoding is slower and answers the same.
MOVED_BY_ROUNDING = 0.02


class Generation(NamedTuple):
    """What a model wrote.

    Attributes:
        cut: it came to the largest number of new tokens without an end.
    """

    text: str
    cut: bool


def decode(
    model: Any,
    encoder: Encoder,
    rows: pa.Table,
    max_new_tokens: int,
    tokens_per_batch: int,
    device: Any,
    asking: str = "",
) -> list[Generation]:
    """The model's greedy answer to each row's prompt.

    A family that takes no notice of padding on the left gets one prompt at a time.

    Args:
        max_new_tokens: an answer ends there, unless a token of `encoder.stops` ends it before.
        tokens_per_batch: padded tokens of a batch, those of the answers included; halved where the
            GPU's memory does not hold so many.
        asking: text behind the last question.

    Raises:
        UserError: a row that cannot be rendered, whose prompt leaves no place for the answer, or
            which needs more memory than the GPU has.
    """
    prompts = encoder.prompts(rows, asking)
    _check_places(model, prompts, rows, max_new_tokens)
    made: dict[int, Generation] = {}
    # Not even prompts of one length: rwkv of transformers 5 mixes up the states of a batch.
    alone = not heeds_padding(model, encoder.pad, device)
    while len(made) < len(prompts):
        left = [row for row in range(len(prompts)) if row not in made]
        lengths = [len(prompts[row]) + max_new_tokens for row in left]
        for batch in token_batches(lengths, 1 if alone else tokens_per_batch):
            several = [left[number] for number in batch]
            some = [prompts[row] for row in several]
            texts = _generate(model, encoder, some, max_new_tokens, device)
            if texts is None:
                tokens = lengths[batch[0]]
                if len(several) == 1:
                    raise UserError(_too_large(rows, several[0], tokens))
                tokens_per_batch = tokens * len(several) // 2
                log.warning(
                    "generating: too little memory; now %d tokens a batch", tokens_per_batch
                )
                break
            made |= zip(several, texts, strict=True)
    return [made[row] for row in range(len(prompts))]


def _generate(
    model: Any, encoder: Encoder, prompts: list[list[int]], max_new_tokens: int, device: Any
) -> list[Generation] | None:
    """Answers to prompts in one batch; None where the GPU's memory does not hold it."""
    import torch

    length = max(map(len, prompts))
    ids_BL = np.full((len(prompts), length), encoder.pad, np.int64)
    real_BL = np.zeros((len(prompts), length), np.int64)
    # Prompts are padded on the left, so that all answers begin at the same place.
    for number, prompt in enumerate(prompts):
        ids_BL[number, length - len(prompt) :] = prompt
        real_BL[number, length - len(prompt) :] = 1
    try:
        with torch.inference_mode():
            made_BL = model.generate(
                input_ids=torch.from_numpy(ids_BL).to(device),
                attention_mask=torch.from_numpy(real_BL).to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=encoder.stops,
                pad_token_id=encoder.pad,
            ).cpu()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    answers = []
    for made in made_BL[:, length:].tolist():
        new = list(itertools.takewhile(lambda token: token not in encoder.stops, made))
        text = encoder.tokenizer.decode(new, skip_special_tokens=True)
        answers.append(Generation(text, len(new) == max_new_tokens))
    return answers


def _too_large(rows: pa.Table, row: int, tokens: int) -> str:
    return (
        f"generating an answer for the row with example_id {rows['example_id'][row]}: its "
        f"{tokens} tokens (prompt and evaluation.max_new_tokens) do not fit into the GPU's memory "
        "beside the model. Lower evaluation.max_new_tokens, or raise scaling.evaluation.gpus."
    )


def _check_places(
    model: Any, prompts: Sequence[Sequence[int]], rows: pa.Table, max_new_tokens: int
) -> None:
    most = most_positions(model)
    for number, prompt in enumerate(prompts):
        if most is not None and len(prompt) + max_new_tokens > most:
            raise UserError(
                f"generating an answer for the row with example_id {rows['example_id'][number]}: "
                f"its prompt of {len(prompt)} tokens and evaluation.max_new_tokens = "
                f"{max_new_tokens} do not fit into the model's {most} positions. Leave out the "
                "row, or lower evaluation.max_new_tokens."
            )


def heeds_padding(model: Any, pad: int, device: Any) -> bool:
    """Whether a prompt that is padded on the left is continued as it is without padding."""
    import torch

    vocabulary = model.get_output_embeddings().weight.shape[0]
    prompt = torch.arange(1, 9, device=device)[None] % vocabulary
    scores = []
    for padding in (0, 8):
        filled = torch.full((1, padding), pad, device=device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=torch.cat([filled, prompt], 1),
                attention_mask=torch.cat([torch.zeros_like(filled), torch.ones_like(prompt)], 1),
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=pad,
                return_dict_in_generate=True,
                output_logits=True,
            )
        scores.append(made.logits[0][0].float())
    moved, spread = (scores[0] - scores[1]).abs().max(), scores[0].max() - scores[0].min()
    return bool(moved <= MOVED_BY_ROUNDING * spread)
