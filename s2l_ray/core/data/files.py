"""Raw files to rows: finding them, cutting them into parts, and reading parts into the columns of `examples`.

A row becomes a conversation; all its columns are kept beside it in the struct `original`, so that it can be written out again as
it was. Bad rows are named by file, row and field.
"""

import fnmatch
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from s2l_ray.config import Columns
from s2l_ray.core.data import formats
from s2l_ray.core.data.conversations import Column, column_names, conversations, is_text, to_json
from s2l_ray.core.data.formats import FileIndex, Rows, Source, Span
from s2l_ray.core.data.hub import saved_files
from s2l_ray.core.storage.columns import is_json, json_field, plain_column, unify
from s2l_ray.core.storage.parquet import schema_from_text
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED
from s2l_ray.core.storage.store import filesystem
from s2l_ray.errors import UserError

ID_BITS = 40  # rows of one file; the bits above hold the file's number (design, section 3)
MAX_LEAVES = 256  # keys in objects, over all rows, beyond which a column is kept as JSON text
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class RawFile:
    """A file as found: where it is, its name relative to the root (which is what identifies it), the source of its rows, size and time
    of change; and, once it was read, the hash of its content."""

    uri: str
    name: str
    source: str
    bytes: int
    mtime_ns: int
    sha256: str = ""


@dataclass(frozen=True)
class PartRange:
    """One part: a span of rows of one raw file, where they lie in it, and what the file is (see `formats`)."""

    index: int
    file_number: int
    file: RawFile
    kind: str
    head: int
    first_row: int
    rows: int
    start: int
    end: int

    @property
    def span(self) -> Span:
        return Span(self.first_row, self.rows, self.start, self.end)

    @property
    def task(self) -> str:
        """Parts of one task are best read together, in their order."""
        return f"{self.file_number}/{formats.task_of(self.kind, self.file.name, self.span)}"


@dataclass
class PartRows:
    """The rows of a part: the columns of `examples` (tables.EXAMPLES_FIXED, then `original`), and what was rejected."""

    table: pa.Table
    rejects: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    """A file on its filesystem, and the data set it belongs to, if it is of one."""

    info: pafs.FileInfo
    dataset: str | None = None


def find_files(
    patterns: list[str], root: str | None, section: str = "examples", split: str = "train"
) -> list[RawFile]:
    """All raw files that the patterns name, sorted by their name relative to the root.

    Args:
        patterns: paths, folders or globs; folders that the `datasets` library saved are told by what lies in them.
        split: of such a folder that has several.

    Raises:
        UserError: a pattern that matches nothing, a file of an unknown kind, an empty file, two files with one name.
    """
    found: dict[str, _Found] = {}
    for pattern in patterns:
        matches = _matches(pattern, section, split)
        if not matches:
            raise UserError(
                f"looking for {section}.files: {pattern} matches no file that can be read ({_kinds()}). Correct the path; with "
                "several nodes it must be a place that all of them see."
            )
        found.update(matches)
    base = (
        _with_slash(filesystem(root)[1])
        if root
        else _common_folder([match.info.path for match in found.values()])
    )
    files: dict[str, RawFile] = {}
    for uri, match in found.items():
        info = match.info
        if not info.path.startswith(base):
            raise UserError(
                f"looking for {section}.files: {uri} is not below {section}.root = {root}. Correct one of the two."
            )
        if info.size == 0:
            raise UserError(
                f"looking for {section}.files: {uri} is empty. Remove it, or name other files."
            )
        name = info.path[len(base) :]
        if name in files:
            raise UserError(
                f"looking for {section}.files: {files[name].uri} and {uri} are both {name} below the root. Name one of them, or "
                "give the other another name."
            )
        files[name] = RawFile(
            uri, name, match.dataset or source_of(name), info.size, info.mtime_ns or 0
        )
    return [files[name] for name in sorted(files)]


