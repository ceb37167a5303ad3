"""Rows to token ids, with a mark on every token that is learned.

The text is tokenised as a whole and tokens are told apart by their character offsets, so no merge across the border of prompt
and answer can shift the mask (reference bug 15). The end token closes every answer and is learned.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.errors import UserError

BYTES = "bytes"
ROWS_AT_ONCE = (
    512  # given to the tokenizer; its results weigh hundreds of bytes a token until they are arrays
)
BYTE_END, BYTE_PAD = 256, 257
NO_LEARNED_TOKEN = "no learned token within max_length"

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Encoded:
    """One tokenised example: ids int32 [L], and learned bool [L], True where the token counts in the loss; never at 0."""

    example_id: int
    input_ids: np.ndarray
    learned: np.ndarray


def prompt_text(style: str, instruction: str, input: str | None) -> str:
    """The masked text of a row, under the paper's prompt (`alpaca`) or as its bare columns (`plain`)."""
    if style == "plain":
        return f"{instruction}\n{input}\n" if input else f"{instruction}\n"
    if input:
        return ALPACA_INPUT.format(instruction=instruction, input=input)
    return ALPACA.format(instruction=instruction)


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without files: ids 0-255 are bytes, then the end and the padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from code point 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({symbols[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    if (fast.eos_token_id, fast.pad_token_id) != (BYTE_END, BYTE_PAD):
        raise RuntimeError(
            f"byte tokenizer: expected end and pad at {BYTE_END, BYTE_PAD}, got {fast.eos_token_id, fast.pad_token_id}"
        )
    return fast


class Encoder:
    """Turns rows into token ids by one tokenizer, one prompt style and one length."""

    def __init__(self, tokenizer: Any, prompt: str, max_length: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "loading the tokenizer: expected a fast one (tokenizer.json), which knows the offsets of its tokens."
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "loading the tokenizer: it has no end token, so no answer could end. Set eos_token in its files."
            )
        tokenizer.truncation_side = "right"  # whatever its files say
        self.tokenizer, self.prompt, self.max_length = tokenizer, prompt, max_length
        self.end: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end
        with_specials = tokenizer("a")["input_ids"]
        self.start: list[int] = (
            [tokenizer.bos_token_id] if with_specials[:1] == [tokenizer.bos_token_id] else []
        )

    def examples(self, rows: pa.Table) -> list[Encoded]:
        """One Encoded a row (columns example_id, instruction, input, output), cut on the right at `max_length` tokens."""
        encoded: list[Encoded] = []
        for first in range(0, rows.num_rows, ROWS_AT_ONCE):
            encoded += self._examples(rows.slice(first, ROWS_AT_ONCE))
        return encoded

    def _examples(self, rows: pa.Table) -> list[Encoded]:
        prompts = self._prompts(rows)
        batch = self.tokenizer(
            [prompt + output for prompt, output in zip(prompts, rows["output"].to_pylist(), strict=True)],
            add_special_tokens=False,
            split_special_tokens=True,  # the end token's name in a user's text is text and ends nothing
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            verbose=False,
        )
        encoded = []
        for example_id, tokens, prompt in zip(
            rows["example_id"].to_pylist(), batch.encodings, prompts, strict=True
        ):
            ids = np.array([*self.start, *tokens.ids, self.end][: self.max_length], np.int32)
            learned = np.arange(len(ids)) >= max(1, len(self.start) + _first_learned(tokens, len(prompt)))
            encoded.append(Encoded(example_id, ids, learned))
        return encoded

    def prompts(self, rows: pa.Table) -> list[list[int]]:
        """Token ids of each row's prompt alone, from which an answer is generated."""
        texts = self._prompts(rows)
        if not texts:
            return []
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [[*self.start, *ids] for ids in batch["input_ids"]]

    def _prompts(self, rows: pa.Table) -> list[str]:
        pairs = zip(rows["instruction"].to_pylist(), rows["input"].to_pylist(), strict=True)
        return [prompt_text(self.prompt, instruction, input) for instruction, input in pairs]

    def check_vocabulary(self, size: int, what: str) -> None:
        """Refuse a tokenizer that can make ids the model has no embedding for."""
        if len(self.tokenizer) > size:
            raise UserError(
                f"loading {what}: the tokenizer has {len(self.tokenizer)} tokens, but the model only {size} embeddings. "
                "Name the tokenizer that belongs to the model, or raise vocab_size in model.config."
            )


def _first_learned(tokens: Any, border: int) -> int:
    """The first token that holds a character at or after `border`; the number of tokens where none does."""
    return bisect_right(range(len(tokens.ids)), border, key=lambda number: tokens.token_to_chars(number)[1])


def pad(batch: Sequence[Encoded], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded input_ids int64 [B, L] and learned bool [B, L]; an empty batch gives [1, 2] without a learned token."""
    length = max([len(example.input_ids) for example in batch], default=2)
    input_ids_BL = np.full((max(1, len(batch)), length), pad_id, np.int64)
    learned_BL = np.zeros(input_ids_BL.shape, bool)
    for row, example in enumerate(batch):
        input_ids_BL[row, : len(example.input_ids)] = example.input_ids
        learned_BL[row, : len(example.learned)] = example.learned
    return input_ids_BL, learned_BL


def token_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Row numbers cut into batches of at most `tokens_per_batch` padded tokens, similar lengths together, longest first."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    while order:
        fits = max(1, tokens_per_batch // max(1, lengths[order[0]]))
        batches.append(order[:fits])
        order = order[fits:]
    return batches
