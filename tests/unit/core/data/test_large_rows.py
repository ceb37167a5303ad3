"""Rows that would take all memory are refused before they are read."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2l_ray.core.data.formats import delimited, source
from s2l_ray.errors import UserError
from tests.unit.core.data.raw import GOOD, parts_of

LIMIT = 1 << 21


def lines(row: bytes) -> bytes:
    return json.dumps(GOOD).encode() + b"\n" + row


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("x.jsonl.gz", gzip.compress(lines(b" " * 3 * LIMIT)), 2),
        ("x.jsonl", lines(b'"' + b"a" * 2 * LIMIT + b'"\n'), 2),
        ("x.json.gz", gzip.compress(b"[{}, {}, " + b" " * 3 * LIMIT), 3),
        ("x.csv.gz", gzip.compress(b"instruction,output\nq,a\nq," + b"a" * 3 * LIMIT), 2),
    ],
)
def test_a_row_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, row: int
) -> None:
    monkeypatch.setattr(source, "LARGEST_ROW", LIMIT)
    monkeypatch.setattr(delimited, "LARGEST_FIELD", LIMIT)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}, row {row}: expected at most 2 MiB in a row"):
        parts_of(tmp_path / name)


def test_rows_of_parquet_that_unpack_to_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "LARGEST_ROW", LIMIT)
    table = pa.table({"instruction": ["q", "a" * 3 * LIMIT], "output": ["a", "b"]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1, use_dictionary=False)
    assert (tmp_path / "x.parquet").stat().st_size < LIMIT
    with pytest.raises(UserError, match=r"x.parquet, row 2: expected at most 2 MiB"):
        parts_of(tmp_path / "x.parquet")


def test_many_rows_may_be_more_than_one_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "LARGEST_ROW", LIMIT)
    row = json.dumps({**GOOD, "more": "x" * (LIMIT // 2)}).encode()
    (tmp_path / "x.jsonl").write_bytes((row + b"\n") * 5)
    (tmp_path / "y.json").write_bytes(b"[" + b",".join([row] * 5) + b"]" + b" " * 2 * LIMIT)
    assert [part.rows for part in parts_of(tmp_path)] == [5, 5]
