"""JSON lines: one object a line."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from s2l_ray.core.data.formats.json_objects import objects
from s2l_ray.core.data.formats.source import Source
from s2l_ray.core.data.formats.spans import BadRow, FileIndex, PieceCounter, Rows, Span
from s2l_ray.errors import UserError

NEWLINE = 10


def cut(source: Source, every: int) -> FileIndex:
    """Count the lines of a file and cut it into spans of `every` lines."""
    counter, position, last = PieceCounter(every, 0), 0, b"\n"
    for chunk in source.chunks():
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == NEWLINE) + 1
        counter.add(position + ends)
        position, last = position + len(chunk), chunk[-1:]
        source.check_row(counter.pieces + 1, position - counter.begin)
    # The last line may lack its end.
    counter.pieces += last != b"\n"
    return FileIndex("lines", counter.pieces, position, counter.spans(position))


def read(source: Source, spans: Sequence[Span], head: int, bad: BadRow) -> Iterator[Rows]:
    """The rows of spans, in their order; blank lines are passed over."""
    for span in spans:
        lines = source.text_of(span).split(b"\n")[: span.rows]
        yield objects(lines, span.first_row, False, bad)


def check_first_line(source: Source, begin: bytes) -> None:
    """Refuse at once a .json file that holds one object spread over many lines.

    Args:
        begin: the first bytes of the file.
    """
    line, end, _ = begin.partition(b"\n")
    try:
        if end:
            json.loads(line)
    except ValueError:
        raise UserError(
            f"reading {source.uri}: expected an array of objects, or an object a line; the first "
            f"line is {line[:80]!r}. Write the rows as one array, or one to a line."
        ) from None
