"""What a reader of a format takes and gives: spans of rows, the index of a file, and rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

# Values of a column: Python objects where the file is JSON or CSV, else Arrow.
Column: TypeAlias = "list[Any] | pa.ChunkedArray"
# Reports a bad row of the file: its number, the reason, its text, and a detail for people.
BadRow = Callable[[int, str, str, str], None]


class Span(NamedTuple):
    """Rows that are read together: the first one's number, how many, and where they lie.

    In text, `start` and `end` are bytes (uncompressed). In Parquet and Arrow files, `start` is the
    number of the row group or batch in which the span begins, and `end` is that one's first row.
    """

    first_row: int
    rows: int
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class FileIndex:
    """What one reading of a file found.

    Args:
        kind: a key of `formats.READERS`.
        text_bytes: uncompressed.
        head: bytes before the first row.
        schema: of the rows, as text, where the file itself has one.
        media: column -> its kind, of columns of pictures and the like.
        sha256: of the file as it lies there.
        first: JSON text of a list of its first rows; None where an earlier version made the index.
    """

    kind: str
    rows: int
    text_bytes: int
    spans: list[Span]
    head: int = 0
    schema: str | None = None
    media: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    first: str | None = None


@dataclass(frozen=True)
class Rows:
    """Rows as a format gives them: numbers in the file, int64 [N], and each column's values.

    Args:
        texts: of rows of JSON: the object as it was read.
    """

    numbers: np.ndarray
    columns: dict[str, Column]
    texts: list[str] | None = None


def even_spans(rows: int, every: int) -> list[Span]:
    """Spans of `every` rows, the last one shorter, without their places."""
    return [Span(first, min(every, rows - first)) for first in range(0, rows, every)]


class PieceCounter:
    """Counts pieces of a stream of bytes (lines, items) and remembers where every n-th one begins.

    Args:
        start: where the first piece begins.
    """

    def __init__(self, every: int, start: int) -> None:
        self.every, self.pieces, self.starts = every, 0, [start]
        # Where the piece that is not counted yet begins.
        self.begin = start

    def add(self, ends: np.ndarray) -> None:
        """Count pieces by the positions just behind them, int64, ascending."""
        first = -self.pieces % self.every or self.every
        self.starts += ends[first - 1 :: self.every].tolist()
        self.pieces += len(ends)
        self.begin = int(ends[-1]) if len(ends) else self.begin

    def add_one(self, end: int) -> None:
        """Count a piece that ends just before `end`."""
        self.pieces += 1
        if self.pieces % self.every == 0:
            self.starts.append(end)

    def spans(self, end: int) -> list[Span]:
        """The spans of a stream whose pieces end at `end`."""
        bounds = [*self.starts[: -(-self.pieces // self.every)], end]
        return [
            span._replace(start=start, end=stop)
            for span, (start, stop) in zip(
                even_spans(self.pieces, self.every), pairwise(bounds), strict=True
            )
        ]
