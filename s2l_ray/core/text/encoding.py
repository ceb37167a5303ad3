"""Rows to token ids, with a mark on every token that is learned.

A renderer makes text with learned ranges of characters out of a conversation. The text is tokenised
as a whole, and a token is learned if one of its characters is. Prompt and answer are not tokenised
apart, as a token that spans their border would then shift the mask.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.core.text.chat_template import ChatRenderer
from s2l_ray.core.text.headings import HeadingRenderer
from s2l_ray.core.text.rendering import Piece, Renderer
from s2l_ray.core.text.turns import Refused, Turn, asked, turns_of
from s2l_ray.errors import UserError

# Rows that are rendered together.
ROWS_AT_ONCE = 512
# Characters that are tokenised together: the results, hundreds of bytes a token, stay in the cache.
CHARACTERS_AT_ONCE = 1 << 15
NO_LEARNED_TOKEN = "no learned token within max_length"


@dataclass(frozen=True)
class Encoded:
    """One tokenised example of L >= 2 tokens.

    Attributes:
        input_ids: int32 [L].
        learned: bool [L], True where the token counts in the loss; never at 0.
        reason: why nothing is learned of the row; None where something is.
    """

    example_id: int
    input_ids: np.ndarray
    learned: np.ndarray
    reason: str | None = None


class Encoder:
    """Encodes rows with one tokenizer, one renderer and one largest length.

    Args:
        tokenizer: a fast one of transformers.
        prompt: alpaca, plain or chat.
        max_length: tokens that are kept of a row.
        learn: all (every assistant turn), last (the last one) or everything (all tokens but the
            first).
        truncation: the side on which longer rows are cut. On the left, a start token stays.
        template: text of a Jinja chat template in place of the tokenizer's own, for chat.
        thoughts: whether a template must show the thoughts of learned answers.

    Attributes:
        start: id of the start token, as a list; empty where the tokenizer sets none.
        end, pad: ids of the end token and for padding.
        stops: ids that end an answer.

    Raises:
        UserError: a slow tokenizer, one without an end token, or (for chat) without a template, or
            a template that is not Jinja.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: str,
        max_length: int,
        learn: str = "all",
        truncation: str = "right",
        template: str | None = None,
        thoughts: bool = True,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "loading the tokenizer: expected a fast one (tokenizer.json), which knows the "
                "offsets of its tokens."
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "loading the tokenizer: it has no end token, so no answer could end. Set eos_token "
                "in its files."
            )
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.end: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end
        self.stops = [self.end]
        self.start: list[int] = []
        self.bos: int | None = tokenizer.bos_token_id
        self.renderer: Renderer
        if prompt == "chat":
            # A chat template writes the start token itself.
            self.renderer = chat = ChatRenderer(tokenizer, template, learn, thoughts)
            self.stops += tokenizer.convert_tokens_to_ids(chat.closing)
        else:
            self.renderer = HeadingRenderer(prompt, learn)
            self.start = [self.bos] if tokenizer("a")["input_ids"][:1] == [self.bos] else []
        self.backend = _bare_backend(tokenizer, specials_are_text=prompt != "chat")

    def examples(self, rows: pa.Table) -> list[Encoded]:
        """Each row (columns example_id, messages, tools), cut at `max_length` tokens."""
        encoded: list[Encoded] = []
        for first in range(0, rows.num_rows, ROWS_AT_ONCE):
            some = rows.slice(first, ROWS_AT_ONCE)
            rendered = [self._rendered(turns, tools) for turns, tools in turns_of(some)]
            ids = some["example_id"].to_pylist()
            for group in _groups(rendered):
                encoded += self._encode(ids[group], rendered[group])
        return encoded

    def prompts(self, rows: pa.Table, asking: str = "") -> list[list[int]]:
        """Token ids of all that comes before each row's last assistant turn.

        Args:
            asking: text that is put behind the last question.

        Raises:
            UserError: a row that cannot be rendered.
        """
        prompts: list[list[int]] = []
        for turns, tools in turns_of(rows):
            try:
                pieces = self.renderer.prompt(asked(turns, asking), tools)
            except Refused as refused:
                number = rows["example_id"][len(prompts)].as_py()
                raise UserError(
                    f"generating an answer for the row with example_id {number}: {refused}."
                ) from None
            ids = list(self.start)
            encodings = self._tokenised([piece.text for piece in pieces])
            for piece, tokens in zip(pieces, encodings, strict=True):
                ids += [*tokens.ids, self.end] if piece.end is not None else tokens.ids
            prompts.append(ids)
        return prompts

    def check_vocabulary(self, size: int, what: str) -> None:
        """Refuse a tokenizer that can make ids the model has no embedding for."""
        if len(self.tokenizer) > size:
            raise UserError(
                f"loading {what}: the tokenizer has {len(self.tokenizer)} tokens, but the model "
                f"only {size} embeddings. Name the tokenizer that belongs to the model, or raise "
                "vocab_size in model.config."
            )

    def _rendered(self, turns: list[Turn], tools: str | None) -> list[Piece] | Refused:
        try:
            return self.renderer.example(turns, tools)
        except Refused as refused:
            return refused

    def _tokenised(self, texts: list[str]) -> list[Any]:
        encodings: list[Any] = self.backend.encode_batch(texts, add_special_tokens=False)
        return encodings

    def _encode(
        self, example_ids: list[int], rendered: list[list[Piece] | Refused]
    ) -> list[Encoded]:
        accepted = [row for row in rendered if not isinstance(row, Refused)]
        encodings = iter(self._tokenised([piece.text for row in accepted for piece in row]))
        tokens = _joined(accepted, encodings, self.start, self.end)
        return [
            _unlearned(example_id, np.empty(0, np.int32), self.end, str(row))
            if isinstance(row, Refused)
            else self._cut(example_id, *next(tokens))
            for example_id, row in zip(example_ids, rendered, strict=True)
        ]

    def _cut(self, example_id: int, ids: np.ndarray, learned: np.ndarray) -> Encoded:
        """At most `max_length` tokens of a row, the first of them not learned."""
        cut = len(ids) - self.max_length
        if cut > 0 and self.truncation == "right":
            ids, learned = ids[: self.max_length], learned[: self.max_length]
        elif cut > 0:
            kept = int(ids[0] == self.bos)
            ids = np.concatenate([ids[:kept], ids[cut + kept :]])
            learned = np.concatenate([learned[:kept], learned[cut + kept :]])
        # No token comes before the first one, so nothing predicts it.
        learned[:1] = False
        if not learned.any():
            return _unlearned(example_id, ids, self.end, NO_LEARNED_TOKEN)
        return Encoded(example_id, ids, learned)


