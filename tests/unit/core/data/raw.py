"""Raw files that tests write, and how they read them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2l_ray.config import Columns
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.formats.spans import FileIndex
from s2l_ray.core.data.parts import PartRange, part_ranges
from s2l_ray.core.data.read import PartRows, index_file, read_part
from s2l_ray.errors import UserError

GOOD = {"instruction": "say a", "output": "a"}


def parts_of(*paths: Path, rows_per_part: int = 100, root: str | None = None) -> list[PartRange]:
    files = find_files([str(path) for path in paths], root)
    return part_ranges(files, [index_file(file, rows_per_part) for file in files])


def read(
    path: Path, on_bad_row: str = "stop", rows_per_part: int = 100, **columns: Any
) -> PartRows:
    """The only part of a file."""
    (part,) = parts_of(path, rows_per_part=rows_per_part)
    return read_part(part, Columns(**columns), on_bad_row)


def lines(path: Path, *rows: Any, end: bytes = b"\n") -> Path:
    """A JSONL file; bytes are written as they are."""
    path.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + end for r in rows)
    )
    return path


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def refusal(path: Path, on_bad_row: str = "stop", **columns: str) -> str:
    with pytest.raises(UserError) as error:
        read(path, on_bad_row, **columns)
    assert str(path) in str(error.value)
    return str(error.value)


def index(path: Path) -> FileIndex:
    """The index of a file."""
    (file,) = find_files([str(path)], None)
    return index_file(file, 100)
