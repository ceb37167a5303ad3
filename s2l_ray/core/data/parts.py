"""What raw files and parts are.

A part is a fixed range of rows of one raw file. It is the unit of work, of storage and of resuming:
every artifact that has rows has these parts, with the rows in the same order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from s2l_ray.core.data import formats
from s2l_ray.core.data.formats.spans import FileIndex, Span

# An example's id is file_number << ID_BITS | row: at most 2^40 rows a file.
ID_BITS = 40


@dataclass(frozen=True)
class RawFile:
    """A file as found.

    Args:
        uri: where it is.
        name: relative to the root; identifies the file.
        source: of its rows, where no column says it.
        sha256: of its content, once it was read.
        of_subset: whether it is one of a subset, whose rows keep their first ids.
    """

    uri: str
    name: str
    source: str
    bytes: int
    mtime_ns: int
    sha256: str = ""
    of_subset: bool = False


@dataclass(frozen=True)
class PartRange:
    """One part: a span of rows of one raw file, where they lie in it, and what the file is.

    Args:
        index: number of the part in the data set.
        kind, head: see `formats.spans.FileIndex`.
        first_row, rows, start, end: see `formats.spans.Span`.
    """

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
        """Where the rows lie in the file."""
        return Span(self.first_row, self.rows, self.start, self.end)

    @property
    def task(self) -> str:
        """Name of the task that best reads the part; it reads its parts in their order."""
        return f"{self.file_number}/{formats.task_of(self.kind, self.file.name, self.span)}"

    def place_of(self, row: int) -> str:
        """How messages name a row of the file (0 is the first)."""
        return f"{'line' if self.kind == 'lines' else 'row'} {row + 1}"


def part_ranges(files: Iterable[RawFile], indexes: Iterable[FileIndex]) -> list[PartRange]:
    """The parts of a data set, in file order."""
    parts: list[PartRange] = []
    for number, (file, index) in enumerate(zip(files, indexes, strict=True)):
        read = replace(file, sha256=index.sha256)
        for span in index.spans:
            parts.append(PartRange(len(parts), number, read, index.kind, index.head, *span))
    return parts
