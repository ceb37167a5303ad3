"""Arrow tables in and out of bytes: the one place where Arrow and Parquet are read.

Extension types are refused from the file's own metadata, before Arrow builds a schema: some
libraries register types that unpickle while a schema or a value is read.
"""

import base64
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from s2l_ray.errors import UserError

ROWS_PER_GROUP = 65_536
EXTENSION_KEY = b"ARROW:extension:name"
# The key as it stands in the base64 of a stored Arrow schema: the characters that it alone
# decides, for each place in a group of 3.
EXTENSION_TRACES = [
    base64.b64encode(bytes(shift) + EXTENSION_KEY)[first : (shift + len(EXTENSION_KEY)) * 4 // 3]
    for shift, first in ((0, 0), (1, 2), (2, 3))
]
# begins every message of an Arrow stream
CONTINUATION = b"\xff" * 4


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


def read_parquet(data: bytes, what: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole Parquet file as a table; see `open_parquet` for what is refused."""
    try:
        return open_parquet(data, what).read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"reading {what}: the Parquet data are damaged ({error}). Replace the file."
        ) from None


def open_parquet(source: bytes | pa.NativeFile, what: str) -> pq.ParquetFile:
    """Open Parquet after refusing extension types by the bytes of its footer.

    Parsing the footer would already build the schema, and an extension type may run code.

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
    # The last one: names of columns that are not UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"reading {what}: expected a whole Parquet file, but {error}. Replace the file, or "
            "name other files."
        ) from None


def _footer(handle: pa.NativeFile) -> bytes:
    """The serialised metadata at the end of a Parquet file, unparsed.

    Its length in 4 bytes and a magic word close the file.
    """
    end = max(0, handle.size() - 8)
    length = int.from_bytes(handle.read_at(4, end), "little")
    return handle.read_at(min(length, end), max(0, end - length))


def _refuse_extensions(found: bool, what: str) -> None:
    if found:
        raise UserError(
            f"reading {what}: a column has an Arrow extension type, which may run code while it is "
            "read. Expected plain types only; rewrite the file with the storage type of that "
            "column."
        )


def open_arrow_file(handle: pa.NativeFile, what: str) -> pa.RecordBatchFileReader:
    """Open Arrow's file format after refusing extension types by the bytes of its footer.

    Schemas stand there as they are.

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
    """Open Arrow's stream format after refusing extension types by its first message, the schema.

    Raises:
        UserError: not an Arrow stream, truncated, or a column has an extension type.
    """
    try:
        head = handle.read_at(8, 0)
        # Before Arrow 0.15, nothing stood before the length of a message.
        mark = CONTINUATION if head.startswith(CONTINUATION) else b""
        start = len(mark) + 4
        length = int.from_bytes(head[len(mark) : start], "little")
        if not 0 < length < handle.size():
            raise pa.ArrowInvalid("it does not begin as one")
        if handle.read_at(start, max(0, handle.size() - start)) != mark + bytes(4):
            raise pa.ArrowInvalid("its end is missing")
        _refuse_extensions(EXTENSION_KEY in handle.read_at(length, start), what)
        handle.seek(0)
        return pa.ipc.open_stream(handle)
    except (pa.ArrowException, OSError) as error:
        raise _no_arrow(what, error) from None


def _no_arrow(what: str, error: Exception) -> UserError:
    return UserError(
        f"reading {what}: expected a whole Arrow file or stream, but {error}. Replace the file, or "
        "name other files."
    )


def schema_text(schema: pa.Schema) -> str:
    """A schema as text, for manifests."""
    return base64.b64encode(schema.remove_metadata().serialize()).decode()


def schema_from_text(text: str, what: str) -> pa.Schema:
    """The inverse of `schema_text`; extension types are refused before Arrow sees them."""
    data = base64.b64decode(text)
    if EXTENSION_KEY in data:
        raise UserError(
            f"reading the schema of {what}: it has an extension type. Remove the artifact's folder "
            "and run again."
        )
    return pa.ipc.read_schema(pa.BufferReader(data))
