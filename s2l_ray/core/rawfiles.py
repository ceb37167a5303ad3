"""Raw files to rows: finding them, cutting them into parts, and reading one part into the columns every later stage knows.

A row becomes instruction, input (may be null) and output; every other column is kept beside them in the struct `other`, so the
original row can be written out again as it was. Bad rows are named by file, row and field.
"""

import fnmatch
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

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

    def bad(row: int, reason: str, text: str, detail: str = "") -> None:
        if on_bad_row == "stop":
            place = f"line {row + 1}" if part.file.name.endswith(JSON_SUFFIXES) else f"row {row + 1}"
            raise UserError(
                f"reading {part.file.uri}, {place}: {reason}{detail}. Correct the row, or leave it out (with "
                "examples.on_bad_row: reject such rows are left out and listed)."
            ) from None
        rejects.append({"file": part.file.name, "row": row, "reason": reason, "text": text[:500]})

    if part.file.name.endswith(JSON_SUFFIXES):
        numbers, rows = _json_rows(part, bad)
        present = list(dict.fromkeys(name for row in rows for name in row))
        if not rows:  # nothing but blank lines and rejected rows: no row tells which columns there are
            return PartRows(_canonical(pa.table({}), {}, numbers, part), rejects, {"names": {}, "order": []})
        names = _column_names(present, columns, part.file.uri)
        numbers, rows = _text_rows(rows, numbers, names, bad)
        arrays = [_column(name, [row.get(name) for row in rows], numbers, part) for name in present]
        table = pa.table(dict(zip(present, arrays, strict=True)))
    else:
        numbers, table = _read_parquet(part)
        names = _column_names(table.column_names, columns, part.file.uri)
    good_N = _check(table, names, numbers, part.file.uri, bad)
    table = table.filter(pa.array(good_N))
    return PartRows(
        _canonical(table, names, numbers[good_N], part),
        rejects,
        {"names": names, "order": table.column_names},
    )


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


def _json_rows(part: PartRange, bad: Callable[..., None]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    with _open(part) as stream:
        data = stream.read_at(part.end_byte - part.first_byte, part.first_byte)
    numbers, rows = [], []
    for number, line in enumerate(data.split(b"\n"), part.first_row):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"), parse_constant=_not_json)
            if b"\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            where = f", got byte 0x{error.object[error.start]:02x} at position {error.start}"
            bad(number, "expected UTF-8", repr(line), where)
        except UnicodeEncodeError as error:
            surrogate = ascii(error.object[error.start])
            bad(
                number,
                "expected text, got half a surrogate pair",
                line.decode(errors="replace"),
                f", {surrogate}",
            )
        except json.JSONDecodeError as error:
            where = f", in column {error.colno}"
            bad(number, f"expected a JSON object, but {error.msg}", line.decode(errors="replace"), where)
        except (ValueError, RecursionError) as error:
            bad(number, f"expected a JSON object, but {error}", line.decode(errors="replace"))
        else:
            if isinstance(row, dict):
                numbers.append(number)
                rows.append(row)
            else:
                kind = type(row).__name__
                bad(number, f"expected a JSON object, got {kind}", line.decode(errors="replace"))
    return np.array(numbers, np.int64), rows


def _not_json(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _text_rows(
    rows: list[dict[str, Any]], numbers: np.ndarray, names: dict[str, str], bad: Callable[..., None]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The rows whose named columns hold text, or nothing."""
    good = []
    for place, row in enumerate(rows):
        wrong = [name for name in names.values() if not isinstance(row.get(name), str | None)]
        if wrong:
            kind = type(row[wrong[0]]).__name__
            bad(int(numbers[place]), f"field {wrong[0]!r}: expected text, got {kind}", str(row))
        else:
            good.append(place)
    return numbers[good], [rows[place] for place in good]


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


def _read_parquet(part: PartRange) -> tuple[np.ndarray, pa.Table]:
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
    return np.arange(part.first_row, part.first_row + part.rows, dtype=np.int64), table


def _without_views(table: pa.Table) -> pa.Table:
    """The table with plain strings for string views, which few kernels take."""
    for number, column in enumerate(table.schema):
        if pa.types.is_string_view(column.type):
            table = table.set_column(number, column.name, table[number].cast(pa.string()))
    return table


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
    if "source" in present and given.setdefault("source", "source") != "source":
        raise UserError(
            f"reading {uri}: examples.columns.source is {given['source']!r}, but a column is named 'source', which the subset writes "
            "itself. Rename the column."
        )
    return given


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null))


def _not_utf8(table: pa.Table, uri: str) -> dict[int, str]:
    """Row -> name of a column that is not UTF-8 there; Parquet readers do not look."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        wrong: dict[int, str] = {}
        for name in table.column_names:
            if not _is_text(table[name].type) or pa.types.is_null(table[name].type):
                continue
            for row, value in enumerate(table[name].cast(pa.string()).cast(pa.binary()).to_pylist()):
                if value is not None and value.decode(errors="replace").encode() != value:
                    wrong.setdefault(row, name)
        if not wrong:
            raise UserError(
                f"reading {uri}: the Parquet data are damaged ({error}). Replace the file."
            ) from None
        return wrong
    return {}


def _check(
    table: pa.Table, names: dict[str, str], numbers: np.ndarray, uri: str, bad: Callable[..., None]
) -> np.ndarray:
    good_N = np.ones(table.num_rows, bool)
    for row, name in _not_utf8(table, uri).items():
        text = table[name].cast(pa.string()).cast(pa.binary())[row].as_py()
        bad(int(numbers[row]), f"field {name!r}: expected UTF-8", repr(text))
        good_N[row] = False
    for meaning, name in names.items():
        column = table[name]
        if not _is_text(column.type):
            raise UserError(
                f"reading {uri}, field {name!r}: expected text, got {column.type}. Convert the column to strings, "
                f"or name another one with examples.columns.{meaning}."
            )
        if meaning == "input":
            continue
        text = pc.if_else(pa.array(good_N), column.cast(pa.string()), pa.scalar(None, pa.string()))
        empty = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0), True)
        for row in np.flatnonzero(empty.to_numpy() & good_N).tolist():
            what = "empty" if text[row].is_valid else "null or missing"
            whole = str(table.slice(row, 1).to_pylist()[0])
            bad(int(numbers[row]), f"field {name!r}: expected text, got a value that is {what}", whole)
            good_N[row] = False
    return good_N


def _canonical(table: pa.Table, names: dict[str, str], numbers: np.ndarray, part: PartRange) -> pa.Table:
    arrays: dict[str, Any] = {
        "example_id": pa.array(numbers + (part.file_number << ID_BITS), pa.int64()),
        "source": pa.array([_stem(part.file.name)] * table.num_rows, pa.string()),
        **{meaning: pa.nulls(table.num_rows, pa.string()) for meaning in ("instruction", "input", "output")},
        **{meaning: table[name].cast(pa.string()) for meaning, name in names.items()},
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
    # a naming with an input column first: one without it would fit the same rows and lose the input
    for names in sorted(columns, key=lambda names: ("input" not in names, sorted(names.items()))):
        text = {
            meaning: table[names[meaning]].cast(pa.string()) if meaning in names else nothing
            for meaning in arrays
        }
        fits = pc.and_(pc.is_valid(text["instruction"]), pc.is_valid(text["output"]))
        free = pc.and_(fits, pc.is_null(arrays["output"]))
        arrays = {meaning: pc.if_else(free, text[meaning], arrays[meaning]) for meaning in arrays}
    return pa.table({"example_id": table["example_id"], **arrays})