def _matches(pattern: str, section: str, split: str) -> dict[str, _Found]:
    """URI -> what is known of each file that a path, folder or glob names; hidden files and folders are passed over."""
    filesystem_, path = filesystem(pattern)
    path = path.rstrip("/")
    try:
        info = filesystem_.get_file_info(path or "/")
        if info.type == pafs.FileType.File:
            if not path.endswith(formats.SUFFIXES):
                raise UserError(
                    f"looking for {section}.files: {pattern} is none of {_kinds()}. Convert it, or name other files."
                )
            return {_uri(pattern, path, path): _Found(info)}
        folder, wanted = path, ["**"]
        if info.type == pafs.FileType.Directory:
            saved = saved_files(filesystem_, path, split)
            if saved is not None:
                name = path.rpartition("/")[2]
                infos = filesystem_.get_file_info(saved)
                return {_uri(pattern, path, info.path): _Found(info, name) for info in infos}
        else:
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
    return {
        _uri(pattern, path, info.path): _Found(info)
        for info in infos
        if info.type == pafs.FileType.File
        and info.path.endswith(formats.SUFFIXES)
        and _is_wanted(info.path[len(folder) + 1 :].split("/"), wanted)
    }


def _is_wanted(pieces: list[str], wanted: list[str]) -> bool:
    return not any(piece.startswith(".") for piece in pieces) and _fits(pieces, wanted)


def _kinds() -> str:
    text = ", ".join(formats.TEXT_SUFFIXES)
    return f"{text} (each also with {', '.join(formats.CODECS)}), .parquet, {', '.join(formats.ARROW_SUFFIXES)}"


def source_of(name: str) -> str:
    """The source of a file's rows, where no column tells it: its name without suffixes and without its number among shards."""
    return SHARD.sub("", formats.bare_name(name).rpartition(".")[0])


def _fits(pieces: list[str], wanted: list[str]) -> bool:
    """Globs as shells read them: `*` stays inside a folder's name, `**` spans any number of folders."""
    if not wanted:
        return not pieces
    if wanted[0] == "**":
        return any(_fits(pieces[skip:], wanted[1:]) for skip in range(len(pieces) + 1))
    return (
        bool(pieces) and fnmatch.fnmatchcase(pieces[0], wanted[0]) and _fits(pieces[1:], wanted[1:])
    )


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
    """Read a file once: hash it, count its rows and cut it into parts. Memory: a chunk or a batch, and the list of parts."""
    with _open(file) as stream:
        source = Source(stream, file.name, file.uri)
        try:
            index = replace(formats.cut(source, rows_per_part), sha256=source.sha256())
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, error) from None
    if index.rows == 0:
        raise UserError(f"reading {file.uri}: it has no rows. Remove it, or name other files.")
    if index.rows >= 1 << ID_BITS:
        raise UserError(
            f"reading {file.uri}: {index.rows} rows, but a file may have at most 2^{ID_BITS}. Split it."
        )
    return index


def _damaged(file: RawFile, error: Exception) -> UserError:
    what = " ".join(str(error).split())  # some libraries write several lines
    return UserError(f"reading {file.uri}: the data are damaged ({what}). Replace the file.")


def part_ranges(files: list[RawFile], indexes: list[FileIndex]) -> list[PartRange]:
    """The parts of a data set, in file order; every row-wise artifact has these parts."""
    parts: list[PartRange] = []
    for number, (file, index) in enumerate(zip(files, indexes, strict=True)):
        read = replace(file, sha256=index.sha256)
        for span in index.spans:
            parts.append(PartRange(len(parts), number, read, index.kind, index.head, *span))
    return parts


def check_columns(files: list[RawFile], indexes: list[FileIndex], columns: Columns) -> None:
    """Check the columns of those files that tell them without their rows, before any work: their meaning, and whether they fit.

    Raises:
        UserError: a file whose columns do not tell a schema, or two files whose columns do not fit.
    """
    pairs = zip(files, indexes, strict=True)
    known = [
        (file.uri, schema_from_text(index.schema, file.uri))
        for file, index in pairs
        if index.schema
    ]
    for uri, schema in known:
        column_names(schema.names, columns, uri)
    unify(known)


