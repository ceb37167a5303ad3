"""Raw files to rows: finding them, cutting them into parts, and reading one part into the columns every later stage knows.

A row becomes instruction, input (may be null) and output; every other column is kept beside them in the struct `other`, so the
original row can be written out again as it was. Bad rows are named by file, row and field.
"""

import fnmatch
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from s2l_ray.config import Columns
from s2l_ray.core.store import filesystem
from s2l_ray.core.tables import open_parquet
from s2l_ray.errors import UserError

ID_BITS = 40  # rows of one file; the bits above hold the file's number (design, section 3)
JSON_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
CHUNK = 1 << 22
RESERVED = ("example_id", "cluster")
KNOWN_COLUMNS = (
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "prompt", "output": "completion"},
)


@dataclass(frozen=True)
class RawFile:
    """A file as found: where it is, its name relative to the root (which is what identifies it), size and time of change."""

    uri: str
    name: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class FileIndex:
    """What one look at a file tells: content hash, rows, and the ranges (first row, rows, first byte, end byte) of its parts."""

    sha256: str
    rows: int
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
    """The rows of a part: a table (example_id, source, instruction, input, output, other?), what was rejected, and the names."""

    table: pa.Table
    rejects: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)


def find_files(patterns: list[str], root: str | None, section: str = "examples") -> list[RawFile]:
    """All raw files that the patterns name, sorted by their name relative to the root.

    Raises:
        UserError: a pattern that matches nothing, a file of an unknown kind, an empty file, two files with one name.
    """
    found: dict[str, pafs.FileInfo] = {}
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise UserError(
                f"looking for {section}.files: {pattern} matches no {' or '.join(SUFFIXES)} file. Correct the path; with several "
                "nodes it must be a place that all of them see."
            )
        found.update(matches)
    base = (
        _with_slash(root.rstrip("/") if root and "://" in root else os.path.abspath(root))
        if root
        else _common_folder(list(found))
    )
    files = []
    for uri, info in found.items():
        if not uri.startswith(base):
            raise UserError(
                f"looking for {section}.files: {uri} is not below {section}.root = {root}. Correct one of the two."
            )
        if info.size == 0:
            raise UserError(f"looking for {section}.files: {uri} is empty. Remove it, or name other files.")
        files.append(RawFile(uri, uri[len(base) :], info.size, info.mtime_ns or 0))
    return sorted(files, key=lambda file: file.name)


def _matches(pattern: str) -> dict[str, pafs.FileInfo]:
    filesystem_, path = filesystem(pattern)
    prefix = pattern[: len(pattern) - len(path)] if "://" in pattern and pattern.endswith(path) else ""
    if "://" in pattern and not prefix:
        prefix = pattern.split("://", 1)[0] + "://"
    if any(mark in path for mark in "*?["):
        base = path[: min(path.index(mark) for mark in "*?[" if mark in path)].rsplit("/", 1)[0]
        infos = filesystem_.get_file_info(
            pafs.FileSelector(base or "/", recursive=True, allow_not_found=True)
        )
        infos = [info for info in infos if fnmatch.fnmatchcase(info.path, path)]
        infos = [info for info in infos if info.type == pafs.FileType.File]
    else:
        info = filesystem_.get_file_info(path)
        if info.type == pafs.FileType.File:
            if not path.endswith(SUFFIXES):
                raise UserError(
                    f"looking for files: {pattern} is none of {', '.join(SUFFIXES)}. Convert it, or name other files."
                )
            return {prefix + path: info}
        if info.type != pafs.FileType.Directory:
            return {}
        infos = filesystem_.get_file_info(pafs.FileSelector(path, recursive=True))
    visible = [
        i
        for i in infos
        if i.path.endswith(SUFFIXES) and not i.base_name.startswith(".") and i.type == pafs.FileType.File
    ]
    return {prefix + info.path: info for info in visible}


def _with_slash(folder: str) -> str:
    return folder if folder.endswith("/") else folder + "/"


