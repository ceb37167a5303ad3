"""Arrow tables in and out of bytes, the one place where Arrow and Parquet are read, and the schemas of the row-wise artifacts.

Extension types are refused from the file's own metadata, before Arrow builds a schema: some libraries register types that
unpickle while a schema or a value is read (design, invariant 3).
"""

import base64
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.errors import UserError

ROWS_PER_GROUP = 65_536
EXTENSION_KEY = b"ARROW:extension:name"
# The key as it stands in the base64 of a stored Arrow schema: the characters that it alone decides, for each place in a group of 3.
EXTENSION_TRACES = [
    base64.b64encode(bytes(shift) + EXTENSION_KEY)[first : (shift + len(EXTENSION_KEY)) * 4 // 3]
    for shift, first in ((0, 0), (1, 2), (2, 3))
]
JSON_KEY = b"s2l_ray"  # of the metadata of a column of JSON text
CONTINUATION = b"\xff" * 4  # begins every message of an Arrow stream

# A conversation: turns by system, user, assistant or tool. `content` is never null ("" where a turn only calls tools); `input` is the
# paper's separate input text of a user turn, or null; `extra` is null, or JSON of whatever else a chat template may want of the turn.
MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("input", pa.string()),
            ("extra", pa.string()),
        ]
    )
)
# The columns of `examples` that all files share; the struct `original` follows, with each file's own columns as they were.
# `tools` is null, or JSON text of a list of tool schemas.
EXAMPLES_FIXED = pa.schema(
    [
        ("example_id", pa.int64()),
        ("source", pa.string()),
        ("messages", MESSAGES),
        ("tools", pa.string()),
    ]
)
CLUSTERS = pa.schema(
    [("example_id", pa.int64()), ("cluster", pa.int32()), ("distance", pa.float32())]
)


def trajectories_schema(num_columns: int, statistics: Sequence[str] = ()) -> pa.Schema:
    """Schema of `trajectories`: losses at every step of every member, step 0 included, then as many values of each statistic.

    Rows that could not be scored have nulls and a reason.
    """
    vector = pa.list_(pa.float32(), num_columns)
    return pa.schema(
        [
            ("example_id", pa.int64()),
            ("source", pa.string()),
            ("num_tokens", pa.int32()),
            ("losses", vector),
            *((name, vector) for name in statistics),
            ("reason", pa.string()),
        ]
    )


def evaluation_schema() -> pa.Schema:
    """Schema of `evaluation`: one row a held-out example; `exact` is null where no answer was generated."""
    return pa.schema(
        [
            ("example_id", pa.int64()),
            ("source", pa.string()),
            ("num_tokens", pa.int32()),
            ("loss", pa.float32()),
            ("generated", pa.string()),
            ("exact", pa.bool_()),
        ]
    )


def parquet_bytes(table: pa.Table) -> bytes:
    """One Parquet file in memory; equal tables give equal bytes whatever their chunks were."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=ROWS_PER_GROUP,
        compression="zstd",
        version="2.6",
        use_dictionary=True,
    )
    return sink.getvalue().to_pybytes()


def open_parquet(source: bytes | pa.NativeFile, what: str) -> pq.ParquetFile:
    """Open Parquet after refusing extension types, by the bytes of its footer: parsing it would already build the schema.

    Args:
        source: the file's bytes, or an open random-access file.
        what: the file's name, for messages.

    Raises:
        UserError: not Parquet, truncated, or a column has an extension type.
    """
    handle = pa.BufferReader(source) if isinstance(source, bytes) else source
    try:
        footer = _footer(handle)
        _refuse_extensions(any(trace in footer for trace in EXTENSION_TRACES), what)
        return pq.ParquetFile(handle, arrow_extensions_enabled=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"reading {what}: expected a whole Parquet file, but {error}. Replace the file, or name other files."
        ) from None


def _footer(handle: pa.NativeFile) -> bytes:
    """The serialised metadata at the end of a Parquet file, unparsed: length in 4 bytes and a magic word close the file."""
    end = max(0, handle.size() - 8)
    length = int.from_bytes(handle.read_at(4, end), "little")
    return handle.read_at(min(length, end), max(0, end - length))


def _refuse_extensions(found: bool, what: str) -> None:
    if found:
        raise UserError(
            f"reading {what}: a column has an Arrow extension type, which may run code while it is read. "
            "Expected plain types only; rewrite the file with the storage type of that column."
        )


def open_arrow_file(handle: pa.NativeFile, what: str) -> pa.RecordBatchFileReader:
    """Open Arrow's file format after refusing extension types by the bytes of its footer, where schemas stand as they are.

    Raises:
        UserError: not an Arrow file, truncated, or a column has an extension type.
    """
    try:
        size = handle.size()
        tail = handle.read_at(10, max(0, size - 10))
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"ARROW1" or length > size:
            raise pa.ArrowInvalid("its end is missing")
        _refuse_extensions(EXTENSION_KEY in handle.read_at(length, size - 10 - length), what)
        return pa.ipc.open_file(handle)
    except (pa.ArrowException, OSError) as error:
        raise _no_arrow(what, error) from None


def open_arrow_stream(handle: pa.NativeFile, what: str) -> pa.RecordBatchStreamReader:
    """Open Arrow's stream format after refusing extension types by the bytes of its first message, which is the schema.

    Raises:
        UserError: not an Arrow stream, truncated, or a column has an extension type.
    """
    try:
        head = handle.read_at(8, 0)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != CONTINUATION or not 0 < length < handle.size():
            raise pa.ArrowInvalid("it does not begin as one")
        if handle.read_at(8, max(0, handle.size() - 8)) != CONTINUATION + bytes(4):
            raise pa.ArrowInvalid("its end is missing")
        _refuse_extensions(EXTENSION_KEY in handle.read_at(length, 8), what)
        handle.seek(0)
        return pa.ipc.open_stream(handle)
    except (pa.ArrowException, OSError) as error:
        raise _no_arrow(what, error) from None


def _no_arrow(what: str, error: Exception) -> UserError:
    return UserError(
        f"reading {what}: expected a whole Arrow file or stream, but {error}. Replace the file, or name other files."
    )


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views, which hold the same values in ways that few kernels take."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(item.name, plain_type(item.type)) for item in kind])
    return kind


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column in its `plain_type`."""
    kind = plain_type(column.type)
    if column.type == kind:
        return column
    if pa.types.is_dictionary(
        column.type
    ):  # whose values may be views, which a cast of the whole does not take
        return pa.chunked_array([_decoded(chunk, kind) for chunk in column.chunks], kind)
    return column.cast(kind)


