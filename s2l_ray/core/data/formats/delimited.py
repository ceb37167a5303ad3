"""CSV and TSV: a header, then records, whose quoted fields may hold line ends."""

import csv
import io
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from s2l_ray.core.data.formats.names import bare_name, has_suffix
from s2l_ray.core.data.formats.schemas import stored_schema
from s2l_ray.core.data.formats.source import Source
from s2l_ray.core.data.formats.spans import BadRow, Column, FileIndex, PieceCounter, Rows, Span
from s2l_ray.errors import UserError

# Bytes of one field: a quote that is never closed would take the rest of the file.
# The byte order mark that some programs write first, as Latin-1.
MARK = "\xef\xbb\xbf"
LARGEST_FIELD = 1 << 28


def cut(source: Source, every: int) -> FileIndex:
    """Count the records of a file and cut it into spans of `every` records.

    Raises:
        UserError: a quote that does not end, a header that is not UTF-8.
    """
    position = 0
    counter = PieceCounter(every, 0)

    def lines() -> Iterator[str]:
        nonlocal position
        # One character a byte: only their number and the ASCII ones matter here.
        text = io.TextIOWrapper(source.forward, encoding="latin-1", newline="")
        for line in iter(lambda: text.readline(LARGEST_FIELD + 1), ""):
            source.check_row(counter.pieces + 1, len(line))
            unmarked = line if position else line.removeprefix(MARK)
            position += len(line)
            yield unmarked

    records = _records(lines(), source.name)
    try:
        header = next(records, [])
        counter.starts = [position]
        for _ in records:
            counter.add_one(position)
    except csv.Error as error:
        raise UserError(
            f"reading {source.uri}, row {counter.pieces + 1}: a quote does not end where its field "
            f"does ({error}). Put fields that hold quotes or line ends in quotes, and double the "
            "quotes inside."
        ) from None
    schema = pa.schema([(name, pa.string()) for name in _names(source, header)])
    spans, head = counter.spans(position), counter.starts[0]
    return FileIndex(
        "csv", counter.pieces, position, spans, head, stored_schema(source.uri, schema)
    )


def read(source: Source, spans: Sequence[Span], head: int, bad: BadRow) -> Iterator[Rows]:
    """The rows of spans, in their order; blank lines are passed over.

    Args:
        head: bytes of the header.
    """
    header = source.at(0, head).decode("utf-8-sig")
    names = next(_records(io.StringIO(header, newline=""), source.name))
    for span in spans:
        # Bytes that are not UTF-8 become lone surrogates, which only such bytes do.
        text = source.text_of(span).decode(errors="surrogateescape")
        records = _records(io.StringIO(text, newline=""), source.name)
        numbers, rows = [], []
        for number, record in enumerate(records, span.first_row):
            if len(record) == len(names) and (text.isascii() or _is_text("".join(record))):
                numbers.append(number)
                rows.append(record)
            elif record:
                _report(number, record, names, bad)
        columns = zip(*rows, strict=True) if rows else ((),) * len(names)
        by_name: dict[str, Column] = {n: list(c) for n, c in zip(names, columns, strict=True)}
        yield Rows(np.array(numbers, np.int64), by_name)


def _records(lines: Iterator[str], name: str) -> Iterator[list[str]]:
    csv.field_size_limit(LARGEST_FIELD)
    delimiter = "\t" if has_suffix(bare_name(name), (".tsv",)) else ","
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _names(source: Source, header: list[str]) -> list[str]:
    """The column names of a header that was read as Latin-1."""
    try:
        return [name.encode("latin-1").decode() for name in header]
    except UnicodeDecodeError as error:
        raise UserError(
            f"reading {source.uri}: expected a header in UTF-8, got byte "
            f"0x{error.object[error.start]:02x}. Convert the file."
        ) from None


def _report(number: int, record: list[str], names: list[str], bad: BadRow) -> None:
    whole = ascii(record)
    if len(record) != len(names):
        bad(number, f"expected {len(names)} fields, got {len(record)}", whole, "")
    else:
        name = next(n for n, value in zip(names, record, strict=True) if not _is_text(value))
        bad(number, f"field {name!r}: expected UTF-8", whole, "")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
