"""Raw files to rows: finding them, cutting them into parts, and reading one part into the columns every later stage knows.

A row becomes a conversation; all its columns are kept beside it in the struct `original`, so that it can be written out again as
it was. Bad rows are named by file, row and field.
"""

import fnmatch
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from s2l_ray.config import Columns
from s2l_ray.core.conversations import Column, column_names, conversations, is_text
from s2l_ray.core.store import filesystem
from s2l_ray.core.tables import EXAMPLES_FIXED, open_parquet
from s2l_ray.errors import UserError

ID_BITS = 40  # rows of one file; the bits above hold the file's number (design, section 3)
JSON_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
CHUNK = 1 << 22


@dataclass(frozen=True)
class RawFile:
    """A file as found: where it is, its name relative to the root (which is what identifies it), size and time of change; and, once
    it was read, the hash of its content."""

    uri: str
    name: str
    bytes: int
    mtime_ns: int
    sha256: str = ""


@dataclass(frozen=True)
class FileIndex:
    """What one look at a file tells: content hash, rows, uncompressed bytes, and its parts' (first row, rows, first byte, end byte)."""

    sha256: str
    rows: int
    text_bytes: int
    ranges: list[tuple[int, int, int, int]]


@dataclass(frozen=True)
class PartRange:
    """One part: a range of rows of one raw file. JSONL parts also know their bytes."""

    index: int
    file_number: int
    file: RawFile
    first_row: int
    rows: int
    first_byte: int
    end_byte: int


@dataclass
class PartRows:
    """The rows of a part: the columns of `examples` (tables.EXAMPLES_FIXED, then `original`), and what was rejected."""

    table: pa.Table
    rejects: list[dict[str, Any]] = field(default_factory=list)


def find_files(patterns: list[str], root: str | None, section: str = "examples") -> list[RawFile]:
    """All raw files that the patterns name, sorted by their name relative to the root.

    Raises:
        UserError: a pattern that matches nothing, a file of an unknown kind, an empty file, two files with one name.
    """
    found: dict[str, pafs.FileInfo] = {}
    for pattern in patterns:
        matches = _matches(pattern, section)
        if not matches:
            raise UserError(
                f"looking for {section}.files: {pattern} matches no {' or '.join(SUFFIXES)} file. Correct the path; with several "
                "nodes it must be a place that all of them see."
            )
        found.update(matches)
    base = _with_slash(filesystem(root)[1]) if root else _common_folder([i.path for i in found.values()])
    files: dict[str, RawFile] = {}
    for uri, info in found.items():
        if not info.path.startswith(base):
            raise UserError(
                f"looking for {section}.files: {uri} is not below {section}.root = {root}. Correct one of the two."
            )
        if info.size == 0:
            raise UserError(f"looking for {section}.files: {uri} is empty. Remove it, or name other files.")
        name = info.path[len(base) :]
        if name in files:
            raise UserError(
                f"looking for {section}.files: {files[name].uri} and {uri} are both {name} below the root. Name one of them, or "
                "give the other another name."
            )
        files[name] = RawFile(uri, name, info.size, info.mtime_ns or 0)
    return [files[name] for name in sorted(files)]


def _matches(pattern: str, section: str) -> dict[str, pafs.FileInfo]:
    """URI -> what is known of each file that a path, folder or glob names; hidden files and folders are passed over."""
    filesystem_, path = filesystem(pattern)
    path = path.rstrip("/")
    try:
        info = filesystem_.get_file_info(path or "/")
        if info.type == pafs.FileType.File:
            if not path.endswith(SUFFIXES):
                raise UserError(
                    f"looking for {section}.files: {pattern} is none of {', '.join(SUFFIXES)}. Convert it, or name other files."
                )
            return {_uri(pattern, path, path): info}
        folder, wanted = path, ["**"]
        if info.type != pafs.FileType.Directory:
            pieces = path.split("/")
            plain = next((n for n, piece in enumerate(pieces) if set(piece) & set("*?[")), 0)
            if not plain:
                return {}
            folder, wanted = "/".join(pieces[:plain]), pieces[plain:]
        infos = filesystem_.get_file_info(
            pafs.FileSelector(folder or "/", recursive=True, allow_not_found=True)
        )
    except OSError as error:
        raise UserError(
            f"looking for {section}.files: {pattern}: {error}. Correct the path, or what gives access to it."
        ) from None
    found = {}
    for info in infos:
        below = info.path[len(folder) + 1 :].split("/")
        hidden = any(piece.startswith(".") for piece in below)
        if (
            info.type == pafs.FileType.File
            and info.path.endswith(SUFFIXES)
            and not hidden
            and _fits(below, wanted)
        ):
            found[_uri(pattern, path, info.path)] = info
    return found


