"""Rows of any schema to conversations: which column means what, and the turns that every later stage reads.

A conversation is a list of turns (tables.MESSAGES): system first if at all, then user and assistant in turn, tool turns after an
assistant's. Turns are held flat, as columns over all turns of a part, so that rows of plain text are never looked at one by one.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.config import Columns
from s2l_ray.core.storage.schemas import MESSAGES
from s2l_ray.errors import UserError

# Values of a column: Python objects where the file is JSON, else Arrow. M: turns of a part, N: its rows.
Column: TypeAlias = "list[Any] | pa.ChunkedArray"
# Says that the row at a position of the part is bad: the reason, which is counted, and a detail for people.
Bad = Callable[[int, str, str], None]

RESERVED = ("example_id", "cluster", "score")
SCHEMAS = (
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "instruction", "input": "context", "output": "response"},
    {"instruction": "prompt", "output": "completion", "tools": "tools"},
    {"instruction": "question", "output": "answer"},
    {"instruction": "query", "output": "response"},
    {"messages": "messages", "tools": "tools"},
    {"messages": "conversations", "tools": "tools"},
)
NEEDED = ("instruction", "output", "messages")

ROLES = ("system", "user", "assistant", "tool")
SYSTEM, USER, ASSISTANT, TOOL = range(len(ROLES))
START = len(ROLES)  # what comes before the first turn
ROLE_NAMES = {
    **{name: code for code, name in enumerate(ROLES)},
    **dict.fromkeys(("developer",), SYSTEM),
    **dict.fromkeys(("human",), USER),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "function_call"), ASSISTANT),
    **dict.fromkeys(("function", "observation", "function_response"), TOOL),
}
FOLLOWERS = {
    START: (SYSTEM, USER),
    SYSTEM: (USER,),
    USER: (ASSISTANT,),
    ASSISTANT: (USER, TOOL),  # and another assistant turn, once a tool was called
    TOOL: (TOOL, ASSISTANT),
}


class _BadTurn(ValueError):
    """What is wrong with a row's conversation: a reason that many rows may share, and the detail of this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Turns:
    """Turns of many rows: row int64 [M] (position in the part), role int8 [M], and three columns of text [M]."""

    row: np.ndarray
    role: np.ndarray
    content: pa.Array
    input: pa.Array
    extra: pa.Array


def column_names(present: list[str], columns: Columns, uri: str) -> dict[str, str]:
    """Meaning -> column name, for the columns this file has: instruction and output, or messages, and what goes with them.

    Args:
        present: the file's columns.
        columns: names that the user gave.

    Raises:
        UserError: a reserved or doubled column, a given one that is absent, no schema that fits, or several.
    """
    for name in RESERVED:
        if name in present:
            raise UserError(
                f"reading {uri}: a column is named {name!r}, which the subset adds itself. Rename the column."
            )
    if len(set(present)) < len(present):
        raise UserError(f"reading {uri}: two columns have the same name in {present}. Rename one.")
    meanings = ("instruction", "input", "output", "messages", "system", "tools", "source")
    given = {
        meaning: name for meaning in meanings if (name := getattr(columns, meaning)) is not None
    }
    absent = [
        f"{name!r} (examples.columns.{meaning})"
        for meaning, name in given.items()
        if name not in present
    ]
    if absent:
        raise UserError(
            f"reading {uri}: no column {', '.join(absent)}; it has {present}. Correct examples.columns."
        )
    names = {**_schema(present, given, uri), **given}
    for meaning in ("system", "source"):
        if meaning in present and meaning not in names:
            names[meaning] = meaning
    if "source" in present and names["source"] != "source":
        raise UserError(
            f"reading {uri}: examples.columns.source is {names['source']!r}, but a column is named 'source', which the subset "
            "writes itself. Rename the column."
        )
    return names


def _schema(present: list[str], given: dict[str, str], uri: str) -> dict[str, str]:
    """The known schema that a file's columns fit, as far as the file has its columns; nothing where the user named them."""
    if "messages" in given or {"instruction", "output"} <= given.keys():
        return {}
    fitting = [
        schema
        for schema in SCHEMAS
        if all(name in present for meaning, name in schema.items() if meaning in NEEDED)
        and not (given.keys() & {"instruction", "output"} and "messages" in schema)
    ]
    if len(fitting) != 1:
        known = [" and ".join(_needed(schema)) for schema in fitting or SCHEMAS]
        expected = "they fit several schemas" if fitting else "expected columns of a known schema"
        raise UserError(
            f"reading {uri}: {expected} ({'; '.join(known)}); it has {present}. Name the columns with "
            "examples.columns.instruction and examples.columns.output, or with examples.columns.messages."
        )
    return {meaning: name for meaning, name in fitting[0].items() if name in present}


