"""Rows to token ids, with a mark on every token that is learned.

Conversations become text with learned ranges of characters (templates). The text is tokenised as a whole, and a token is learned if
a character of it is: no merge across the border of prompt and answer can shift the mask (reference bug 15).
"""

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.core.text.templates import (
    Chat,
    Piece,
    Refused,
    Renderer,
    Turn,
    Written,
    answer_text,
    last_answer,
)
from s2l_ray.errors import UserError

BYTES = "bytes"
# Rendered together; and tokenised together, few enough for the results, hundreds of bytes a token, to stay in the cache.
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 512, 1 << 15
BYTE_END, BYTE_PAD = 256, 257
NO_LEARNED_TOKEN = "no learned token within max_length"


@dataclass(frozen=True)
class Encoded:
    """One tokenised example: ids int32 [L], and learned bool [L], True where the token counts in the loss; never at 0.

    `reason` says why nothing is learned of a row; L is at least 2 then too.
    """

    example_id: int
    input_ids: np.ndarray
    learned: np.ndarray
    reason: str | None = None


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without files: ids 0-255 are bytes, then the end and the padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from code point 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }
    tokenizer = Tokenizer(models.BPE({symbols[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    if (fast.eos_token_id, fast.pad_token_id) != (BYTE_END, BYTE_PAD):
        raise RuntimeError(
            f"byte tokenizer: expected end and pad at {BYTE_END, BYTE_PAD}, got {fast.eos_token_id, fast.pad_token_id}"
        )
    return fast


def prompt_and_answer(messages: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What is asked and what the last assistant turn answers, as plain text for people; who speaks is only told in long conversations."""
    turns = [Turn(**message) for message in messages]
    last = last_answer(turns)
    told = [
        (turn.role, f"{turn.content}\n{turn.input}" if turn.input else turn.content)
        for turn in turns[:last]
    ]
    asked = told[0][1] if len(told) == 1 else "\n".join(f"{role}: {text}" for role, text in told)
    return asked, answer_text(turns[last])


def conversations(rows: pa.Table) -> Iterator[tuple[list[Turn], str | None]]:
    """The turns and tools of each row (columns messages, tools); the lists are read flat, as columns over all turns."""
    lists = rows["messages"].combine_chunks()
    flat = lists.flatten()
    turns = list(
        map(Turn._make, zip(*(flat.field(name).to_pylist() for name in Turn._fields), strict=True))
    )
    ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False)).tolist()
    for first, end, tools in zip([0, *ends], ends, rows["tools"].to_pylist(), strict=False):
        yield turns[first:end], tools


class Encoder:
    """Turns rows into token ids by one tokenizer, one way of rendering and one length.

    Args:
        tokenizer: a fast one of transformers.
        prompt: alpaca, plain or chat.
        max_length: tokens that are kept of a row.
        learn: all (every assistant turn), last (the last one) or everything (all tokens but the first).
        truncation: the side on which longer rows are cut. On the left, a start token stays.
        template: text of a Jinja chat template in place of the tokenizer's own, for chat.

    Attributes:
        start, end, pad: ids of the start token (empty where the tokenizer sets none), of the end token, and for padding.
        stops: ids that end an answer.

    Raises:
        UserError: a slow tokenizer, one without an end token, or (for chat) without a template, or a template that is not Jinja.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: str,
        max_length: int,
        learn: str = "all",
        truncation: str = "right",
        template: str | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "loading the tokenizer: expected a fast one (tokenizer.json), which knows the offsets of its tokens."
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "loading the tokenizer: it has no end token, so no answer could end. Set eos_token in its files."
            )
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.end: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end
        self.stops = [self.end]
        self.start: list[int] = []
        self.bos: int | None = tokenizer.bos_token_id
        self.renderer: Renderer
        if prompt == "chat":  # the template writes the start token itself, if there is to be one
            self.renderer = chat = Chat(tokenizer, template, learn)
            self.stops += tokenizer.convert_tokens_to_ids(chat.closing)
        else:
            self.renderer = Written(prompt, learn)
            self.start = [self.bos] if tokenizer("a")["input_ids"][:1] == [self.bos] else []
        self.backend = _bare_backend(tokenizer, specials_are_text=prompt != "chat")

    def examples(self, rows: pa.Table) -> list[Encoded]:
        """One Encoded a row (columns example_id, messages, tools), cut at `max_length` tokens."""
        encoded: list[Encoded] = []
        for first in range(0, rows.num_rows, ROWS_AT_ONCE):
            some = rows.slice(first, ROWS_AT_ONCE)
            rendered = [self._rendered(turns, tools) for turns, tools in conversations(some)]
            ids = some["example_id"].to_pylist()
            for group in _groups(rendered):
                encoded += self._encode(ids[group], rendered[group])
        return encoded

    def _rendered(self, turns: list[Turn], tools: str | None) -> list[Piece] | Refused:
        try:
            return self.renderer.example(turns, tools)
        except Refused as refused:
            return refused

    def _encode(
        self, example_ids: list[int], rendered: list[list[Piece] | Refused]
    ) -> list[Encoded]:
        """The tokens of all rows in one array, of which each row is a view."""
        pieces = [row for row in rendered if not isinstance(row, Refused)]
        tokens = iter(self._tokens([piece.text for row in pieces for piece in row]))
        ids: list[list[int]] = []
        learned_ranges: list[tuple[int, int]] = []
        ends, reached = [], 0
        for row in pieces:
            ids.append(self.start)
            reached += len(self.start)
            for piece in row:
                encoding = next(tokens)
                piece_ids = encoding.ids
                learned_ranges += [
                    (reached + first, reached + end)
                    for first, end in (
                        _tokens_of(span, encoding, len(piece_ids)) for span in piece.spans
                    )
                ]
                ids.append(piece_ids)
                reached += len(piece_ids)
                if piece.end is not None:
                    ids.append([self.end])
                    learned_ranges += [(reached, reached + 1)] * piece.end
                    reached += 1
            ends.append(reached)
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, reached)
        learned = np.zeros(reached, bool)
        for first, end in learned_ranges:
            learned[first:end] = True
        bounds = iter(zip([0, *ends], ends, strict=False))
        return [
            self._refused(example_id, row)
            if isinstance(row, Refused)
            else self._cut(example_id, flat, learned, *next(bounds))
            for example_id, row in zip(example_ids, rendered, strict=True)
        ]

    def _cut(
        self, example_id: int, flat: np.ndarray, flat_learned: np.ndarray, first: int, end: int
    ) -> Encoded:
        """A row's share of the flat arrays, at most `max_length` tokens of it and at least two."""
        ids, learned = flat[first:end], flat_learned[first:end]
        if len(ids) > self.max_length and self.truncation == "right":
            ids, learned = ids[: self.max_length], learned[: self.max_length]
        elif len(ids) > self.max_length:
            kept = int(ids[0] == self.bos)
            ids = np.concatenate([ids[:kept], ids[len(ids) - self.max_length + kept :]])
            learned = np.concatenate(
                [learned[:kept], learned[len(learned) - self.max_length + kept :]]
            )
        learned[:1] = False  # nothing comes before it, from which it could be told
        if not learned.any():
            return self._unlearned(example_id, ids, NO_LEARNED_TOKEN)
        return Encoded(example_id, ids, learned)

    def _refused(self, example_id: int, refused: Refused) -> Encoded:
        return self._unlearned(example_id, np.empty(0, np.int32), str(refused))

    def _unlearned(self, example_id: int, ids: np.ndarray, reason: str) -> Encoded:
        """Nothing learned; filled up to two tokens, the fewest that a loss can be asked of."""
        ids = np.concatenate([ids, np.full(max(0, 2 - len(ids)), self.end, np.int32)])
        return Encoded(example_id, ids, np.zeros(len(ids), bool), reason)

    def prompts(self, rows: pa.Table) -> list[list[int]]:
        """Token ids of all that comes before each row's last assistant turn, from which its answer is generated.

        Raises:
            UserError: a row that cannot be rendered.
        """
        prompts: list[list[int]] = []
        for turns, tools in conversations(rows):
            try:
                pieces = self.renderer.prompt(turns, tools)
            except Refused as refused:
                number = rows["example_id"][len(prompts)].as_py()
                raise UserError(
                    f"generating an answer for the row with example_id {number}: {refused}."
                ) from None
            ids = list(self.start)
            for piece, tokens in zip(
                pieces, self._tokens([piece.text for piece in pieces]), strict=True
            ):
                ids += [*tokens.ids, self.end] if piece.end is not None else tokens.ids
            prompts.append(ids)
        return prompts

    def _tokens(self, texts: list[str]) -> list[Any]:
        encodings: list[Any] = self.backend.encode_batch(texts, add_special_tokens=False)
        return encodings

    def check_vocabulary(self, size: int, what: str) -> None:
        """Refuse a tokenizer that can make ids the model has no embedding for."""
        if len(self.tokenizer) > size:
            raise UserError(
                f"loading {what}: the tokenizer has {len(self.tokenizer)} tokens, but the model only {size} embeddings. "
                "Name the tokenizer that belongs to the model, or raise vocab_size in model.config."
            )


def _bare_backend(tokenizer: Any, specials_are_text: bool) -> Any:
    """The tokenizer without cutting, padding and what comes after tokens are made; not shared with `tokenizer`, which callers use.

    Args:
        specials_are_text: the name of a special token in a text is text and ends nothing.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    # It could only add special tokens, which is done here, and take white space out of the offsets, which would unlearn it.
    backend.post_processor = None
    backend.encode_special_tokens = specials_are_text
    return backend


def _groups(rendered: list[list[Piece] | Refused]) -> Iterator[slice]:
    """Ranges of rows that are tokenised together: more than one only while their texts are short."""
    first, characters = 0, 0
    for number, row in enumerate(rendered):
        length = 0 if isinstance(row, Refused) else sum(len(piece.text) for piece in row)
        if characters + length > CHARACTERS_AT_ONCE and number > first:
            yield slice(first, number)
            first, characters = number, 0
        characters += length
    yield slice(first, len(rendered))


def _tokens_of(span: tuple[int, int], tokens: Any, count: int) -> tuple[int, int]:
    """The tokens [first, end) with a character in a span; offsets never fall, so they are found by halving."""
    first = bisect_right(range(count), span[0], key=lambda number: tokens.token_to_chars(number)[1])
    end = bisect_left(
        range(count), span[1], lo=first, key=lambda number: tokens.token_to_chars(number)[0]
    )
    return first, end


def check_some_learned(encoded: Sequence[Encoded], section: str) -> None:
    """Refuse rows of which not one has a learned token: the section's fields do not fit the data."""
    if any(example.reason is None for example in encoded):
        return
    reasons = Counter(example.reason for example in encoded)
    counted = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    raise UserError(
        f"preparing the {section}: of the first {len(encoded)} rows not one has a token to learn ({counted}; the row with example_id "
        f"{encoded[0].example_id} first). Change {section}.prompt, template, learn, truncation or max_length."
    )


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