def _joined(
    rows: list[list[Piece]], encodings: Iterator[Any], start: list[int], end: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and learned tokens of each row, as views of two arrays over the tokens of all rows.

    Args:
        encodings: of each piece, in order.
        start: what comes before each row.
        end: the token that comes after the pieces that ask for it.
    """
    ids: list[list[int]] = []
    ranges: list[tuple[int, int]] = []
    ends, reached = [], 0
    for row in rows:
        ids.append(start)
        reached += len(start)
        for piece in row:
            encoding = next(encodings)
            piece_ids = encoding.ids
            for span in piece.spans:
                first, stop = _tokens_of(span, encoding, len(piece_ids))
                ranges.append((reached + first, reached + stop))
            ids.append(piece_ids)
            reached += len(piece_ids)
            if piece.end is not None:
                ids.append([end])
                if piece.end:
                    ranges.append((reached, reached + 1))
                reached += 1
        ends.append(reached)
    all_ids = np.fromiter(itertools.chain.from_iterable(ids), np.int32, reached)
    learned = np.zeros(reached, bool)
    for first, stop in ranges:
        learned[first:stop] = True
    for first, stop in zip([0, *ends], ends, strict=False):
        yield all_ids[first:stop], learned[first:stop]


def _unlearned(example_id: int, ids: np.ndarray, end: int, reason: str) -> Encoded:
    """A row without a learned token, filled up to two tokens, the fewest that have a loss."""
    ids = np.concatenate([ids, np.full(max(0, 2 - len(ids)), end, np.int32)])
    return Encoded(example_id, ids, np.zeros(len(ids), bool), reason)


def _bare_backend(tokenizer: Any, specials_are_text: bool) -> Any:
    """A copy of the tokenizer that only makes tokens: it neither cuts, pads nor post-processes.

    Args:
        specials_are_text: the name of a special token in a text is text and ends nothing.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    # A post-processor adds special tokens, which `Encoder` does, and may trim white space from the
    # offsets, which would leave it unlearned.
    backend.post_processor = None
    backend.encode_special_tokens = specials_are_text
    return backend


def _groups(rendered: list[list[Piece] | Refused]) -> Iterator[slice]:
    """Ranges of rows with at most CHARACTERS_AT_ONCE, or of one row that is longer."""
    first, characters = 0, 0
    for number, row in enumerate(rendered):
        length = 0 if isinstance(row, Refused) else sum(len(piece.text) for piece in row)
        if characters + length > CHARACTERS_AT_ONCE and number > first:
            yield slice(first, number)
            first, characters = number, 0
        characters += length
    yield slice(first, len(rendered))


def _tokens_of(span: tuple[int, int], tokens: Any, count: int) -> tuple[int, int]:
    """The tokens [first, end) with a character in a span, by bisection: offsets never decrease."""
    first = bisect_right(range(count), span[0], key=lambda number: tokens.token_to_chars(number)[1])
    end = bisect_left(
        range(count), span[1], lo=first, key=lambda number: tokens.token_to_chars(number)[0]
    )
    return first, end


def some_end(encoded: Sequence[Encoded], encoder: Encoder) -> bool:
    """Whether any row learns a token that ends an answer; rows that were cut do not count."""
    whole = [
        example
        for example in encoded
        if example.reason is None and len(example.input_ids) < encoder.max_length
    ]
    return not whole or any(
        bool(np.isin(example.input_ids[example.learned], encoder.stops).any()) for example in whole
    )


def check_some_learned(encoded: Sequence[Encoded], section: str) -> None:
    """Refuse rows of which not one has a learned token: the section does not fit the data."""
    if any(example.reason is None for example in encoded):
        return
    reasons = Counter(example.reason for example in encoded)
    counted = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    raise UserError(
        f"preparing the {section}: of the first {len(encoded)} rows not one has a token to learn "
        f"({counted}; the row with example_id {encoded[0].example_id} first). Change "
        f"{section}.prompt, template, learn, truncation or max_length."
    )