def _needed(schema: dict[str, str]) -> list[str]:
    return [name for meaning, name in schema.items() if meaning in NEEDED]


def conversations(
    columns: Mapping[str, Column],
    count: int,
    names: dict[str, str],
    given: Columns,
    uri: str,
    bad: Bad,
) -> dict[str, pa.Array]:
    """source (where a column tells it), messages and tools of all rows; what stands in bad rows is of no use.

    Args:
        columns: column name -> its values in the N = `count` rows.
        names: meaning -> column name, from `column_names`.
        given: the user's names of keys and roles.
        bad: told of every row that is no conversation, and why.
    """
    reader = _Reader(columns, count, names, given, uri, bad)
    made = {"messages": reader.messages(), "tools": reader.tools()}
    return {**made, "source": reader.text("source", True)} if "source" in names else made


class _Reader:
    """The columns of a part by their meaning."""

    def __init__(
        self,
        columns: Mapping[str, Column],
        count: int,
        names: dict[str, str],
        given: Columns,
        uri: str,
        bad: Bad,
    ) -> None:
        self.columns, self.count, self.names, self.given, self.uri, self.bad = (
            columns, count, names, given, uri, bad,
        )  # fmt: skip
        self.roles = {
            **ROLE_NAMES,
            **{name: ROLES.index(role) for name, role in given.roles.items()},
        }

    def messages(self) -> pa.Array:
        """The canonical conversations, tables.MESSAGES [N]."""
        turns = [self._system()] if "system" in self.names else []
        if "messages" in self.names:
            turns.append(self._listed("messages"))
        elif all(self._is_listed(meaning) for meaning in ("instruction", "output")):
            turns += [self._listed(meaning) for meaning in ("instruction", "output")]
        else:
            return _to_lists(_joined([*turns, *self._plain()]), self.count)
        joined = _joined(turns)
        self._check_order(joined)
        return _to_lists(joined, self.count)

    def text(self, meaning: str, needed: bool) -> pa.Array:
        """A column of text, string [N]; where it is `needed`, rows without any are bad."""
        name = self.names[meaning]
        column = self.columns[name]
        if isinstance(column, list):
            text = self._text_of_objects(name, column)
        elif not is_text(column.type):
            raise UserError(
                f"reading {self.uri}, field {name!r}: expected text, got {column.type}. Convert the column to strings, "
                f"or name another one with examples.columns.{meaning}."
            )
        else:
            text = _whole(column.cast(pa.string()))
        if needed:
            empty = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0), True)
            for row in np.flatnonzero(empty.to_numpy(zero_copy_only=False)).tolist():
                what = "empty" if text[row].is_valid else "null or missing"
                self.bad(row, f"field {name!r}: expected text, got a value that is {what}", "")
        return text

    def _text_of_objects(self, name: str, values: list[Any]) -> pa.Array:
        try:
            return pa.array(values, pa.string())
        except pa.ArrowException:
            for row, value in enumerate(values):
                if not isinstance(value, str | None):
                    self.bad(row, f"field {name!r}: expected text, got {type(value).__name__}", "")
            return pa.array(
                [value if isinstance(value, str) else None for value in values], pa.string()
            )

    def _system(self) -> Turns:
        text = self.text("system", False)
        row = np.flatnonzero(
            pc.fill_null(pc.not_equal(text, ""), False).to_numpy(zero_copy_only=False)
        )
        return _turns(row, SYSTEM, text.take(pa.array(row)))

    def _plain(self) -> list[Turns]:
        """A user and an assistant turn a row, from two or three columns of text."""
        rows = np.arange(self.count)
        user = _turns(rows, USER, self.text("instruction", True))
        if "input" in self.names:
            text = self.text("input", False)
            given = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
            user = Turns(rows, user.role, user.content, given, user.extra)
        return [user, _turns(rows, ASSISTANT, self.text("output", True))]

    def _is_listed(self, meaning: str) -> bool:
        """Whether a column holds lists of turns where others have text."""
        column = self.columns[self.names[meaning]]
        if isinstance(column, list):
            return isinstance(next((value for value in column if value is not None), None), list)
        return _is_list(column.type)

    def _listed(self, meaning: str) -> Turns:
        """The turns of a column of lists, or of lists written as JSON text."""
        name = self.names[meaning]
        column = self.columns[name]
        if not (isinstance(column, list) or is_text(column.type) or _is_list(column.type)):
            raise UserError(
                f"reading {self.uri}, field {name!r}: expected lists of turns, got {column.type}. Name another column with "
                f"examples.columns.{meaning}."
            )
        values = column if isinstance(column, list) else column.to_pylist()
        rows: list[int] = []
        flat: list[tuple[int, str, str | None]] = []
        for row, value in enumerate(values):
            try:
                turns = self._conversation(value)
            except _BadTurn as error:
                self.bad(row, f"field {name!r}: {error.reason}", error.detail)
                continue
            rows += [row] * len(turns)
            flat += turns
        role, content, extra = zip(*flat, strict=True) if flat else ((), (), ())
        return Turns(
            np.array(rows, np.int64),
            np.array(role, np.int8),
            pa.array(content, pa.string()),
            pa.nulls(len(flat), pa.string()),
            pa.array(extra, pa.string()),
        )

    def _conversation(self, value: Any) -> list[tuple[int, str, str | None]]:
        if isinstance(value, str):
            value = _json_list(value, "turns")
        if not isinstance(value, list):
            raise _BadTurn(f"expected a list of turns, got {type(value).__name__}")
        if not value:
            raise _BadTurn("expected turns, got an empty conversation")
        return [self._turn(turn, number) for number, turn in enumerate(value, 1)]

    def _turn(self, turn: Any, number: int) -> tuple[int, str, str | None]:
        """Role, text, and the JSON of what else the turn has."""
        if not isinstance(turn, dict):
            raise _BadTurn(
                f"expected turns that are objects, got {type(turn).__name__}", f", turn {number}"
            )
        role_key = self.given.role or _present(turn, "role", "from")
        text_key = self.given.content or _present(turn, "content", "value")
        name = turn.get(role_key)
        role = self.roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise _BadTurn(
                f"expected a known role under the key {role_key!r}",
                f", got {name!r} in turn {number}; examples.columns.roles can tell what it means",
            )
        if len(turn) == 2 and text_key in turn:
            extra: dict[str, Any] = {}
        else:
            extra = without_nulls({k: v for k, v in turn.items() if k not in (role_key, text_key)})
        text = _text(turn.get(text_key), text_key, number, "tool_calls" in extra)
        if (
            role in (USER, ASSISTANT)
            and not extra.get("tool_calls")
            and (not text or text.isspace())
        ):
            raise _BadTurn(f"expected text, got an empty {ROLES[role]} turn", f", turn {number}")
        return role, text, to_json(extra) if extra else None

    def _check_order(self, turns: Turns) -> None:
        """Roles must follow each other as in FOLLOWERS, and somebody must answer."""
        name = self.names.get("messages") or self.names["instruction"]
        first_M = np.diff(turns.row, prepend=-1) != 0
        before_M = np.where(first_M, START, np.roll(turns.role, 1))
        place_M = np.arange(len(turns.row))
        latest_user_M = np.maximum.accumulate(np.where(first_M | (turns.role == USER), place_M, 0))
        latest_tool_M = np.maximum.accumulate(np.where(turns.role == TOOL, place_M, -1))
        allowed = np.zeros((START + 1, len(ROLES)), bool)
        for before, followers in FOLLOWERS.items():
            allowed[before, list(followers)] = True
        fine_M = allowed[before_M, turns.role] | (
            (before_M == ASSISTANT) & (turns.role == ASSISTANT) & (latest_tool_M > latest_user_M)
        )
        number_M = place_M - np.maximum.accumulate(np.where(first_M, place_M, 0)) + 1
        told = set()
        for place in np.flatnonzero(~fine_M).tolist():
            row = int(turns.row[place])
            if row not in told:
                told.add(row)
                before = int(before_M[place])
                expected = " or ".join(ROLES[role] for role in FOLLOWERS[before])
                after = "first" if before == START else f"after {ROLES[before]}"
                got = ROLES[turns.role[place]]
                self.bad(
                    row,
                    f"field {name!r}: roles out of order: expected {expected} {after}, got {got}",
                    f", turn {int(number_M[place])}",
                )
        silent = np.setdiff1d(turns.row, turns.row[turns.role == ASSISTANT])
        for row in silent.tolist():
            if row not in told:
                self.bad(row, f"field {name!r}: expected an assistant turn, got none", "")

    def tools(self) -> pa.Array:
        """JSON text of each row's tools, string [N]; null where a row has none."""
        if "tools" not in self.names:
            return pa.nulls(self.count, pa.string())
        name = self.names["tools"]
        column = self.columns[name]
        made: list[str | None] = []
        for row, value in enumerate(column if isinstance(column, list) else column.to_pylist()):
            try:
                text = value.strip() if isinstance(value, str) else None
                tools = value if text is None else _json_list(text, "tools") if text else None
                if not isinstance(tools, list | None):
                    raise _BadTurn(
                        f"expected a list of tools or its JSON text, got {type(tools).__name__}"
                    )
                made.append(to_json(without_nulls(tools)) if tools else None)
            except _BadTurn as error:
                self.bad(row, f"field {name!r}: {error.reason}", error.detail)
                made.append(None)
        return pa.array(made, pa.string())


