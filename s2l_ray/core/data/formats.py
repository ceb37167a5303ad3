"""One small reader for each format of raw files, behind one seam: `index` cuts a file into spans of rows, `read` gives their rows.

A span is read by itself wherever the file allows it. Compressed text, Arrow streams and row groups of Parquet can only be read from
their front: whoever reads several of their spans gives them in order, and they are gone through once (`task_of`).
"""

import csv
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from s2l_ray.core.data.conversations import Column
from s2l_ray.core.storage.columns import plain_column, plain_type
from s2l_ray.core.storage.parquet import (
    open_arrow_file,
    open_arrow_stream,
    open_parquet,
    parquet_bytes,
    schema_text,
)
from s2l_ray.errors import UserError

CHUNK = 1 << 20
PEEK = 1 << 16  # bytes of a file that are looked at to tell what it is
LARGEST_FIELD = (
    1 << 28
)  # bytes of one CSV field; a quote that is never closed would take the rest of the file
ROWS_PER_READ = 131_072  # of a row group that one task reads; the rows before them are decoded, too
LARGEST_SPAN = (1 << 31) - 1  # bytes of text that one Arrow column holds
UTF8_MARK = b"\xef\xbb\xbf"
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ARROW_SUFFIXES = (".arrow", ".feather")
SUFFIXES = (
    *TEXT_SUFFIXES,
    *(suffix + codec for suffix in TEXT_SUFFIXES for codec in CODECS),
    ".parquet",
    *ARROW_SUFFIXES,
)

# Says that a row of the file is bad: its number, the reason, its text, and a detail for people.
BadRow = Callable[[int, str, str, str], None]


class Span(NamedTuple):
    """Rows that are read together: the first one's number, how many, and where they lie.

    In text, bytes `start` to `end` (uncompressed); in Parquet and Arrow files, the number of the row group or batch where they begin, and
    its first row.
    """

    first_row: int
    rows: int
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class FileIndex:
    """What one look at a file tells: its kind, rows, bytes of text, spans, bytes before the first row, and where the file itself has a
    schema, that as text; and the hash of its content."""

    kind: str
    rows: int
    text_bytes: int
    spans: list[Span]
    head: int = 0
    schema: str | None = None
    sha256: str = ""

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "FileIndex":
        return cls(**{**raw, "spans": [Span(*span) for span in raw["spans"]]})


@dataclass(frozen=True)
class Rows:
    """Rows as a format gives them: their numbers in the file, int64 [N], and the values of each column."""

    numbers: np.ndarray
    columns: dict[str, Column]


