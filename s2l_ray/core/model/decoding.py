"""Greedy answers of a model to the prompts of rows."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.core.model.architecture import most_positions
from s2l_ray.core.text.batching import token_batches
from s2l_ray.core.text.encoding import Encoder
from s2l_ray.errors import UserError

# Share of the spread of logits by which padding may move them in bf16. Where a family that heeds
# padding moves more, decoding is slower and answers the same.
MOVED_BY_ROUNDING = 0.02


def decode(
    model: Any,
    encoder: Encoder,
    rows: pa.Table,
    max_new_tokens: int,
    tokens_per_batch: int,
    device: Any,
) -> list[str]:
    """The model's greedy answer to each row's prompt.

    A family that takes no notice of padding on the left gets one prompt at a time.

    Args:
        max_new_tokens: an answer ends there, unless a token of `encoder.stops` ends it before.
        tokens_per_batch: padded tokens of a batch, those of the answers included.

    Raises:
        UserError: a row that cannot be rendered, or whose prompt leaves no place for the answer.
    """
    import torch

    prompts = encoder.prompts(rows)
    _check_places(model, prompts, rows, max_new_tokens)
    answers = [""] * len(prompts)
    for batch in _batches(model, prompts, max_new_tokens, tokens_per_batch, encoder.pad, device):
        length = max(len(prompts[row]) for row in batch)
        ids_BL = np.full((len(batch), length), encoder.pad, np.int64)
        real_BL = np.zeros((len(batch), length), np.int64)
        # Prompts are padded on the left, so that all answers begin at the same place.
        for number, row in enumerate(batch):
            ids_BL[number, length - len(prompts[row]) :] = prompts[row]
            real_BL[number, length - len(prompts[row]) :] = 1
        with torch.inference_mode():
            made_BL = model.generate(
                input_ids=torch.from_numpy(ids_BL).to(device),
                attention_mask=torch.from_numpy(real_BL).to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=encoder.stops,
                pad_token_id=encoder.pad,
            ).cpu()
        for number, row in enumerate(batch):
            new = made_BL[number, length:].tolist()
            new = list(itertools.takewhile(lambda token: token not in encoder.stops, new))
            answers[row] = encoder.tokenizer.decode(new, skip_special_tokens=True)
    return answers


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


def _batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    tokens_per_batch: int,
    pad: int,
    device: Any,
) -> Iterator[list[int]]:
    """Numbers of the prompts that are continued together."""
    if heeds_padding(model, pad, device):
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        yield from token_batches(lengths, tokens_per_batch)
    else:
        # Not even prompts of one length: rwkv of transformers 5 mixes up the states of a batch.
        yield from ([number] for number in range(len(prompts)))


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