def read_part(part: PartRange, columns: Columns, on_bad_row: str = "stop") -> PartRows:
    """Read, check and name the rows of one part; see `read_parts`."""
    return next(read_parts([part], columns, on_bad_row))


def read_parts(
    parts: Sequence[PartRange], columns: Columns, on_bad_row: str = "stop"
) -> Iterator[PartRows]:
    """Read, check and name the rows of parts of one file, in their order. Memory: one part.

    Args:
        columns: names given by the user; found by their names where left out.
        on_bad_row: "stop" raises at the first bad row, "reject" lists bad rows.

    Raises:
        UserError: naming file, row, field and remedy.
    """
    file, kind = parts[0].file, parts[0].kind
    rejects: list[dict[str, Any]] = []

    def bad(row: int, reason: str, text: str, detail: str) -> None:
        if on_bad_row == "stop":
            place = "line" if kind == "lines" else "row"
            raise UserError(
                f"reading {file.uri}, {place} {row + 1}: {reason}{detail}. Correct the row, or leave it out (with "
                "examples.on_bad_row: reject such rows are left out and listed)."
            ) from None
        rejects.append({"file": file.name, "row": row, "reason": reason, "text": text[:500]})

    with _open(file) as stream:
        source = Source(stream, file.name, file.uri)
        rows = formats.read(source, kind, [part.span for part in parts], parts[0].head, bad)
        for part in parts:
            try:
                read = next(rows)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(file, error) from None
            table = _examples(read, part, columns, bad)
            yield PartRows(table, rejects[:])
            rejects.clear()


def _open(file: RawFile) -> pa.NativeFile:
    """The file, which must still be the one that was found, and the one that was cut into parts."""
    filesystem_, path = filesystem(file.uri)
    try:
        stream = filesystem_.open_input_file(path)
        changed = filesystem_.get_file_info(path).mtime_ns or 0
    except OSError as error:
        raise UserError(
            f"reading {file.uri}: {error}. Raw files must be readable under the same name on every node."
        ) from None
    size = stream.size()
    # A copy of the same content on another node has a time of its own.
    if size != file.bytes or (
        file.sha256 and changed != file.mtime_ns and _sha256(file.uri, changed) != file.sha256
    ):
        raise UserError(
            f"reading {file.uri}: expected {file.bytes} bytes with SHA-256 {file.sha256[:16]}, got {size}"
            f"{' others' if size == file.bytes else ''}: the file changed while the job ran, or differs between nodes. Run the same "
            "command again once it rests."
        )
    return stream


@functools.lru_cache(maxsize=1024)
def _sha256(uri: str, changed: int) -> str:
    filesystem_, path = filesystem(uri)
    with filesystem_.open_input_file(path) as stream:
        return Source(stream, "", uri).sha256()


def _examples(rows: Rows, part: PartRange, given: Columns, bad: formats.BadRow) -> pa.Table:
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
        names = column_names(list(rows.columns), given, part.file.uri)
        made = conversations(rows.columns, len(numbers), names, given, part.file.uri, bad_row)
    nothing = EXAMPLES_FIXED.empty_table()
    table = pa.table(
        [
            pa.array(numbers + (part.file_number << ID_BITS)),
            made.get("source", pa.repeat(part.file.source, len(numbers))),
            made.get("messages", nothing["messages"]),
            made.get("tools", nothing["tools"]),
        ],
        schema=EXAMPLES_FIXED,
    ).filter(pa.array(good_N))
    return table.append_column("original", _original(rows, good_N, part)) if rows.columns else table


def _value(column: Column, position: int) -> Any:
    return column[position] if isinstance(column, list) else column[position].as_py()


