"""The columns of raw files: which one means what, and their values as text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.config import Columns
from s2l_ray.core.data.formats.spans import Column
from s2l_ray.core.data.json_text import values_of
from s2l_ray.errors import UserError

# Reports that the row at a position of the part is bad: the reason, which is counted, and a detail
# for people.
BadPosition = Callable[[int, str, str], None]

MEANINGS = (
    "instruction", "input", "output", "messages", "history", "system", "tools", "label", "source",
)  # fmt: skip
RESERVED = ("example_id", "cluster", "score")
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
)
TALKS = ("messages", "conversations")
# What a file may have beside these: the names that are taken for each meaning, the first first.
BESIDE_PAIRS = {"input": ("input", "context"), "history": ("history",)}
BESIDE_ALL = {"system": ("system",), "tools": ("tools",), "source": ("source",)}


def preferences(section: str) -> str:
    """What can be made of rows of preferences."""
    return (
        f" Of rows of preferences the good answers can be learned: set {section}.columns.output: "
        f"chosen and name what comes before as {section}.columns.instruction, or, where chosen "
        f"holds whole conversations, set {section}.columns.messages: chosen."
    )


def column_names(present: list[str], columns: Columns, uri: str) -> dict[str, str]:
    """Meaning -> column name, for the columns that a file has: instruction and output, or messages,
    and what goes with them.

    Args:
        present: the file's columns.
        columns: names that the user gave.

    Raises:
        UserError: a reserved or doubled column, a given one that is absent, no schema that fits, or
            several.
    """
    section = columns.section
    for name in RESERVED:
        if name in present:
            raise UserError(
                f"reading {uri}: a column is named {name!r}, which the subset adds itself. Rename "
                f"the column, or leave it out with {section}.ignore."
            )
    if len(set(present)) < len(present):
        raise UserError(f"reading {uri}: two columns have the same name in {present}. Rename one.")
    given = {
        meaning: name for meaning in MEANINGS if (name := getattr(columns, meaning)) is not None
    }
    absent = [
        f"{name!r} ({section}.columns.{meaning})"
        for meaning, name in given.items()
        if name not in present
    ]
    if absent:
        raise UserError(
            f"reading {uri}: no column {', '.join(absent)}; it has {present}. Correct "
            f"{section}.columns."
        )
    names = {**_schema(present, given, uri, section), **given}
    beside = BESIDE_ALL if "messages" in names else BESIDE_ALL | BESIDE_PAIRS
    for meaning, usual in beside.items():
        free = [name for name in usual if name in present and name not in names.values()]
        if meaning not in names and free:
            names[meaning] = free[0]
    if "source" in present and names["source"] != "source":
        raise UserError(
            f"reading {uri}: {section}.columns.source is {names['source']!r}, but a column is "
            "named 'source', which the subset writes itself. Rename the column."
        )
    return names


def _schema(present: list[str], given: dict[str, str], uri: str, section: str) -> dict[str, str]:
    """The known schema that a file's columns fit; nothing where the user named them."""
    if "messages" in given or {"instruction", "output"} <= given.keys():
        return {}
    pairs = [dict(zip(("instruction", "output"), pair, strict=True)) for pair in PAIRS]
    talks = [{"messages": name} for name in TALKS]
    known = pairs if given.keys() & {"instruction", "output"} else [*pairs, *talks]
    fitting = [schema for schema in known if all(name in present for name in schema.values())]
    if len(fitting) != 1:
        listed = [" and ".join(schema.values()) for schema in fitting or [*pairs, *talks]]
        expected = "they fit several schemas" if fitting else "expected columns of a known schema"
        preferred = "chosen" in present and not fitting
        raise UserError(
            f"reading {uri}: {expected} ({'; '.join(listed)}); it has {present}. Name the columns "
            f"with {section}.columns.instruction and {section}.columns.output, or with "
            f"{section}.columns.messages.{preferences(section) if preferred else ''}"
        )
    return fitting[0]


@dataclass(frozen=True)
class PartColumns:
    """The columns of a part by their meaning.

    Args:
        columns: column name -> its values in the `count` rows.
        names: meaning -> column name, from `column_names`.
        uri: of the file, for messages.
        section: of the config that names the file, for messages.
        bad: called for every row with a bad value.
    """

    columns: Mapping[str, Column]
    count: int
    names: dict[str, str]
    uri: str
    section: str
    bad: BadPosition

    def has(self, meaning: str) -> bool:
        """Whether the file has a column of this meaning."""
        return meaning in self.names

    def values(self, meaning: str) -> Column:
        """The values of the column as the format gave them."""
        return self.columns[self.names[meaning]]

    def objects(self, meaning: str) -> list[Any]:
        """The values of the column as Python objects."""
        column = self.values(meaning)
        return column if isinstance(column, list) else values_of(_whole(column))

    def report(self, row: int, meaning: str, reason: str, detail: str = "") -> None:
        """Report a bad value."""
        self.bad(row, f"field {self.names[meaning]!r}: {reason}", detail)

    def has_turns(self, meaning: str) -> bool:
        """Whether the column holds turns, one or a list of them, where others have text."""
        column = self.values(meaning)
        if isinstance(column, list):
            first = next((value for value in column if value is not None), None)
            return isinstance(first, list | dict)
        return is_list(column.type) or pa.types.is_struct(column.type)

    def text(self, meaning: str, needed: bool) -> pa.Array:
        """A column of text, string [N]; where it is `needed`, rows without any are bad.

        Raises:
            UserError: a column of another type.
        """
        column = self.values(meaning)
        if isinstance(column, list):
            text = self._text_of_objects(meaning, column)
        elif not is_text(column.type):
            raise UserError(
                f"reading {self.uri}, field {self.names[meaning]!r}: expected text, got "
                f"{column.type}. Convert the column to strings, or name another one with "
                f"{self.section}.columns.{meaning}."
            )
        else:
            text = _whole(column.cast(pa.string()))
        if needed:
            empty = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0), True)
            for row in np.flatnonzero(empty.to_numpy(zero_copy_only=False)).tolist():
                what = "empty" if text[row].is_valid else "null or missing"
                self.report(row, meaning, f"expected text, got a value that is {what}")
        return text

    def _text_of_objects(self, meaning: str, values: list[Any]) -> pa.Array:
        try:
            return pa.array(values, pa.string())
        except pa.ArrowException:
            for row, value in enumerate(values):
                if not isinstance(value, str | None):
                    self.report(row, meaning, f"expected text, got {type(value).__name__}")
            return pa.array(
                [value if isinstance(value, str) else None for value in values], pa.string()
            )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can be read as strings."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return any(
        check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return any(
        check(kind)
        for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