def _fits(pieces: list[str], wanted: list[str]) -> bool:
    """Globs as shells read them: `*` stays inside a folder's name, `**` spans any number of folders."""
    if not wanted:
        return not pieces
    if wanted[0] == "**":
        return any(_fits(pieces[skip:], wanted[1:]) for skip in range(len(pieces) + 1))
    return bool(pieces) and fnmatch.fnmatchcase(pieces[0], wanted[0]) and _fits(pieces[1:], wanted[1:])


def _uri(pattern: str, path: str, found: str) -> str:
    """How to open a path on the filesystem of a pattern: access keys and the query of a URI are kept."""
    if "://" not in pattern:
        return found
    place, question, query = pattern.partition("?")
    place = place.rstrip("/")
    ends = (end for end in range(len(place)) if unquote(place[end:]) == path)
    access = place[: next(ends, place.index("://") + 3)]
    return f"{access}{quote(found)}{question}{query}"


def _with_slash(folder: str) -> str:
    return folder if folder.endswith("/") else folder + "/"


def _common_folder(paths: list[str]) -> str:
    folders = [path.split("/")[:-1] for path in paths]
    shared = []
    for pieces in zip(*folders, strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return "/".join(shared) + "/" if shared else ""


def index_file(file: RawFile, rows_per_part: int) -> FileIndex:
    """Read a file once: hash it, count its rows and cut it into parts. Memory: one chunk and the list of parts."""
    digest = hashlib.sha256()
    is_json = file.name.endswith(JSON_SUFFIXES)
    ends = _LineEnds(rows_per_part)
    filesystem_, path = filesystem(file.uri)
    with filesystem_.open_input_file(path) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            if is_json:
                ends.add(chunk)
        if is_json:
            rows, ranges = ends.finish()
            text_bytes = file.bytes
        else:
            metadata = open_parquet(stream, file.uri).metadata
            rows = metadata.num_rows
            text_bytes = sum(
                metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)
            )
            ranges = [
                (first, min(rows_per_part, rows - first), 0, 0) for first in range(0, rows, rows_per_part)
            ]
    if rows == 0:
        raise UserError(f"reading {file.uri}: it has no rows. Remove it, or name other files.")
    if rows >= 1 << ID_BITS:
        raise UserError(
            f"reading {file.uri}: {rows} rows, but a file may have at most 2^{ID_BITS}. Split it."
        )
    return FileIndex(digest.hexdigest(), rows, text_bytes, ranges)


