"""Formats of raw files, one module each, behind two functions: `cut` divides a file into spans of
rows, and `read` gives the rows of spans.

A span is read by itself wherever the format allows it. Compressed text, Arrow streams and row
groups of Parquet can only be read from their front: several of their spans are best read by one
task, in order (`task_of`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence

from s2l_ray.core.data.formats import columnar, delimited, json_array, json_lines
from s2l_ray.core.data.formats.json_objects import SPACE
from s2l_ray.core.data.formats.names import (
    ARROW_SUFFIXES,
    PARQUET_SUFFIXES,
    bare_name,
    codec_of,
    has_suffix,
)
from s2l_ray.core.data.formats.signatures import check_signature
from s2l_ray.core.data.formats.source import Source
from s2l_ray.core.data.formats.spans import BadRow, FileIndex, Rows, Span

UTF8_MARK = b"\xef\xbb\xbf"
# Rows of a row group that one task reads; it also decodes the rows before them.
ROWS_PER_READ = 131_072
READERS: dict[str, Callable[[Source, Sequence[Span], int, BadRow], Iterator[Rows]]] = {
    "lines": json_lines.read,
    "array": json_array.read,
    "csv": delimited.read,
    **{
        kind: functools.partial(columnar.read, kind=kind)
        for kind in ("parquet", "arrow file", "arrow stream")
    },
}


def cut(source: Source, every: int) -> FileIndex:
    """Count a file's rows and cut it into spans of `every` rows.

    Raises:
        UserError: the file is not of the format that its name says.
    """
    check_signature(source)
    name = bare_name(source.name)
    if has_suffix(name, PARQUET_SUFFIXES):
        return columnar.cut_parquet(source, every)
    if has_suffix(name, ARROW_SUFFIXES):
        return columnar.cut_arrow(source, every)
    if has_suffix(name, (".csv", ".tsv")):
        return delimited.cut(source, every)
    return _cut_json(source, every, is_lines=not has_suffix(name, (".json",)))


def _cut_json(source: Source, every: int, is_lines: bool) -> FileIndex:
    """A file of JSON: an array or an object a line, whatever its name says.

    Args:
        is_lines: its name says that each line holds an object.
    """
    begin = source.forward.peek()
    text = begin.removeprefix(UTF8_MARK).lstrip(SPACE)
    if text.startswith(b"["):
        return json_array.cut(source, every, begin.index(b"[") + 1)
    if not is_lines:
        json_lines.check_first_line(source, text)
    return json_lines.cut(source, every)


def read(
    source: Source, kind: str, spans: Sequence[Span], head: int, bad: BadRow
) -> Iterator[Rows]:
    """The rows of spans, in their order.

    Args:
        kind, head: of the file's index.
        bad: called for every row that cannot be read; such rows are left out.
    """
    return READERS[kind](source, spans, head, bad)


def task_of(kind: str, name: str, span: Span) -> str:
    """Name of the task that best reads a span; spans of one file with equal names share it.

    A file that can only be read from its front is one task. A row group of Parquet is decoded from
    its front, so that ROWS_PER_READ of its rows are one task. Any other span is its own.
    """
    if kind == "arrow stream" or codec_of(name) is not None:
        return "all"
    return (
        f"{span.start}/{span.first_row // ROWS_PER_READ}"
        if kind == "parquet"
        else f"{span.first_row}"
    )