class Source:
    """An open raw file: its bytes uncompressed, at any place where it is plain, only forward where it is compressed."""

    def __init__(self, file: pa.NativeFile, name: str, uri: str) -> None:
        self.file, self.name, self.uri = file, name, uri
        self.hashing = _Hashing(file)
        codec = codec_of(name)
        plain = (
            self.hashing
            if codec is None
            else pa.CompressedInputStream(pa.PythonFile(self.hashing), codec)
        )
        self.forward = io.BufferedReader(plain, PEEK)
        self.compressed = codec is not None
        self.position = 0

    def at(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`; where the file is compressed, `start` must not lie before what was read last."""
        if not self.compressed:
            return self.file.read_at(end - start, start)
        while self.position < start:
            skipped = len(self.forward.read(min(CHUNK, start - self.position)))
            if not skipped:
                raise OSError(f"it ends after {self.position} bytes")
            self.position += skipped
        data = self.forward.read(end - start)
        self.position += len(data)
        return data

    def sha256(self) -> str:
        """Hash of the file as it lies there; reads what was not read yet."""
        return self.hashing.finish()


class _Hashing(io.RawIOBase):
    """Passes a file's bytes on in order, and hashes them."""

    def __init__(self, file: pa.NativeFile) -> None:
        self.file, self.digest, self.position = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        self.position += count
        return count

    def finish(self) -> str:
        self.file.seek(self.position)
        while self.readinto(bytearray(CHUNK)):
            pass
        return self.digest.hexdigest()


def codec_of(name: str) -> str | None:
    """How a file is compressed as a whole, by its name."""
    return next((codec for suffix, codec in CODECS.items() if name.endswith(suffix)), None)


def bare_name(name: str) -> str:
    """A file's name without the suffix that says how it is compressed."""
    return name if codec_of(name) is None else name.rpartition(".")[0]


def task_of(kind: str, name: str, span: Span) -> str:
    """Spans of one file and one name are best read by one task: all of them where the file can only be read from the front, and some
    of those of a row group of Parquet, which is decoded from its front."""
    if kind == "arrow stream" or codec_of(name) is not None:
        return "all"
    return (
        f"{span.start}/{span.first_row // ROWS_PER_READ}"
        if kind == "parquet"
        else f"{span.first_row}"
    )


def cut(source: Source, every: int) -> FileIndex:
    """Count a file's rows and cut it into spans of `every` rows."""
    name = bare_name(source.name)
    if name.endswith(".parquet"):
        return _cut_parquet(source, every)
    if name.endswith(ARROW_SUFFIXES):
        return _cut_arrow(source, every)
    if name.endswith((".csv", ".tsv")):
        return _cut_csv(source, every)
    return _cut_json(source, every, name)


def read(
    source: Source, kind: str, spans: Sequence[Span], head: int, bad: BadRow
) -> Iterator[Rows]:
    """The rows of spans, in their order, one after the other; rows that are none are told to `bad` and left out."""
    return READERS[kind](source, spans, head, bad)


def _spans(rows: int, every: int) -> list[Span]:
    return [Span(first, min(every, rows - first)) for first in range(0, rows, every)]


# ---- JSON: an object a line, or an array of objects

SPACE = b" \t\r\n"


class _Lines:
    """Finds where lines end."""

    def ends(self, chunk: bytes) -> np.ndarray:
        """Positions in the chunk just behind its line ends, int64."""
        return np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + 1


class _Items:
    """Finds where the items of a JSON array end: at its commas, those outside of strings and of anything nested."""

    STEP = np.zeros(256, np.int8)
    STEP[list(b"[{")], STEP[list(b"]}")] = 1, -1
    MARKS = STEP != 0
    MARKS[ord(",")] = True

    def __init__(self, depth: int) -> None:
        self.depth, self.inside, self.backslashes = depth, False, 0
        self.closed: int | None = None  # where in the last chunk the array ended

    def ends(self, chunk: bytes) -> np.ndarray:
        """Positions in the chunk just behind the array's commas, int64."""
        data = np.frombuffer(chunk, np.uint8)
        quotes = self._quotes(data)
        marks = np.flatnonzero(self.MARKS[data])
        marks = marks[(np.searchsorted(quotes, marks) + self.inside) % 2 == 0]
        self.inside = bool((len(quotes) + self.inside) % 2)
        depths = self.depth + np.cumsum(self.STEP[data[marks]], dtype=np.int64)
        self.depth = int(depths[-1]) if len(depths) else self.depth
        closing = marks[depths == 0]
        self.closed = int(closing[0]) if len(closing) else None
        commas = marks[(data[marks] == ord(",")) & (depths == 1)]
        return (commas if self.closed is None else commas[commas < self.closed]) + 1

    def _quotes(self, data: np.ndarray) -> np.ndarray:
        """Positions of the quotes that begin or end a string: those behind an even number of backslashes."""
        quotes, slashes = np.flatnonzero(data == ord('"')), data == ord("\\")
        if not self.backslashes and not slashes.any():
            return quotes
        place = np.arange(len(data))
        other = np.maximum.accumulate(np.where(slashes, -1, place))
        run = (
            place - other + np.where(other == -1, self.backslashes, 0)
        )  # backslashes in a row up to here
        before = np.concatenate([[self.backslashes], run])[quotes]
        self.backslashes = int(run[-1]) if len(run) else self.backslashes
        return quotes[before % 2 == 0]


class _Counter:
    """Counts pieces of a stream of bytes and remembers where every n-th one begins."""

    def __init__(self, every: int, start: int) -> None:
        self.every, self.pieces, self.starts = every, 0, [start]

    def add(self, ends: np.ndarray) -> None:
        first = -self.pieces % self.every or self.every
        self.starts += ends[first - 1 :: self.every].tolist()
        self.pieces += len(ends)

    def add_one(self, end: int) -> None:
        self.pieces += 1
        if self.pieces % self.every == 0:
            self.starts.append(end)

    def spans(self, end: int) -> list[Span]:
        """The spans of a stream whose pieces end at `end`."""
        bounds = [*self.starts[: -(-self.pieces // self.every)], end]
        return [
            span._replace(start=start, end=stop)
            for span, (start, stop) in zip(
                _spans(self.pieces, self.every), pairwise(bounds), strict=True
            )
        ]


def _chunks(source: Source) -> Iterator[bytes]:
    return iter(lambda: source.forward.read(CHUNK), b"")


def _cut_json(source: Source, every: int, name: str) -> FileIndex:
    if name.endswith(".json"):
        begin = source.forward.peek()
        text = begin.removeprefix(UTF8_MARK).lstrip(SPACE)
        if text.startswith(b"["):
            return _cut_array(source, every, begin.index(b"[") + 1)
        _check_first_line(source, text)
    return _cut_lines(source, every)


def _check_first_line(source: Source, begin: bytes) -> None:
    """A .json file that is no array must have an object a line: what spreads one over many lines is told at once."""
    line, end, _ = begin.partition(b"\n")
    try:
        if end:
            json.loads(line)
    except ValueError:
        raise UserError(
            f"reading {source.uri}: expected an array of objects, or an object a line; the first line is {line[:80]!r}. "
            "Write the rows as one array, or one to a line."
        ) from None


def _cut_lines(source: Source, every: int) -> FileIndex:
    counter, lines, position, last = _Counter(every, 0), _Lines(), 0, b"\n"
    for chunk in _chunks(source):
        counter.add(position + lines.ends(chunk))
        position, last = position + len(chunk), chunk[-1:]
    counter.pieces += last != b"\n"  # the last line may lack its end
    return FileIndex("lines", counter.pieces, position, counter.spans(position))


def _cut_array(source: Source, every: int, start: int) -> FileIndex:
    counter, items, position, filled = _Counter(every, start), _Items(0), 0, False
    end: int | None = None
    for chunk in _chunks(source):
        rest = chunk
        if end is None:
            counter.add(position + items.ends(chunk))
            first = max(0, start - position)
            filled = filled or bool(chunk[first : items.closed].strip(SPACE))
            if items.closed is not None:
                end, rest = position + items.closed, chunk[items.closed + 1 :]
        if end is not None and rest.strip(SPACE):
            raise UserError(
                f"reading {source.uri}: expected nothing behind the end of the array at byte {end}, got "
                f"{rest.strip(SPACE)[:40]!r}. Write all rows as one array, or one to a line."
            )
        position += len(chunk)
    if end is None:
        raise UserError(
            f"reading {source.uri}: expected an array of objects, but the file ends before the array does, in row "
            f"{counter.pieces + 1}. Replace the file."
        )
    counter.pieces += filled  # the last item has no comma
    return FileIndex("array", counter.pieces, position, counter.spans(end))


def _read_lines(source: Source, spans: Sequence[Span], head: int, bad: BadRow) -> Iterator[Rows]:
    for span in spans:
        yield _objects(
            _bytes_of(source, span).split(b"\n")[: span.rows], span.first_row, False, bad
        )


def _read_array(source: Source, spans: Sequence[Span], head: int, bad: BadRow) -> Iterator[Rows]:
    for span in spans:
        data = _bytes_of(source, span)
        ends = _Items(1).ends(data)
        stops = [*(ends - 1), len(data)][: span.rows]
        pieces = [data[start:stop] for start, stop in zip([0, *ends], stops, strict=False)]
        yield _objects(pieces, span.first_row, True, bad)


def _bytes_of(source: Source, span: Span) -> bytes:
    if span.end - span.start > LARGEST_SPAN:
        raise UserError(
            f"reading {source.uri}: {span.rows} rows from row {span.first_row + 1} are {span.end - span.start} bytes, more than a "
            "part may have. Lower examples.rows_per_part."
        )
    return source.at(span.start, span.end)


def _not_json(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_not_json)


def _objects(pieces: list[bytes], first_row: int, needed: bool, bad: BadRow) -> Rows:
    """The objects that pieces of text hold; pieces that are blank are bad where they are `needed`, and passed over elsewhere."""
    numbers, rows = [], []
    for number, piece in enumerate(pieces, first_row):
        stripped = piece.strip(SPACE)
        if not stripped and not needed:
            continue
        try:
            text = stripped.decode()
            row, end = DECODER.raw_decode(text)
            plain = (
                end == len(text) and type(row) is dict and "\\ud" not in text and "\\uD" not in text
            )
        except (ValueError, RecursionError):
            plain = False
        if plain or (row := _object(number, piece, bad)) is not None:
            numbers.append(number)
            rows.append(row)
    # A span of nothing but blank lines and bad rows has no columns: no row tells which there are.
    present: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= present.keys():
            present |= dict.fromkeys(row)
    return Rows(
        np.array(numbers, np.int64), {name: [row.get(name) for row in rows] for name in present}
    )


def _object(number: int, piece: bytes, bad: BadRow) -> dict[str, Any] | None:
    """The object of a piece of text; None, once `bad` is told why, where it holds none."""
    text = piece.decode(errors="replace")
    try:
        row = DECODER.decode(piece.decode("utf-8-sig" if number == 0 else "utf-8"))
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        where = f", got byte 0x{error.object[error.start]:02x} at position {error.start}"
        bad(number, "expected UTF-8", repr(piece), where)
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        bad(number, "expected text, got half a surrogate pair", text, f", {half}")
    except json.JSONDecodeError as error:
        bad(number, f"expected a JSON object, but {error.msg}", text, f", in column {error.colno}")
    except (ValueError, RecursionError) as error:
        bad(number, f"expected a JSON object, but {error}", text, "")
    else:
        if isinstance(row, dict):
            return row
        bad(number, f"expected a JSON object, got {type(row).__name__}", text, "")
    return None


# ---- CSV: a header, then records, whose quoted fields may hold line ends


def _delimiter(name: str) -> str:
    return "\t" if bare_name(name).endswith(".tsv") else ","


def _records(lines: Iterator[str], name: str) -> Iterator[list[str]]:
    csv.field_size_limit(LARGEST_FIELD)
    return csv.reader(lines, delimiter=_delimiter(name), strict=True)


def _cut_csv(source: Source, every: int) -> FileIndex:
    position = 0
    counter = _Counter(every, 0)

    def lines() -> Iterator[str]:
        nonlocal position
        # One character a byte: only their number and the ASCII ones matter here.
        for line in io.TextIOWrapper(source.forward, encoding="latin-1", newline=""):
            position += len(line)
            yield line

    records = _records(lines(), source.name)
    try:
        header = next(records, [])
        counter.starts = [position]
        for _ in records:
            counter.add_one(position)
    except csv.Error as error:
        raise UserError(
            f"reading {source.uri}, row {counter.pieces + 1}: a quote does not end where its field does ({error}). Put fields that hold "
            "quotes or line ends in quotes, and double the quotes inside."
        ) from None
    try:
        names = [name.encode("latin-1").decode() for name in header]
    except UnicodeDecodeError as error:
        raise UserError(
            f"reading {source.uri}: expected a header in UTF-8, got byte 0x{error.object[error.start]:02x}. Convert the file."
        ) from None
    schema = pa.schema([(name, pa.string()) for name in [*map(_unmarked, names[:1]), *names[1:]]])
    return FileIndex(
        "csv",
        counter.pieces,
        position,
        counter.spans(position),
        counter.starts[0],
        _schema_of(source, schema),
    )


def _unmarked(text: str) -> str:
    return text.removeprefix("\ufeff")


def _read_csv(source: Source, spans: Sequence[Span], head: int, bad: BadRow) -> Iterator[Rows]:
    header = _unmarked(source.at(0, head).decode())
    names = next(_records(io.StringIO(header, newline=""), source.name))
    for span in spans:
        # Bytes that are not UTF-8 become lone surrogates, which only such bytes do.
        text = _bytes_of(source, span).decode(errors="surrogateescape")
        records = _records(io.StringIO(text, newline=""), source.name)
        numbers, rows = [], []
        for number, record in enumerate(records, span.first_row):
            if len(record) == len(names) and (text.isascii() or _is_text("".join(record))):
                numbers.append(number)
                rows.append(record)
            elif record:
                _tell_record(number, record, names, bad)
        columns = zip(*rows, strict=True) if rows else ((),) * len(names)
        by_name: dict[str, Column] = {n: list(c) for n, c in zip(names, columns, strict=True)}
        yield Rows(np.array(numbers, np.int64), by_name)


def _tell_record(number: int, record: list[str], names: list[str], bad: BadRow) -> None:
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


# ---- Parquet and Arrow

PLAIN_FEATURES = (
    "Value", "ClassLabel", "Sequence", "List", "LargeList", "Translation", "TranslationVariableLanguages",
)  # fmt: skip


def _schema_of(source: Source, schema: pa.Schema) -> str:
    """The schema that a file's rows will have, as text; a column that cannot be kept is refused by its name."""
    names = schema.names
    if len(set(names)) < len(names):
        raise UserError(
            f"reading {source.uri}: two columns have the same name in {names}. Rename one."
        )
    _check_metadata(source, schema.metadata or {})
    for column in schema:
        try:
            plain = plain_column(pa.chunked_array([pa.nulls(1, column.type)]))
            parquet_bytes(pa.table({column.name: plain}))
        except pa.ArrowException as error:
            raise UserError(
                f"reading {source.uri}, field {column.name!r}: a column of type {column.type} cannot be kept ({error}). "
                "Convert or remove the column."
            ) from None
    return schema_text(pa.schema([(column.name, plain_type(column.type)) for column in schema]))


def _check_metadata(source: Source, metadata: dict[bytes, bytes]) -> None:
    """Check the features that the `datasets` library notes in the metadata of its files."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return
    check_features(source.uri, features)


def check_features(what: str, features: dict[str, Any]) -> None:
    """Refuse columns of pictures, sound and the like, by the features of the `datasets` library (as a JSON object)."""
    for name, feature in features.items():
        odd = sorted(_feature_types(feature) - set(PLAIN_FEATURES))
        if odd:
            raise UserError(
                f"reading {what}, field {name!r}: expected text, numbers, or lists and objects of them, got the feature {odd[0]}. "
                "Remove the column."
            )


def _feature_types(feature: Any) -> set[str]:
    if isinstance(feature, list):
        return set().union(*map(_feature_types, feature))
    if not isinstance(feature, dict):
        return set()
    kind = {feature["_type"]} if isinstance(feature.get("_type"), str) else set()
    return kind.union(*map(_feature_types, feature.values()))


def _rows_of(table: pa.Table, span: Span) -> Rows:
    if table.num_rows != span.rows:
        raise OSError(
            f"expected {span.rows} rows from row {span.first_row + 1}, got {table.num_rows}"
        )
    numbers = np.arange(span.first_row, span.first_row + span.rows, dtype=np.int64)
    return Rows(numbers, {name: table[name] for name in table.column_names})


def _cut_parquet(source: Source, every: int) -> FileIndex:
    file = open_parquet(source.file, source.uri)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    begins = np.cumsum([0, *(group.num_rows for group in groups)])[:-1].tolist()
    size, rows = sum(group.total_byte_size for group in groups), file.metadata.num_rows
    spans = _placed(_spans(rows, every), begins)
    return FileIndex("parquet", rows, size, spans, schema=_schema_of(source, file.schema_arrow))


def _cut_arrow(source: Source, every: int) -> FileIndex:
    """Arrow's file format, which knows where its batches lie, or its stream format, which must be gone through."""
    begin = source.file.read_at(6, 0)
    if begin.startswith(b"FEA1"):
        raise UserError(
            f"reading {source.uri}: this is Feather version 1, which nothing writes any more. Write it again as version 2."
        )
    kind = "arrow file" if begin == b"ARROW1" else "arrow stream"
    schema, batches = _batches(source, kind, Span(0, 0))
    begins, size, rows = [], 0, 0
    for first, batch in batches:
        begins.append(first)
        rows, size = first + batch.num_rows, size + batch.nbytes
    spans = _spans(rows, every)
    if kind == "arrow file":
        spans = _placed(spans, begins)
    return FileIndex(kind, rows, size, spans, schema=_schema_of(source, schema))


def _placed(spans: list[Span], begins: list[int]) -> list[Span]:
    """The spans with the batch each begins in; `begins` has the first row of each batch."""
    places = np.searchsorted(begins, [span.first_row for span in spans], side="right") - 1
    return [
        span._replace(start=int(place), end=begins[place])
        for span, place in zip(spans, places, strict=True)
    ]


def _batches(
    source: Source, kind: str, span: Span
) -> tuple[pa.Schema, Iterator[tuple[int, pa.RecordBatch]]]:
    """The schema, and batches with the first row of each, from the one where `span` begins; a stream is read from its front."""
    if kind == "arrow stream":
        stream = open_arrow_stream(source.file, source.uri)
        return stream.schema, _with_first_rows(stream, 0)
    batches: Iterable[pa.RecordBatch]
    if kind == "arrow file":
        file = open_arrow_file(source.file, source.uri)
        schema = file.schema
        batches = map(file.get_batch, range(span.start, file.num_record_batches))
    else:
        file = open_parquet(source.file, source.uri)
        schema = file.schema_arrow
        batches = file.iter_batches(span.rows, row_groups=range(span.start, file.num_row_groups))
    return schema, _with_first_rows(batches, span.end)


def _with_first_rows(
    batches: Iterable[pa.RecordBatch], row: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    for batch in batches:
        yield row, batch
        row += batch.num_rows


def _read_columns(
    source: Source, spans: Sequence[Span], head: int, bad: BadRow, kind: str
) -> Iterator[Rows]:
    schema, batches = _batches(source, kind, spans[0])
    held: list[tuple[int, pa.RecordBatch]] = []
    for span in spans:
        yield _rows_of(_gather(span, held, batches, schema), span)


def _gather(
    span: Span,
    held: list[tuple[int, pa.RecordBatch]],
    batches: Iterator[tuple[int, pa.RecordBatch]],
    schema: pa.Schema,
) -> pa.Table:
    """The rows of a span, from batches in order; `held` keeps those that a later span may need."""
    end = span.first_row + span.rows
    while not held or held[-1][0] + held[-1][1].num_rows < end:
        following = next(batches, None)
        if following is None:
            break
        held.append(following)
        held[:] = [pair for pair in held if pair[0] + pair[1].num_rows > span.first_row]
    slices = [
        batch.slice(max(0, span.first_row - first), end - max(first, span.first_row))
        for first, batch in held
    ]
    return pa.Table.from_batches(slices, schema)


READERS: dict[str, Callable[[Source, Sequence[Span], int, BadRow], Iterator[Rows]]] = {
    "lines": _read_lines,
    "array": _read_array,
    "csv": _read_csv,
    **{
        kind: functools.partial(_read_columns, kind=kind)
        for kind in ("parquet", "arrow file", "arrow stream")
    },
}
