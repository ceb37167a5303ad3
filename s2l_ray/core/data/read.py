"""Reading raw files: once to index them, then part by part into the columns of `examples`."""

import contextlib
import csv
import functools
import itertools
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import Columns
from s2l_ray.core.data import formats
from s2l_ray.core.data.conversations import NOT_GOOD
from s2l_ray.core.data.formats.source import Source
from s2l_ray.core.data.formats.spans import Column, FileIndex, Rows
from s2l_ray.core.data.json_text import values_of
from s2l_ray.core.data.parts import ID_BITS, PartRange, RawFile
from s2l_ray.core.data.rounds import of_earlier_round
from s2l_ray.core.data.rows import examples_of, in_utf8, without
from s2l_ray.core.storage.store import filesystem
from s2l_ray.errors import UserError

# Characters of a rejected row that are listed.
REJECT_TEXT = 500
# Of the section `evaluation` no row is left out.
REJECTING = " (with examples.on_bad_row: reject such rows are left out and listed)"
# Of the first rows of a file, which say what its columns are.
FIRST_ROWS, FIRST_BYTES = 20, 1 << 16
# Kinds of files that are text, of which a span may be read in part.
TEXT = ("lines", "array", "csv")
# What the libraries raise for files that are damaged.
DAMAGE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, lzma.LZMAError)


@dataclass
class PartRows:
    """The rows of a part: the columns of `examples` (see `rows.examples_of`), and rejected rows."""

    table: pa.Table
    rejects: list[dict[str, Any]] = field(default_factory=list)


def index_file(file: RawFile, rows_per_part: int) -> FileIndex:
    """Read a file once: hash it, count its rows and cut it into parts.

    Memory: a chunk or a batch of the file, and the list of parts.

    Raises:
        UserError: a file with too many rows, damaged, or not of the format of its name.
    """
    with _open(file) as stream:
        source = Source(stream, file.name, file.uri)
        try:
            index = replace(formats.cut(source, rows_per_part), sha256=source.sha256())
            first = _first_rows(file, index) if index.rows else []
        except DAMAGE as error:
            raise _damaged(file, error) from None
    if index.rows >= 1 << ID_BITS:
        raise UserError(
            f"reading {file.uri}: {index.rows} rows, but a file may have at most 2^{ID_BITS}. "
            "Split it."
        )
    return replace(index, first=json.dumps(first, ensure_ascii=False, default=str))


def _first_rows(file: RawFile, index: FileIndex) -> list[dict[str, Any]]:
    """The first good rows of a file: at most FIRST_ROWS, and few bytes of them."""
    span = index.spans[0]
    ends = [min(span.end, span.start + FIRST_BYTES), span.end] if index.kind in TEXT else [span.end]
    found = Rows(np.empty(0, np.int64), {})
    for end in ends:
        # The last record of a span that is cut short may lack the end of its quotes.
        with contextlib.suppress(csv.Error), _open(file) as stream:
            source = Source(stream, file.name, file.uri)
            short = span._replace(rows=min(span.rows, FIRST_ROWS), end=end)
            found = next(formats.read(source, index.kind, [short], index.head, lambda *_: None))
            break
    found = in_utf8(found, file.uri, lambda *_: None)
    count = min(FIRST_ROWS, len(found.numbers))
    columns = {name: _objects(column, count) for name, column in found.columns.items()}
    rows = [{name: column[row] for name, column in columns.items()} for row in range(count)]
    sizes = itertools.accumulate(
        len(json.dumps(row, ensure_ascii=False, default=str)) for row in rows
    )
    return [row for row, size in zip(rows, sizes, strict=True) if size <= FIRST_BYTES]


def _objects(column: Column, count: int) -> list[Any]:
    if isinstance(column, list):
        return column[:count]
    return values_of(column.slice(0, count).combine_chunks())


def read_part(
    part: PartRange, columns: Columns, on_bad_row: str = "stop", ignore: Sequence[str] = ()
) -> PartRows:
    """Read, check and name the rows of one part; see `read_parts`."""
    return next(read_parts([part], columns, on_bad_row, ignore))


def read_parts(
    parts: Sequence[PartRange],
    columns: Columns,
    on_bad_row: str = "stop",
    ignore: Sequence[str] = (),
) -> Iterator[PartRows]:
    """Read, check and name the rows of parts of one file, in their order. Memory: one part.

    Args:
        columns: names given by the user; columns are found by their names where left out.
        on_bad_row: "stop" raises at the first bad row, "reject" lists bad rows.
        ignore: columns that are left out.

    Raises:
        UserError: naming file, row, field and remedy.
    """
    first = parts[0]
    file = first.file
    rejects: list[dict[str, Any]] = []

    def bad(row: int, reason: str, text: str, detail: str) -> None:
        if on_bad_row == "stop" and reason != NOT_GOOD:
            raise UserError(
                f"reading {file.uri}, {first.place_of(row)}: {reason}{detail}. Correct the row, or "
                f"leave it out{REJECTING if columns.section == 'examples' else ''}."
            ) from None
        rejects.append(
            {"file": file.name, "row": row + 1, "reason": reason, "text": text[:REJECT_TEXT]}
        )

    with _open(file) as stream:
        source = Source(stream, file.name, file.uri)
        rows = formats.read(source, first.kind, [part.span for part in parts], first.head, bad)
        for part in parts:
            try:
                read = next(rows)
            except DAMAGE as error:
                raise _damaged(file, error) from None
            read = without(of_earlier_round(read) if file.of_subset else read, ignore)
            yield PartRows(examples_of(read, part, columns, bad), rejects[:])
            rejects.clear()


def _open(file: RawFile) -> pa.NativeFile:
    """The file, which must still be the one that was found, and the one that was cut into parts."""
    filesystem_, path = filesystem(file.uri)
    try:
        stream = filesystem_.open_input_file(path)
        changed = filesystem_.get_file_info(path).mtime_ns or 0
    except OSError as error:
        raise UserError(
            f"reading {file.uri}: {error}. Raw files must be readable under the same name on every "
            "node."
        ) from None
    size = stream.size()
    # A copy of the same content on another node has a time of its own.
    if size != file.bytes or (
        file.sha256 and changed != file.mtime_ns and _sha256(file.uri, changed) != file.sha256
    ):
        raise UserError(
            f"reading {file.uri}: expected {file.bytes} bytes with SHA-256 {file.sha256[:16]}, got "
            f"{size}{' others' if size == file.bytes else ''}: the file changed while the job ran, "
            "or differs between nodes. Run the same command again once it rests."
        )
    return stream


@functools.lru_cache(maxsize=1024)
def _sha256(uri: str, changed: int) -> str:
    """Hash of a file that was changed at this time."""
    filesystem_, path = filesystem(uri)
    with filesystem_.open_input_file(path) as stream:
        return Source(stream, "", uri).sha256()


def _damaged(file: RawFile, error: Exception) -> UserError:
    # Some libraries write several lines.
    what = " ".join(str(error).split())
    return UserError(f"reading {file.uri}: the data are damaged ({what}). Replace the file.")
