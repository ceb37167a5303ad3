"""Greedy answers of a model to the prompts of rows."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.core.text.batching import token_batches
from s2l_ray.core.text.encoding import Encoder


def decode(
    model: Any,
    encoder: Encoder,
    rows: pa.Table,
    max_new_tokens: int,
    tokens_per_batch: int,
    device: Any,
) -> list[str]:
    """The model's greedy answer to each row's prompt.

    Args:
        max_new_tokens: an answer ends there, unless a token of `encoder.stops` ends it before.
        tokens_per_batch: padded tokens of a batch, those of the answers included.

    Raises:
        UserError: a row that cannot be rendered.
    """
    import torch

    prompts = encoder.prompts(rows)
    answers = [""] * len(prompts)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in token_batches(lengths, tokens_per_batch):
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
