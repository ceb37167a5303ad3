"""Columns of lists of turns, as OpenAI's messages or ShareGPT's conversations have them."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import Columns
from s2l_ray.core.data.columns import PartColumns, is_list, is_text
from s2l_ray.core.data.json_text import BadValue, json_list, to_json_text, without_nulls
from s2l_ray.core.data.turns import ASSISTANT, ROLE_NAMES, ROLES, USER, Turns
from s2l_ray.errors import UserError

# Role, text, the JSON text of what else the turn has, and whether it is not to be learned.
Turn = tuple[int, str, str | None, bool]
# Keys by which data sets say of a turn whether it is learned: OpenAI, axolotl, ms-swift, torchtune.
LEARNED_KEYS = ("weight", "train", "training", "loss", "loss_weight")
MASKED_KEY = "masked"
# Keys of which parts of a turn are learned, which cannot be followed.
DETAIL_KEYS = ("train_detail", "training_detail")
# Keys of the text in a part of a content of several parts.
TEXT_KEYS = ("text", "value", "content")


class ChatReader:
    """Reads lists of turns, each an object with a role and a text.

    Args:
        given: the user's names of these keys and of roles; the usual ones where left out.
    """

    def __init__(self, given: Columns) -> None:
        self.given = given
        self.roles = {
            **ROLE_NAMES,
            **{name: ROLES.index(role) for name, role in given.roles.items()},
        }

    def turns(self, part: PartColumns, meaning: str, masked: bool = False) -> Turns:
        """The turns of a column of lists, or of lists written as JSON text.

        Args:
            masked: none of them is to be learned, whatever they say themselves.

        Raises:
            UserError: a column that holds neither.
        """
        column = part.values(meaning)
        one = meaning != "messages" and part.has_turns(meaning)
        if not (one or isinstance(column, list) or is_text(column.type) or is_list(column.type)):
            raise UserError(
                f"reading {part.uri}, field {part.names[meaning]!r}: expected lists of turns, got "
                f"{column.type}. Name another column with {part.section}.columns.{meaning}."
            )
        read = functools.partial(self.conversation, filled=not isinstance(column, list))
        return self._read(part, meaning, read, masked)

    def history(self, part: PartColumns) -> Turns:
        """The rounds before each row's instruction."""
        return self._read(part, "history", self._rounds, False)

    def _read(
        self,
        part: PartColumns,
        meaning: str,
        read: Callable[[Any], list[Turn]],
        masked: bool,
    ) -> Turns:
        rows: list[int] = []
        flat: list[Turn] = []
        for row, value in enumerate(part.objects(meaning)):
            try:
                turns = read(value)
            except BadValue as error:
                part.report(row, meaning, error.reason, error.detail)
                continue
            rows += [row] * len(turns)
            flat += turns
        role, content, extra, marked = zip(*flat, strict=True) if flat else ((), (), (), ())
        return Turns(
            np.array(rows, np.int64),
            np.array(role, np.int8),
            pa.array(content, pa.string()),
            pa.nulls(len(flat), pa.string()),
            pa.array(extra, pa.string()),
            (np.array(marked, bool) | masked) & (np.array(role, np.int8) == ASSISTANT),
        )

    def _rounds(self, value: Any) -> list[Turn]:
        """The turns of a list of [instruction, answer], or of a list of turns; none where it is
        empty.

        Raises:
            BadValue: it is neither.
        """
        if isinstance(value, str) and value.strip():
            value = json_list(value, "rounds")
        if not value:
            return []
        if isinstance(value, list) and isinstance(value[0], dict):
            return self.conversation(value)
        if not isinstance(value, list) or not all(map(_is_round, value)):
            raise BadValue("expected a list of rounds, each [instruction, answer]")
        pairs = zip((USER, ASSISTANT) * len(value), itertools.chain(*value), strict=True)
        return [(role, text, None, False) for role, text in pairs]

    def conversation(self, value: Any, filled: bool = False) -> list[Turn]:
        """The turns of one row.

        Args:
            filled: nulls may be those of a columnar file, which has every key of any row in all.

        Raises:
            BadValue: no list of turns.
        """
        if isinstance(value, str):
            value, filled = json_list(value, "turns"), False
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            raise BadValue(f"expected a list of turns, got {type(value).__name__}")
        if not value:
            raise BadValue("expected turns, got an empty conversation")
        return [self._turn(turn, number, filled) for number, turn in enumerate(value, 1)]

    def _turn(self, turn: Any, number: int, filled: bool) -> Turn:
        if not isinstance(turn, dict):
            raise BadValue(
                f"expected turns that are objects, got {type(turn).__name__}", f", turn {number}"
            )
        role_key = self.given.role or _present(turn, "role", "from")
        text_key = self.given.content or _present(turn, "content", "value")
        name = turn.get(role_key)
        role = self.roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise BadValue(
                f"expected a known role under the key {role_key!r}",
                f", got {name!r} in turn {number}; {self.given.section}.columns.roles can tell "
                "what it means",
            )
        if len(turn) == 2 and text_key in turn:
            extra: dict[str, Any] = {}
        else:
            extra = {k: v for k, v in turn.items() if k not in (role_key, text_key)}
            # Of rows of JSON a null inside of a value is one that somebody wrote.
            extra = (
                without_nulls(extra)
                if filled
                else {k: v for k, v in extra.items() if v is not None}
            )
        if not extra.get("tool_calls"):
            extra.pop("tool_calls", None)
        text = _text(turn.get(text_key), text_key, number, "tool_calls" in extra)
        if (
            role in (USER, ASSISTANT)
            and not extra.get("tool_calls")
            and (not text or text.isspace())
        ):
            raise BadValue(f"expected text, got an empty {ROLES[role]} turn", f", turn {number}")
        return role, text, to_json_text(extra) if extra else None, _masked(extra, number)