class _LineEnds:
    """Counts lines of a byte stream and remembers where every n-th one begins."""

    def __init__(self, every: int) -> None:
        self.every, self.lines, self.position, self.last = every, 0, 0, b"\n"
        self.starts = [0]

    def add(self, chunk: bytes) -> None:
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
        first = -self.lines % self.every or self.every
        self.starts += [self.position + int(end) + 1 for end in ends[first - 1 :: self.every]]
        self.lines += len(ends)
        self.position += len(chunk)
        self.last = chunk[-1:]

    def finish(self) -> tuple[int, list[tuple[int, int, int, int]]]:
        lines = self.lines + (self.last != b"\n")  # the last line may lack its end
        starts = self.starts[: -(-lines // self.every)]
        stops = [*starts[1:], self.position]
        ranges = [
            (number * self.every, min(self.every, lines - number * self.every), start, stop)
            for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]
        return lines, ranges


def part_ranges(files: list[RawFile], indexes: list[FileIndex]) -> list[PartRange]:
    """The parts of a data set, in file order; every row-wise artifact has these parts."""
    parts: list[PartRange] = []
    for number, (file, index) in enumerate(zip(files, indexes, strict=True)):
        read = replace(file, sha256=index.sha256)
        for first_row, rows, first_byte, end_byte in index.ranges:
            parts.append(PartRange(len(parts), number, read, first_row, rows, first_byte, end_byte))
    return parts


def read_part(part: PartRange, columns: Columns, on_bad_row: str = "stop") -> PartRows:
    """Read, check and name the rows of one part.

    Args:
        columns: names given by the user; found by their names where left out.
        on_bad_row: "stop" raises at the first bad row, "reject" lists bad rows.

    Raises:
        UserError: naming file, row, field and remedy.
    """
    rejects: list[dict[str, Any]] = []
    is_json = part.file.name.endswith(JSON_SUFFIXES)

    def bad(row: int, reason: str, text: str, detail: str = "") -> None:
        if on_bad_row == "stop":
            place = f"line {row + 1}" if is_json else f"row {row + 1}"
            raise UserError(
                f"reading {part.file.uri}, {place}: {reason}{detail}. Correct the row, or leave it out (with "
                "examples.on_bad_row: reject such rows are left out and listed)."
            ) from None
        rejects.append({"file": part.file.name, "row": row, "reason": reason, "text": text[:500]})

    rows = _json_rows(part, bad) if is_json else _parquet_rows(part)
    return PartRows(_examples(rows, part, columns, bad), rejects)


@dataclass(frozen=True)
class Rows:
    """Rows as a format gives them: their numbers in the file, int64 [N], and the values of each column."""

    numbers: np.ndarray
    columns: dict[str, Column]


def _examples(rows: Rows, part: PartRange, columns: Columns, bad: Callable[..., None]) -> pa.Table:
    """The good rows in the columns of `examples`."""
    rows = _in_utf8(rows, part.file.uri, bad)
    numbers, good_N = rows.numbers, np.ones(len(rows.numbers), bool)

    def bad_row(position: int, reason: str, detail: str) -> None:
        if good_N[position]:
            good_N[position] = False
            whole = {name: _value(column, position) for name, column in rows.columns.items()}
            bad(int(numbers[position]), reason, str(whole), detail)

    made: dict[str, pa.Array] = {}
    if rows.columns:
        names = column_names(list(rows.columns), columns, part.file.uri)
        made = conversations(rows.columns, len(numbers), names, columns, part.file.uri, bad_row)
    stem = pa.array([_stem(part.file.name)] * len(numbers), pa.string())
    nothing = EXAMPLES_FIXED.empty_table()
    table = pa.table(
        [
            pa.array(numbers + (part.file_number << ID_BITS)),
            made.get("source", stem),
            made.get("messages", nothing["messages"]),
            made.get("tools", nothing["tools"]),
        ],
        schema=EXAMPLES_FIXED,
    ).filter(pa.array(good_N))
    if rows.columns:
        table = table.append_column("original", _original(rows, good_N, part))
    return table


def _value(column: Column, position: int) -> Any:
    return column[position] if isinstance(column, list) else column[position].as_py()


def _original(rows: Rows, good_N: np.ndarray, part: PartRange) -> pa.StructArray:
    """All columns of the good rows as they were, in one struct."""
    every = bool(good_N.all())
    good = np.flatnonzero(good_N)
    arrays = []
    for name, column in rows.columns.items():
        if isinstance(column, list):
            values = column if every else [column[row] for row in good]
            arrays.append(_column(name, values, rows.numbers[good], part))
        else:
            arrays.append((column if every else column.filter(pa.array(good_N))).combine_chunks())
    return pa.StructArray.from_arrays(arrays, names=list(rows.columns))


def _open(part: PartRange) -> pa.NativeFile:
    """The part's file, which must still be the one that was cut into parts."""
    filesystem_, path = filesystem(part.file.uri)
    try:
        stream = filesystem_.open_input_file(path)
    except OSError as error:
        raise UserError(
            f"reading {part.file.uri}: {error}. Raw files must be readable under the same name on every node."
        ) from None
    if stream.size() != part.file.bytes:
        raise UserError(
            f"reading {part.file.uri}: expected {part.file.bytes} bytes, got {stream.size()}: the file changed while the job ran, or "
            "differs between nodes. Run the same command again once it rests."
        )
    return stream


def _json_rows(part: PartRange, bad: Callable[..., None]) -> Rows:
    with _open(part) as stream:
        data = stream.read_at(part.end_byte - part.first_byte, part.first_byte)
    numbers, rows = [], []
    for number, line in enumerate(data.split(b"\n"), part.first_row):
        if line.strip():
            row = _json_row(number, line, bad)
            if row is not None:
                numbers.append(number)
                rows.append(row)
    # A part of nothing but blank lines and bad rows has no columns: no row tells which there are.
    present = dict.fromkeys(name for row in rows for name in row)
    return Rows(np.array(numbers, np.int64), {name: [row.get(name) for row in rows] for name in present})


DECODER = json.JSONDecoder(parse_constant=lambda name: _not_json(name))


def _json_row(number: int, line: bytes, bad: Callable[..., None]) -> dict[str, Any] | None:
    """The object of a line; None, once `bad` is told, where there is none."""
    try:
        row = DECODER.decode(line.decode("utf-8-sig" if number == 0 else "utf-8"))
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        where = f", got byte 0x{error.object[error.start]:02x} at position {error.start}"
        bad(number, "expected UTF-8", repr(line), where)
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        text = line.decode(errors="replace")
        bad(number, "expected text, got half a surrogate pair", text, f", {half}")
    except json.JSONDecodeError as error:
        where = f", in column {error.colno}"
        bad(number, f"expected a JSON object, but {error.msg}", line.decode(errors="replace"), where)
    except (ValueError, RecursionError) as error:
        bad(number, f"expected a JSON object, but {error}", line.decode(errors="replace"))
    else:
        if isinstance(row, dict):
            return row
        bad(number, f"expected a JSON object, got {type(row).__name__}", line.decode(errors="replace"))
    return None


def _not_json(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _column(name: str, values: list[Any], numbers: np.ndarray, part: PartRange) -> pa.Array:
    try:
        made = pa.array(values)
        return made if _storable(made.type) else pa.array([_without_empty(value) for value in values])
    except (pa.ArrowException, OverflowError) as error:
        kinds = {
            type(value).__name__: number
            for value, number in zip(reversed(values), reversed(numbers.tolist()), strict=True)
            if value is not None
        }
        where = ", ".join(f"{kind} in line {number + 1}" for kind, number in kinds.items())
        raise UserError(
            f"reading {part.file.uri}, field {name!r}: expected one type in all rows, got {where} ({error}). "
            "Make the field's type the same everywhere, or remove the field."
        ) from None


def _storable(kind: pa.DataType) -> bool:
    """Whether Parquet can hold the type: it has no structs without fields."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return not (pa.types.is_struct(kind) and not inner) and all(_storable(item) for item in inner)


def _without_empty(value: Any) -> Any:
    """The value with null for every empty object."""
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items()} or None
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _parquet_rows(part: PartRange) -> Rows:
    with _open(part) as stream:
        file = open_parquet(stream, part.file.uri)
        first, skip = 0, 0
        groups: list[int] = []
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < part.first_row + part.rows and first + rows > part.first_row:
                skip = part.first_row - first if not groups else skip
                groups.append(group)
            first += rows
        try:
            table = _without_views(file.read_row_groups(groups).slice(skip, part.rows))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"reading {part.file.uri}: the Parquet data are damaged ({error}). Replace the file."
            ) from None
    if len(set(table.column_names)) < table.num_columns:
        column_names(table.column_names, Columns(), part.file.uri)  # says which name stands twice
    numbers = np.arange(part.first_row, part.first_row + part.rows, dtype=np.int64)
    return Rows(numbers, {name: table[name] for name in table.column_names})


def _without_views(table: pa.Table) -> pa.Table:
    """The table with plain strings for string views, which few kernels take."""
    for number, column in enumerate(table.schema):
        if pa.types.is_string_view(column.type):
            table = table.set_column(number, column.name, table[number].cast(pa.string()))
    return table


def _in_utf8(rows: Rows, uri: str, bad: Callable[..., None]) -> Rows:
    """The rows whose text is UTF-8."""
    wrong = _not_utf8(rows.columns, uri)
    if not wrong:
        return rows
    for row, name in wrong.items():
        text = rows.columns[name].cast(pa.string()).cast(pa.binary())[row].as_py()
        bad(int(rows.numbers[row]), f"field {name!r}: expected UTF-8", repr(text))
    good_N = np.isin(np.arange(len(rows.numbers)), list(wrong), invert=True)
    good = pa.array(good_N)
    return Rows(rows.numbers[good_N], {name: column.filter(good) for name, column in rows.columns.items()})


def _not_utf8(columns: dict[str, Column], uri: str) -> dict[int, str]:
    """Row -> name of a column that is not UTF-8 there; readers of Parquet and Arrow do not look."""
    wrong: dict[int, str] = {}
    for name, column in columns.items():
        if isinstance(column, list):
            continue
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            found = _not_utf8_rows(column) if is_text(column.type) else []
            if not found:
                raise UserError(
                    f"reading {uri}, field {name!r}: the data are damaged ({error}). Replace the file."
                ) from None
            wrong.update({row: name for row in found if row not in wrong})
    return wrong


def _not_utf8_rows(column: pa.ChunkedArray) -> list[int]:
    values = column.cast(pa.string()).cast(pa.binary()).to_pylist()
    return [
        row
        for row, value in enumerate(values)
        if value is not None and value.decode(errors="replace").encode() != value
    ]


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def original_rows(table: pa.Table) -> pa.Table:
    """The original columns, in their order, of rows in the columns of `examples`."""
    if "original" not in table.column_names:
        return pa.table({})
    return pa.Table.from_struct_array(table["original"].combine_chunks())
