"""What becomes of each column of raw rows, decided in one place.

A column is part of the conversation, or the source; or it is kept only as data. A column that looks
like conversation must be in the text: what of it stands in no text stops the run, until the user
names the column or leaves it out.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from s2l_ray.config import Columns
from s2l_ray.core.data.columns import PartColumns, column_names, is_list, preferences
from s2l_ray.core.data.conversations import conversations
from s2l_ray.core.data.formats.spans import Column, Rows
from s2l_ray.errors import UserError

DATA = "kept only as data"
# Columns with these names look like conversation, as what they may be named. One whose text is
# named by another column, as output may be, is a text that the user decided against.
LOOKS_LIKE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("instruction", "prompt", "question", "query"), ("instruction",)),
    **dict.fromkeys(("input", "context", "passage", "document"), ("input",)),
    **dict.fromkeys(("output", "response", "completion", "answer"), ("output",)),
    **dict.fromkeys(("chosen", "rejected"), ("output", "messages")),
    **dict.fromkeys(("messages", "conversations", "conversation"), ("messages", "instruction")),
    "history": ("history",),
    **dict.fromkeys(("system", "system_prompt"), ("system",)),
    **dict.fromkeys(("tools", "functions"), ("tools",)),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking", "thought"), ()),
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
OF_PAIRS = ("input", "history")
# What a turn names its parts by: no text of the conversation.
NO_TEXT = ("role", "from", "type")


class Use(NamedTuple):
    """What becomes of a column: what it is part of, or DATA."""

    column: str
    becomes: str


def column_uses(rows: Rows, given: Columns, uri: str) -> list[Use]:
    """What becomes of the columns, by some rows of a file; bad rows are passed over.

    Raises:
        UserError: a column that looks like conversation is in no text.
    """
    if not rows.columns:
        return []
    good_N = np.ones(len(rows.numbers), bool)

    def bad(row: int, reason: str, detail: str) -> None:
        good_N[row] = False

    names = column_names(list(rows.columns), given, uri)
    part = PartColumns(rows.columns, len(rows.numbers), names, uri, given.section, bad)
    made = conversations(part, given)
    check_all_read(rows, part, made, given, good_N)
    return uses_of(list(rows.columns), names)


def uses_of(present: Sequence[str], names: dict[str, str]) -> list[Use]:
    """What becomes of the columns that a file has.

    Args:
        names: meaning -> column name, from `column_names`.
    """
    meanings = {name: meaning for meaning, name in names.items()}
    return [Use(name, meanings.get(name, DATA)) for name in present]


def check_all_read(
    rows: Rows, part: PartColumns, made: dict[str, pa.Array], given: Columns, good_N: np.ndarray
) -> None:
    """Refuse columns that look like conversation and have text that is in no text.

    Args:
        made: the conversations, from `conversations`.
        good_N: the rows to look at.
    """
    texts: list[str] | None = None
    for name, column in rows.columns.items():
        if name in part.names.values() or not _looks_like_conversation(name, column, given):
            continue
        texts = texts or _texts(made)
        values = column if isinstance(column, list) else column.to_pylist()
        for row in np.flatnonzero(good_N).tolist():
            if not _is_read(name, values[row], texts[row]):
                raise _unread(name, int(rows.numbers[row]), part, given)


def _looks_like_conversation(name: str, column: Column, given: Columns) -> bool:
    if name in LOOKS_LIKE:
        return all(getattr(given, meaning) is None for meaning in LOOKS_LIKE[name])
    if name == "label" or name in MEDIA:
        return True
    if not isinstance(column, list):
        if not is_list(column.type):
            return False
        column = column.slice(0, 1).to_pylist()
    first = next((value for value in column if value is not None), None)
    return isinstance(first, list) and bool(first) and _is_turn(first[0])


def _is_turn(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool({"role", "from"} & value.keys())
        and bool({"content", "value"} & value.keys())
    )


def _is_read(name: str, value: Any, text: str) -> bool:
    """Whether all that a value says is in the text of its row's conversation."""
    if name == "label":
        return str(value).lower() != "false"
    if name in MEDIA:
        return not value
    return all(said.strip() in text for said in _strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in NO_TEXT:
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _texts(made: dict[str, pa.Array]) -> list[str]:
    """All text of each row's conversation."""
    turns = made["messages"].to_pylist()
    return [
        "\n".join(
            [
                tools or "",
                *(turn[key] or "" for turn in row for key in ("content", "input", "extra")),
            ]
        )
        for row, tools in zip(turns, made["tools"].to_pylist(), strict=True)
    ]


def _unread(name: str, row: int, part: PartColumns, given: Columns) -> UserError:
    meanings: Sequence[str] = LOOKS_LIKE.get(name, () if name in MEDIA else ("messages",))
    said = f"column {name!r} looks like a part of the conversation, but its value is in no text"
    # Beside whole conversations no column can be named that is a part of them.
    open_ = [m for m in meanings if "messages" not in part.names or m not in OF_PAIRS]
    remedy = "".join(f"name it as {part.section}.columns.{meaning}, or " for meaning in open_)
    if name == "label":
        said = f"column {name!r} says that the row is not a good one"
        remedy = (
            f"leave such rows out with {part.section}.columns.label: label, or learn all rows and "
        )
    elif name in MEDIA:
        said = f"column {name!r} holds what is no text, which no stage can read"
    return UserError(
        f"reading {part.uri}, row {row + 1}: {said}. What is read: "
        f"{', '.join(f'{column} as {meaning}' for meaning, column in part.names.items())}. "
        f"{remedy[:1].upper()}{remedy[1:] or 'To go without it, '}leave it out with "
        f"{part.section}.ignore: [{name}]."
        f"{preferences(part.section) if name in ('chosen', 'rejected') else ''}"
    )