def _decoded(chunk: pa.DictionaryArray, kind: pa.DataType) -> pa.Array:
    return chunk.dictionary.cast(kind).take(chunk.indices)


def json_field(name: str) -> pa.Field:
    """A column of JSON text: objects and lists whose values have no one type in all rows are kept as that."""
    return pa.field(name, pa.string(), metadata={JSON_KEY: b"json"})


def is_json(field: pa.Field) -> bool:
    """Whether a column's text stands for the values it was written from; exports as JSON write these."""
    return JSON_KEY in (field.metadata or {})


def unify(schemas: Iterable[tuple[str, pa.Schema]]) -> pa.Schema:
    """One schema for the columns of several files: missing columns become nulls, integers may become floats, lists and objects that
    do not fit become JSON text.

    Args:
        schemas: file name and schema.

    Raises:
        UserError: two files that do not fit, by their names.
    """
    fields: dict[str, pa.Field] = {}
    seen: dict[pa.Schema, str] = {}
    for name, schema in schemas:
        if schema in seen:
            continue
        for column in schema:
            try:
                fields[column.name] = _fitting(fields.get(column.name), column)
            except pa.ArrowException as error:
                other = next(
                    (n for s, n in seen.items() if not _fit(s, column)), "the files before it"
                )
                raise UserError(
                    f"unifying the columns of all files: field {column.name!r} of {name} does not fit that of {other} ({error}). Make "
                    "the field's type the same in all files, or remove the field."
                ) from None
        seen[schema] = name
    return pa.schema(list(fields.values()))


def _fitting(one: pa.Field | None, other: pa.Field) -> pa.Field:
    """The column that holds the values of both."""
    if one is None or pa.types.is_null(one.type):
        return other
    if pa.types.is_null(other.type):
        return one
    as_json = all(is_json(field) or pa.types.is_nested(field.type) for field in (one, other))
    if as_json and (is_json(one) or is_json(other)):
        return json_field(one.name)
    try:
        if is_json(one) or is_json(other):
            raise pa.ArrowTypeError(
                f"Unable to merge: lists or objects vs {one.type} and {other.type}"
            )
        return pa.unify_schemas(
            [pa.schema([one]), pa.schema([other])], promote_options="permissive"
        ).field(0)
    except pa.ArrowException:
        if as_json:
            return json_field(one.name)
        raise


def _fit(schema: pa.Schema, column: pa.Field) -> bool:
    try:
        _fitting(schema.field(column.name) if column.name in schema.names else None, column)
    except pa.ArrowException:
        return False
    return True


def read_parquet(data: bytes, what: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole Parquet file as a table; see `open_parquet` for what is refused."""
    try:
        return open_parquet(data, what).read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"reading {what}: the Parquet data are damaged ({error}). Replace the file."
        ) from None


def schema_text(schema: pa.Schema) -> str:
    """A schema as text, for manifests."""
    return base64.b64encode(schema.remove_metadata().serialize()).decode()


def schema_from_text(text: str, what: str) -> pa.Schema:
    """The inverse of `schema_text`; extension types are refused before Arrow sees them."""
    data = base64.b64decode(text)
    if EXTENSION_KEY in data:
        raise UserError(
            f"reading the schema of {what}: it has an extension type. Remove the artifact's folder and run again."
        )
    return pa.ipc.read_schema(pa.BufferReader(data))


def vectors(column: pa.ChunkedArray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """A fixed_size_list<float32>[T] column as (valid bool [N], values float32 [n, T]), n the number of valid rows."""
    if not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float32():
        raise UserError(
            f"reading {what}: expected a column of fixed_size_list<float>, got {column.type}. The file was not written by "
            "this version of s2l_ray: remove the artifact's folder and run again."
        )
    valid_N = column.is_valid().to_numpy()
    present = column.drop_null().combine_chunks()
    return valid_N, present.flatten().to_numpy(zero_copy_only=False).reshape(
        -1, column.type.list_size
    )


def vector_column(valid_N: np.ndarray, values_NT: np.ndarray) -> pa.FixedSizeListArray:
    """The inverse of `vectors`, but with a row of values (ignored where not valid) for all N rows."""
    flat = pa.array(
        np.ascontiguousarray(values_NT, dtype=np.float32).reshape(-1), type=pa.float32()
    )
    return pa.FixedSizeListArray.from_arrays(flat, values_NT.shape[1], mask=pa.array(~valid_N))