def _masked(extra: dict[str, Any], number: int) -> bool:
    """Whether a turn says of itself that it is not to be learned.

    Raises:
        BadValue: it says neither yes nor no, such as a weight between 0 and 1.
    """
    for key in DETAIL_KEYS:
        if extra.get(key):
            raise BadValue(
                f"expected turns that are learned whole or not at all, got the key {key!r}",
                f", turn {number}",
            )
    said = {key: extra[key] for key in (*LEARNED_KEYS, MASKED_KEY) if key in extra}
    for key, value in said.items():
        if value not in (0, 1):
            raise BadValue(
                f"expected 0 or 1, false or true, under the key {key!r}, which says whether a turn "
                "is learned",
                f", got {value!r} in turn {number}",
            )
    return any(value == (key == MASKED_KEY) for key, value in said.items())


def _is_round(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(text, str) and text.strip() for text in value)
    )


def _present(turn: dict[str, Any], key: str, other: str) -> str:
    """The first of two keys that has a value; the first where none has."""
    return other if turn.get(key) is None and other in turn else key


def _text(content: Any, key: str, number: int, calls: bool) -> str:
    """The text of a turn: a string, a list's parts of text joined, or nothing where tools are
    called."""
    if isinstance(content, str):
        return content
    if content is None and calls:
        return ""
    if not isinstance(content, list):
        raise BadValue(
            f"expected text under the key {key!r}, got {type(content).__name__}", f", turn {number}"
        )
    pieces = []
    for piece in content:
        text = piece
        if isinstance(piece, dict) and piece.get("type") == "text":
            text = next((piece[name] for name in TEXT_KEYS if piece.get(name) is not None), None)
        if not isinstance(text, str):
            kind = piece.get("type") if isinstance(piece, dict) else type(piece).__name__
            raise BadValue(
                f"expected nothing but parts of text under the key {key!r}",
                f", got one of type {kind!r} in turn {number}",
            )
        pieces.append(text)
    return "".join(pieces)