def _common_folder(uris: list[str]) -> str:
    folders = [uri.rsplit("/", 1)[0].split("/") for uri in uris]
    shared = []
    for pieces in zip(*folders, strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return "/".join(shared) + "/"


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
        else:
            rows = open_parquet(stream, file.uri).metadata.num_rows
            ranges = [
                (first, min(rows_per_part, rows - first), 0, 0) for first in range(0, rows, rows_per_part)
            ]
    if rows == 0:
        raise UserError(f"reading {file.uri}: it has no rows. Remove it, or name other files.")
    if rows >= 1 << ID_BITS:
        raise UserError(
            f"reading {file.uri}: {rows} rows, but a file may have at most 2^{ID_BITS}. Split it."
        )
    return FileIndex(digest.hexdigest(), rows, ranges)


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
        for first_row, rows, first_byte, end_byte in index.ranges:
            parts.append(PartRange(len(parts), number, file, first_row, rows, first_byte, end_byte))
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

    def bad(row: int, reason: str, text: str) -> None:
        if on_bad_row == "stop":
            place = f"line {row + 1}" if part.file.name.endswith(JSON_SUFFIXES) else f"row {row + 1}"
            raise UserError(
                f"reading {part.file.uri}, {place}: {reason}. Correct the row, or set examples.on_bad_row: reject to leave out "
                "and list such rows."
            )
        rejects.append({"file": part.file.name, "row": row, "reason": reason, "text": text[:500]})

    if part.file.name.endswith(JSON_SUFFIXES):
        numbers, table = _read_json(part, bad)
    else:
        numbers, table = _read_parquet(part)
    names = _column_names(table.column_names, columns, part.file.uri)
    good_N = _check(table, names, numbers, bad)
    table = table.filter(pa.array(good_N))
    return PartRows(
        _canonical(table, names, numbers[good_N], part),
        rejects,
        {"names": names, "order": table.column_names},
    )


def _read_json(part: PartRange, bad: Callable[[int, str, str], None]) -> tuple[np.ndarray, pa.Table]:
    filesystem_, path = filesystem(part.file.uri)
    with filesystem_.open_input_file(path) as stream:
        data = stream.read_at(part.end_byte - part.first_byte, part.first_byte)
    numbers, rows = [], []
    for number, line in enumerate(data.split(b"\n"), part.first_row):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"), parse_constant=_not_json)
        except UnicodeDecodeError as error:
            bad(
                number,
                f"expected UTF-8, got byte 0x{line[error.start]:02x} at position {error.start}",
                repr(line),
            )
            continue
        except (ValueError, RecursionError) as error:
            bad(number, f"expected a JSON object, but {error}", line.decode(errors="replace"))
            continue
        if not isinstance(row, dict):
            bad(number, f"expected a JSON object, got {type(row).__name__}", line.decode(errors="replace"))
            continue
        numbers.append(number)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = [_column(name, [row.get(name) for row in rows], numbers, part) for name in names]
    return np.array(numbers, np.int64), pa.table(dict(zip(names, arrays, strict=True)))


def _not_json(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _column(name: str, values: list[Any], numbers: list[int], part: PartRange) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        kinds = {
            type(value).__name__: number
            for value, number in zip(reversed(values), reversed(numbers), strict=True)
            if value is not None
        }
        where = ", ".join(f"{kind} in line {number + 1}" for kind, number in kinds.items())
        raise UserError(
            f"reading {part.file.uri}, field {name!r}: expected one type in all rows, got {where} ({error}). "
            "Make the field's type the same everywhere, or remove the field."
        ) from None


def _read_parquet(part: PartRange) -> tuple[np.ndarray, pa.Table]:
    filesystem_, path = filesystem(part.file.uri)
    with filesystem_.open_input_file(path) as stream:
        file = open_parquet(stream, part.file.uri)
        first, groups, skip = 0, [], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < part.first_row + part.rows and first + rows > part.first_row:
                skip = part.first_row - first if not groups else skip
                groups.append(group)
            first += rows
        try:
            table = file.read_row_groups(groups).slice(skip, part.rows)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"reading {part.file.uri}: the Parquet data are damaged ({error}). Replace the file."
            ) from None
    return np.arange(part.first_row, part.first_row + part.rows, dtype=np.int64), table


def _column_names(present: list[str], columns: Columns, uri: str) -> dict[str, str]:
    """Meaning -> column name, for the columns this file has."""
    for name in RESERVED:
        if name in present:
            raise UserError(
                f"reading {uri}: a column is named {name!r}, which the subset adds itself. Rename the column."
            )
    if len(set(present)) < len(present):
        raise UserError(f"reading {uri}: two columns have the same name in {present}. Rename one.")
    given = {meaning: name for meaning, name in columns.model_dump().items() if name is not None}
    absent = [
        f"{name!r} (examples.columns.{meaning})" for meaning, name in given.items() if name not in present
    ]
    if absent:
        raise UserError(
            f"reading {uri}: no column {', '.join(absent)}; it has {present}. Correct examples.columns."
        )
    fitting = [
        known for known in KNOWN_COLUMNS if all(known[need] in present for need in ("instruction", "output"))
    ]
    if "instruction" not in given or "output" not in given:
        if len(fitting) != 1:
            raise UserError(
                f"reading {uri}: expected columns instruction and output, or prompt and completion; it has {present}. Name the "
                "columns with examples.columns.instruction and examples.columns.output."
            )
        given = {**{meaning: name for meaning, name in fitting[0].items() if name in present}, **given}
    if "source" in present:
        given.setdefault("source", "source")
    return given


def _check(
    table: pa.Table, names: dict[str, str], numbers: np.ndarray, bad: Callable[[int, str, str], None]
) -> np.ndarray:
    good_N = np.ones(table.num_rows, bool)
    for meaning, name in names.items():
        column = table[name]
        if not (
            pa.types.is_string(column.type)
            or pa.types.is_large_string(column.type)
            or pa.types.is_null(column.type)
        ):
            first = (
                int(numbers[column.is_valid().to_numpy().argmax()]) if column.null_count < len(column) else 0
            )
            raise UserError(
                f"reading rows, field {name!r}: expected text, got {column.type} (row {first + 1}). Convert the column to strings, "
                f"or name another one with examples.columns.{meaning}."
            )
        if meaning == "input":
            continue
        text = column.cast(pa.string())
        empty = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0), True)
        for row in np.flatnonzero(empty.to_numpy() & good_N):
            what = "empty" if text[row].is_valid else "null or missing"
            whole = str(table.slice(row, 1).to_pylist()[0])
            bad(int(numbers[row]), f"field {name!r}: expected text, got a value that is {what}", whole)
            good_N[row] = False
    return good_N