def _original(rows: Rows, good_N: np.ndarray, part: PartRange) -> pa.StructArray:
    """All columns of the good rows as they were, in one struct."""
    good, every = np.flatnonzero(good_N), bool(good_N.all())
    fields, arrays = [], []
    for name, column in rows.columns.items():
        if isinstance(column, list):
            values = column if every else [column[row] for row in good]
            kept, array = _typed(name, values, rows.numbers[good], part)
        else:
            array = (column if every else column.filter(pa.array(good_N))).combine_chunks()
            kept = pa.field(name, array.type)
        fields.append(kept)
        arrays.append(array)
    return pa.StructArray.from_arrays(arrays, fields=fields)


def _typed(
    name: str, values: list[Any], numbers: np.ndarray, part: PartRange
) -> tuple[pa.Field, pa.Array]:
    """The values as an array of whatever type they all have; lists and objects that have none as JSON text."""
    try:
        array = pa.array(values)
        if not _storable(array.type):
            array = pa.array([_without_empty(value) for value in values])
        if _leaves(array.type) <= MAX_LEAVES:
            return pa.field(name, array.type), array
    except (pa.ArrowException, OverflowError) as error:
        if not all(isinstance(value, dict | list | None) for value in values):
            raise _several_types(name, values, numbers, part, error) from None
    text = [None if value is None else to_json(value) for value in values]
    return json_field(name), pa.array(text, pa.string())


def _several_types(
    name: str, values: list[Any], numbers: np.ndarray, part: PartRange, error: Exception
) -> UserError:
    kinds = {
        type(value).__name__: number
        for value, number in zip(reversed(values), reversed(numbers.tolist()), strict=True)
        if value is not None
    }
    place = "line" if part.kind == "lines" else "row"
    where = ", ".join(f"{kind} in {place} {number + 1}" for kind, number in kinds.items())
    return UserError(
        f"reading {part.file.uri}, field {name!r}: expected one type in all rows, got {where} ({error}). "
        "Make the field's type the same everywhere, or remove the field."
    )


def _leaves(kind: pa.DataType) -> int:
    """How many columns Parquet makes of the type."""
    return sum(_leaves(kind.field(number).type) for number in range(kind.num_fields)) or 1


def _storable(kind: pa.DataType) -> bool:
    """Whether Parquet can hold the type: it has no structs without fields."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return not (pa.types.is_struct(kind) and not inner) and all(_storable(item) for item in inner)


def _without_empty(value: Any) -> Any:
    """The value with null for every empty object."""
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items()} or None
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _in_utf8(rows: Rows, uri: str, bad: formats.BadRow) -> Rows:
    """The rows whose text is UTF-8, which readers of Parquet and Arrow do not look at, in plain types."""
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
        for row in [row for row, field_ in wrong.items() if field_ == name]:
            text = column.cast(pa.string()).cast(pa.binary())[row].as_py()
            bad(int(rows.numbers[row]), f"field {name!r}: expected UTF-8", repr(text), "")
        columns[name] = plain_column(column.filter(pa.array(keep_N)) if wrong else column)
    return Rows(rows.numbers[keep_N], columns)


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


def original_rows(table: pa.Table, schema: pa.Schema | None = None) -> pa.Table:
    """The original columns, in their order, of rows in the columns of `examples`; with `schema`, the one that all files share, in its
    columns and types."""
    rows = (
        pa.Table.from_struct_array(table["original"].combine_chunks())
        if "original" in table.column_names
        else pa.table({})
    )
    if schema is None:
        return rows
    for number, column in enumerate(rows.schema):
        if is_json(schema.field(column.name)) and not is_json(column):
            text = [None if value is None else to_json(value) for value in rows[number].to_pylist()]
            rows = rows.set_column(number, json_field(column.name), pa.array(text, pa.string()))
    return pa.concat_tables([schema.empty_table(), rows], promote_options="permissive")