def _present(turn: dict[str, Any], key: str, other: str) -> str:
    """The first of two keys that has a value; the first where none has."""
    return other if turn.get(key) is None and other in turn else key


def _json_list(text: str, what: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadTurn(f"expected the JSON text of a list of {what}", f", but {error}") from None
    if not isinstance(value, list):
        raise _BadTurn(
            f"expected the JSON text of a list of {what}, got that of {type(value).__name__}"
        )
    return value


def _text(content: Any, key: str, number: int, calls: bool) -> str:
    """The text of a turn: a string, the joined parts of text of a list, or nothing where tools are called."""
    if isinstance(content, str):
        return content
    if content is None and calls:
        return ""
    if not isinstance(content, list):
        raise _BadTurn(
            f"expected text under the key {key!r}, got {type(content).__name__}", f", turn {number}"
        )
    pieces = []
    for piece in content:
        text = (
            piece.get("text") if isinstance(piece, dict) and piece.get("type") == "text" else piece
        )
        if not isinstance(text, str):
            kind = piece.get("type") if isinstance(piece, dict) else type(piece).__name__
            raise _BadTurn(
                f"expected nothing but parts of text under the key {key!r}",
                f", got one of type {kind!r} in turn {number}",
            )
        pieces.append(text)
    return "".join(pieces)


def without_nulls(value: Any) -> Any:
    """The value less the keys of objects that are null: columnar files have them for every key that another row has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def to_json(value: Any) -> str:
    """JSON without spaces; keys stay in their order, which templates may write out."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can be read as strings."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return any(
        check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    )


def _is_list(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole


def _turns(row: np.ndarray, role: int, content: pa.Array) -> Turns:
    """One turn a row, all of one role."""
    nothing = pa.nulls(len(row), pa.string())
    return Turns(row, np.full(len(row), role, np.int8), content, nothing, nothing)


def _joined(several: list[Turns]) -> Turns:
    """All turns in one, by row; those of a row in the order of the list."""
    if len(several) == 1:
        return several[0]
    order = np.argsort(np.concatenate([turns.row for turns in several]), kind="stable")
    take = pa.array(order)
    return Turns(
        np.concatenate([turns.row for turns in several])[order],
        np.concatenate([turns.role for turns in several])[order],
        *(
            pa.concat_arrays([getattr(turns, name) for turns in several]).take(take)
            for name in ("content", "input", "extra")
        ),
    )


def _to_lists(turns: Turns, count: int) -> pa.ListArray:
    """tables.MESSAGES [N]: the turns of each row as a list."""
    offsets = np.searchsorted(turns.row, np.arange(count + 1)).astype(np.int32)
    roles = pa.array(ROLES, pa.string()).take(pa.array(turns.role))
    inner = MESSAGES.value_type
    struct = pa.StructArray.from_arrays(
        [roles, turns.content, turns.input, turns.extra], fields=list(inner)
    )
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=MESSAGES)
