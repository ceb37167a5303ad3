"""A JSON array of objects, cut without parsing it."""

from collections.abc import Iterator, Sequence

import numpy as np

from s2l_ray.core.data.formats.json_objects import SPACE, objects
from s2l_ray.core.data.formats.source import Source
from s2l_ray.core.data.formats.spans import BadRow, FileIndex, PieceCounter, Rows, Span
from s2l_ray.errors import UserError

COMMA, QUOTE, BACKSLASH = ord(","), ord('"'), ord("\\")
# What each byte adds to the depth of nesting.
STEP = np.zeros(256, np.int8)
STEP[list(b"[{")], STEP[list(b"]}")] = 1, -1
IS_MARK = STEP != 0
IS_MARK[COMMA] = True


class ItemScanner:
    """Finds where the items of a JSON array end: at commas outside of strings and nested values.

    Args:
        depth: of nesting at the beginning, 0 before the array's bracket and 1 inside it.
    """

    def __init__(self, depth: int) -> None:
        self.depth, self.in_string, self.backslashes = depth, False, 0
        # Where in the last chunk the array ended.
        self.closed: int | None = None

    def ends(self, chunk: bytes) -> np.ndarray:
        """Positions in the chunk just behind the array's commas, int64."""
        data = np.frombuffer(chunk, np.uint8)
        quotes = self._quotes(data)
        marks = np.flatnonzero(IS_MARK[data])
        marks = marks[(np.searchsorted(quotes, marks) + self.in_string) % 2 == 0]
        self.in_string = bool((len(quotes) + self.in_string) % 2)
        depths = self.depth + np.cumsum(STEP[data[marks]], dtype=np.int64)
        self.depth = int(depths[-1]) if len(depths) else self.depth
        closing = marks[depths == 0]
        self.closed = int(closing[0]) if len(closing) else None
        commas = marks[(data[marks] == COMMA) & (depths == 1)]
        return (commas if self.closed is None else commas[commas < self.closed]) + 1

    def _quotes(self, data: np.ndarray) -> np.ndarray:
        """Positions of quotes that begin or end a string: behind an even number of backslashes."""
        quotes, slashes = np.flatnonzero(data == QUOTE), data == BACKSLASH
        if not self.backslashes and not slashes.any():
            return quotes
        place = np.arange(len(data))
        other = np.maximum.accumulate(np.where(slashes, -1, place))
        # Backslashes in a row up to each place, those at the end of the chunk before included.
        run = place - other + np.where(other == -1, self.backslashes, 0)
        before = np.concatenate([[self.backslashes], run])[quotes]
        self.backslashes = int(run[-1]) if len(run) else self.backslashes
        return quotes[before % 2 == 0]


def cut(source: Source, every: int, start: int) -> FileIndex:
    """Count the items of an array and cut it into spans of `every` items.

    Args:
        start: where the array's first item begins, just behind its bracket.

    Raises:
        UserError: the array does not end, or something stands behind it.
    """
    counter, scanner = PieceCounter(every, start), ItemScanner(0)
    position, filled = 0, False
    end: int | None = None
    for chunk in source.chunks():
        rest = chunk
        if end is None:
            counter.add(position + scanner.ends(chunk))
            first = max(0, start - position)
            filled = filled or bool(chunk[first : scanner.closed].strip(SPACE))
            if scanner.closed is not None:
                end, rest = position + scanner.closed, chunk[scanner.closed + 1 :]
        if end is not None and rest.strip(SPACE):
            raise UserError(
                f"reading {source.uri}: expected nothing behind the end of the array at byte "
                f"{end}, got {rest.strip(SPACE)[:40]!r}. Write all rows as one array, or one to a "
                "line."
            )
        position += len(chunk)
        source.check_row(counter.pieces + 1, (position if end is None else end) - counter.begin)
    if end is None:
        raise UserError(
            f"reading {source.uri}: expected an array of objects, but the file ends before the "
            f"array does, in row {counter.pieces + 1}. Replace the file."
        )
    # The last item has no comma.
    counter.pieces += filled
    return FileIndex("array", counter.pieces, position, counter.spans(end))


def read(source: Source, spans: Sequence[Span], head: int, bad: BadRow) -> Iterator[Rows]:
    """The rows of spans, in their order."""
    for span in spans:
        data = source.text_of(span)
        ends = ItemScanner(1).ends(data)
        stops = [*(ends - 1), len(data)][: span.rows]
        pieces = [data[start:stop] for start, stop in zip([0, *ends], stops, strict=False)]
        yield objects(pieces, span.first_row, True, bad)