def _canonical(table: pa.Table, names: dict[str, str], numbers: np.ndarray, part: PartRange) -> pa.Table:
    nothing = pa.nulls(table.num_rows, pa.string())
    source = (
        table[names["source"]].cast(pa.string())
        if "source" in names
        else pa.array([_stem(part.file.name)] * table.num_rows, pa.string())
    )
    arrays: dict[str, Any] = {
        "example_id": pa.array(numbers + (part.file_number << ID_BITS), pa.int64()),
        "source": source,
        "instruction": table[names["instruction"]].cast(pa.string()),
        "input": table[names["input"]].cast(pa.string()) if "input" in names else nothing,
        "output": table[names["output"]].cast(pa.string()),
    }
    rest = [name for name in table.column_names if name not in names.values()]
    if rest:
        arrays["other"] = pa.StructArray.from_arrays(
            [table[name].combine_chunks() for name in rest], names=rest
        )
    return pa.table(arrays)


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def original_rows(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    """The original columns, in their order, of rows in the canonical form; `columns` is what `read_part` said of them."""
    by_name = {name: table[meaning] for meaning, name in columns["names"].items()}
    if "other" in table.column_names:
        other = table["other"].combine_chunks()
        by_name.update({name: pa.chunked_array([other.field(name)]) for name in (f.name for f in other.type)})
    return pa.table({name: by_name[name] for name in columns["order"]})


def chosen_rows(table: pa.Table, columns: list[dict[str, str]]) -> pa.Table:
    """example_id, instruction, input, output of subset rows, by whichever of the files' namings fits a row."""
    nothing = pa.nulls(table.num_rows, pa.string())
    arrays = {"instruction": nothing, "input": nothing, "output": nothing}
    for names in columns:
        text = {
            meaning: table[names[meaning]].cast(pa.string()) if meaning in names else nothing
            for meaning in arrays
        }
        fits = pc.and_(pc.is_valid(text["instruction"]), pc.is_valid(text["output"]))
        free = pc.and_(fits, pc.is_null(arrays["output"]))
        arrays = {meaning: pc.if_else(free, text[meaning], arrays[meaning]) for meaning in arrays}
    return pa.table({"example_id": table["example_id"], **arrays})
