"""Parquet, and Arrow's file and stream formats: batches of columns."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from s2l_ray.core.data.formats.schemas import media_of, stored_schema
from s2l_ray.core.data.formats.source import Source
from s2l_ray.core.data.formats.spans import BadRow, FileIndex, Rows, Span, even_spans
from s2l_ray.core.storage.parquet import open_arrow_file, open_arrow_stream, open_parquet
from s2l_ray.errors import UserError


def cut_parquet(source: Source, every: int) -> FileIndex:
    """Cut a Parquet file into spans of `every` rows by its footer, without reading rows."""
    file = open_parquet(source.file, source.uri)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    if any(group.num_rows < 0 for group in groups):
        raise pa.ArrowInvalid("a row group has fewer than no rows")
    # The number of all rows, which stands there too, is wrong in files of some writers.
    *begins, rows = np.cumsum([0, *(group.num_rows for group in groups)]).tolist()
    size = sum(group.total_byte_size for group in groups)
    spans = _placed(even_spans(rows, every), begins)
    for begin, group in zip(begins, groups, strict=True):
        source.check_row(begin + 1, group.total_byte_size // max(1, group.num_rows))
    schema = stored_schema(source.uri, file.schema_arrow)
    media = media_of(file.schema_arrow.metadata)
    return FileIndex("parquet", rows, size, spans, schema=schema, media=media)


def cut_arrow(source: Source, every: int) -> FileIndex:
    """Cut a file of Arrow's file format, which knows where its batches lie, or of its stream
    format, which must be read from its front, into spans of `every` rows."""
    begin = source.file.read_at(6, 0)
    if begin.startswith(b"FEA1"):
        raise UserError(
            f"reading {source.uri}: this is Feather version 1, which nothing writes any more. "
            "Write it again as version 2."
        )
    kind = "arrow file" if begin == b"ARROW1" else "arrow stream"
    schema, batches = _batches(source, kind, Span(0, 0))
    begins, size, rows = [], 0, 0
    for first, batch in batches:
        begins.append(first)
        rows, size = first + batch.num_rows, size + batch.get_total_buffer_size()
    spans = even_spans(rows, every)
    if kind == "arrow file":
        spans = _placed(spans, begins)
    text, media = stored_schema(source.uri, schema), media_of(schema.metadata)
    return FileIndex(kind, rows, size, spans, schema=text, media=media)


def read(
    source: Source, spans: Sequence[Span], head: int, bad: BadRow, kind: str
) -> Iterator[Rows]:
    """The rows of spans, in their order, each batch decoded once."""
    schema, batches = _batches(source, kind, spans[0])
    held: list[tuple[int, pa.RecordBatch]] = []
    for span in spans:
        yield _rows_of(gather(span, held, batches, schema), span)


def gather(
    span: Span,
    held: list[tuple[int, pa.RecordBatch]],
    batches: Iterator[tuple[int, pa.RecordBatch]],
    schema: pa.Schema,
) -> pa.Table:
    """The rows of a span, from batches in order; `held` has those that a later span may need."""
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


def _rows_of(table: pa.Table, span: Span) -> Rows:
    if table.num_rows != span.rows:
        raise OSError(
            f"expected {span.rows} rows from row {span.first_row + 1}, got {table.num_rows}"
        )
    numbers = np.arange(span.first_row, span.first_row + span.rows, dtype=np.int64)
    return Rows(numbers, {name: table[name] for name in table.column_names})


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
    """The schema, and batches with the first row of each, from the one where `span` begins; those
    of a stream from its front."""
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
