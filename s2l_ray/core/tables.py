"""Arrow tables in and out of bytes, the one place where Arrow and Parquet are read, and the schemas of the row-wise artifacts.

Extension types are refused from the file's own metadata, before Arrow builds a schema: some libraries register types that
unpickle while a schema or a value is read (design, invariant 3).
"""

import base64
from collections.abc import Sequence

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

# A conversation: turns by system, user, assistant or tool. `content` is never null ("" where a turn only calls tools); `input` is the
# paper's separate input text of a user turn, or null; `extra` is null, or JSON of whatever else a chat template may want of the turn.
MESSAGES = pa.list_(
    pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("input", pa.string()), ("extra", pa.string())]
    )
)
# The columns of `examples` that all files share; the struct `original` follows, with each file's own columns as they were.
# `tools` is null, or JSON text of a list of tool schemas.
EXAMPLES_FIXED = pa.schema(
    [("example_id", pa.int64()), ("source", pa.string()), ("messages", MESSAGES), ("tools", pa.string())]
)
CLUSTERS = pa.schema([("example_id", pa.int64()), ("cluster", pa.int32()), ("distance", pa.float32())])


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
        if any(trace in footer for trace in EXTENSION_TRACES):
            raise UserError(
                f"reading {what}: a column has an Arrow extension type, which may run code while it is read. "
                "Expected plain types only; rewrite the file with the storage type of that column."
            )
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
    return valid_N, present.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)


def vector_column(valid_N: np.ndarray, values_NT: np.ndarray) -> pa.FixedSizeListArray:
    """The inverse of `vectors`, but with a row of values (ignored where not valid) for all N rows."""
    flat = pa.array(np.ascontiguousarray(values_NT, dtype=np.float32).reshape(-1), type=pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, values_NT.shape[1], mask=pa.array(~valid_N))
