"""Rows of a raw file to the columns of `examples`.

A row becomes a conversation. All its columns are kept beside it in the struct `original`, so that
the row can be written out again as it was.
"""

from collections.abc import Callable, Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.config import Columns
from s2l_ray.core.data.columns import PartColumns, column_names, is_text
from s2l_ray.core.data.conversations import conversations
from s2l_ray.core.data.formats.spans import BadRow, Column, Rows
from s2l_ray.core.data.json_text import members, object_text, values_of
from s2l_ray.core.data.original import original_column
from s2l_ray.core.data.parts import ID_BITS, PartRange
from s2l_ray.core.data.uses import check_all_read
from s2l_ray.core.storage.columns import plain_column
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED
from s2l_ray.errors import UserError

MEDIA_MARK = r"(?i)^\s*<(image|video|audio)>|<(image|video|audio)>\s*$"


def examples_of(rows: Rows, part: PartRange, given: Columns, bad: BadRow) -> pa.Table:
    """The good rows: the columns of schemas.EXAMPLES_FIXED, then `original`.

    Args:
        given: names of columns, keys and roles from the config.
        bad: called for every row that is not UTF-8 or no conversation; such rows are left out.
    """
    rows = in_utf8(rows, part.file.uri, bad)
    numbers, good_N = rows.numbers, np.ones(len(rows.numbers), bool)

    def bad_row(position: int, reason: str, detail: str) -> None:
        if good_N[position]:
            good_N[position] = False
            bad(int(numbers[position]), reason, _whole(rows, position), detail)

    if not rows.columns:
        for position in range(len(numbers)):
            bad_row(position, "expected an object with fields, got an empty one", "")
        return EXAMPLES_FIXED.empty_table()
    names = column_names(list(rows.columns), given, part.file.uri)
    columns = PartColumns(rows.columns, len(numbers), names, part.file.uri, given.section, bad_row)
    made = conversations(columns, given)
    _no_marks_of_media(made["messages"], bad_row)
    check_all_read(rows, columns, made, given, good_N)
    table = pa.table(
        [
            pa.array(numbers + (part.file_number << ID_BITS)),
            made.get("source", pa.repeat(part.file.source, len(numbers))),
            made["messages"],
            made["tools"],
        ],
        schema=EXAMPLES_FIXED,
    ).filter(pa.array(good_N))
    return table.append_column(*original_column(rows, good_N))


def _no_marks_of_media(messages: pa.ListArray, bad: Callable[[int, str, str], None]) -> None:
    """Report rows with a turn that begins or ends with the mark of a picture, film or sound: the
    mark stands for something that no stage can read."""
    found = pc.match_substring_regex(messages.flatten().field("content"), MEDIA_MARK)
    turns = np.flatnonzero(found.to_numpy(zero_copy_only=False))
    ends = np.cumsum(messages.value_lengths().to_numpy(zero_copy_only=False))
    for row in np.unique(np.searchsorted(ends, turns, side="right")).tolist():
        bad(row, "the mark of a picture, film or sound stands in a turn, which is no text", "")


def without(rows: Rows, names: Collection[str]) -> Rows:
    """The rows less these columns, where they have them."""
    kept = {name: column for name, column in rows.columns.items() if name not in names}
    if len(kept) == len(rows.columns):
        return rows
    texts = rows.texts and [
        object_text({key: own for key, own in members(text).items() if key not in names})
        for text in rows.texts
    ]
    return Rows(rows.numbers, kept, texts)


def _whole(rows: Rows, position: int) -> str:
    if rows.texts is not None:
        return rows.texts[position]
    values = {
        name: column[position]
        if isinstance(column, list)
        else values_of(column.slice(position, 1).combine_chunks())
        for name, column in rows.columns.items()
    }
    return str(values)


def in_utf8(rows: Rows, uri: str, bad: BadRow) -> Rows:
    """The rows whose text is UTF-8, in plain types: Arrow and Parquet readers do not check text."""
    wrong: dict[int, str] = {}
    for name, column in rows.columns.items():
        if not isinstance(column, list):
            wrong = {**_not_utf8(name, column, uri), **wrong}
    keep_N = np.isin(np.arange(len(rows.numbers)), list(wrong), invert=True)
    columns: dict[str, Column] = {}
    for name, column in rows.columns.items():
        if isinstance(column, list):
            columns[name] = column
            continue
        for row in [row for row, field in wrong.items() if field == name]:
            text = column.cast(pa.string()).cast(pa.binary())[row].as_py()
            bad(int(rows.numbers[row]), f"field {name!r}: expected UTF-8", repr(text), "")
        columns[name] = plain_column(column.filter(pa.array(keep_N)) if wrong else column)
    return Rows(rows.numbers[keep_N], columns, rows.texts)


def _not_utf8(name: str, column: pa.ChunkedArray, uri: str) -> dict[int, str]:
    """Row -> column, for the rows in which a column is not UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        values = (
            column.cast(pa.string()).cast(pa.binary()).to_pylist() if is_text(column.type) else []
        )
        found = [
            row
            for row, value in enumerate(values)
            if value and value.decode(errors="replace").encode() != value
        ]
        if not found:
            raise UserError(
                f"reading {uri}, field {name!r}: the data are damaged ({error}). Replace the file."
            ) from None
        return dict.fromkeys(found, name)
    return {}
