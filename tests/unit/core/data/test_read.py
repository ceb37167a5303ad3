"""Parts of raw files: the rows that come out, and how bad ones are named."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.config import Columns
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.formats import source
from s2l_ray.core.data.original import original_rows
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file, read_part
from s2l_ray.core.storage.parquet import parquet_bytes, read_parquet
from s2l_ray.errors import UserError
from tests.unit.core.data.raw import GOOD, lines, parquet, parts_of, read, refusal

texts = st.text(st.characters(codec="utf-8"), max_size=12)
rows_ = st.fixed_dictionaries(
    {"instruction": texts.map("i".__add__), "output": texts.map("o".__add__)},
    optional={"input": texts, "n": st.integers(-9, 9), "tags": st.lists(texts, max_size=2)},
)
blank = st.sampled_from([b"", b"  ", b"\t"])


@settings(max_examples=150, deadline=None)
@given(
    content=st.lists(st.one_of(rows_, blank), min_size=1, max_size=30).filter(
        lambda c: any(isinstance(r, dict) for r in c)
    ),
    rows_per_part=st.integers(1, 9),
    chunk=st.integers(1, 40),
    end=st.sampled_from([b"\n", b"\r\n"]),
    bom=st.booleans(),
    closed=st.booleans(),
    escaped=st.booleans(),
)
def test_every_line_comes_out_once_with_its_number(
    content: list[Any],
    rows_per_part: int,
    chunk: int,
    end: bytes,
    bom: bool,
    closed: bool,
    escaped: bool,
) -> None:
    raw = [
        json.dumps(r, ensure_ascii=escaped).encode() if isinstance(r, dict) else r for r in content
    ]
    data = (
        (b"\xef\xbb\xbf" if bom and raw[0].strip() else b"")
        + end.join(raw)
        + (end if closed else b"")
    )
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "CHUNK", chunk)
        path = Path(folder) / "x.jsonl"
        path.write_bytes(data)
        (file,) = find_files([str(path)], None)
        index = index_file(file, rows_per_part)
        parts = [read_part(part, Columns()) for part in part_ranges([file], [index])]
    assert index.sha256 == hashlib.sha256(data).hexdigest()
    assert index.rows == len(content) - (not closed and raw[-1] == b"")
    assert [span.first_row for span in index.spans] == list(range(0, index.rows, rows_per_part))
    assert sum(span.rows for span in index.spans) == index.rows
    found = []
    for part in parts:
        original = original_rows(part.table).to_pylist()
        found += list(zip(part.table["example_id"].to_pylist(), original, strict=True))
    expected = [(number, row) for number, row in enumerate(content) if isinstance(row, dict)]
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, got), (_, want) in zip(found, expected, strict=True):
        assert {name: value for name, value in got.items() if value is not None} == want


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    group=st.integers(1, 12),
    rows_per_part=st.integers(1, 15),
    empty_group=st.booleans(),
)
def test_parquet_is_cut_by_rows_whatever_its_row_groups(
    count: int, group: int, rows_per_part: int, empty_group: bool
) -> None:
    table = pa.table(
        {
            "z": pa.array(range(count), pa.int16()),
            "completion": [f"o{n}" for n in range(count)],
            "prompt": pa.array([f"i{n}" for n in range(count)], pa.large_string()),
            "when": pa.array([{"a": n, "b": [n] * (n % 3)} for n in range(count)]),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.parquet"
        with pq.ParquetWriter(path, table.schema) as writer:
            for first in range(0, count, group):
                writer.write_table(table.slice(first, group))
                if empty_group:
                    writer.write_table(table.slice(0, 0))
        parts = parts_of(path, rows_per_part=rows_per_part)
        made = [read_part(part, Columns()) for part in parts]
    assert [part.table.num_rows for part in made] == [part.rows for part in parts]
    whole = pa.concat_tables([original_rows(part.table) for part in made])
    assert whole.column_names == table.column_names
    assert whole.to_pylist() == table.to_pylist()
    assert whole.schema.field("z").type == pa.int16()
    assert np.concatenate([part.table["example_id"] for part in made]).tolist() == list(
        range(count)
    )


def test_ids_hold_the_files_number_and_the_row(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        lines(tmp_path / f"{name}.jsonl", b"", GOOD, GOOD, GOOD)
    parts = parts_of(tmp_path, rows_per_part=3)
    assert [(part.index, part.file.name, part.file_number) for part in parts] == [
        (0, "a.jsonl", 0),
        (1, "a.jsonl", 0),
        (2, "b.jsonl", 1),
        (3, "b.jsonl", 1),
        (4, "c.jsonl", 2),
        (5, "c.jsonl", 2),
    ]
    ids = [
        row for part in parts for row in read_part(part, Columns()).table["example_id"].to_pylist()
    ]
    assert ids == [number << 40 | row for number in range(3) for row in (1, 2, 3)]


def test_rows_of_five_megabytes_keep_their_places(tmp_path: Path) -> None:
    big = [
        {"instruction": f"{n}" * 5_000_000, "output": "ä" * 2_500_000 + str(n)} for n in range(3)
    ]
    path = lines(tmp_path / "x.jsonl", GOOD, *big, GOOD)
    found = [
        original_rows(p.table).to_pylist()
        for p in (read_part(q, Columns()) for q in parts_of(path, rows_per_part=2))
    ]
    assert found == [[GOOD, big[0]], [big[1], big[2]], [GOOD]]


# ---- bad rows


BAD_LINES = [
    (
        b'{"instruction": "q", "output": "a"',
        "expected a JSON object, but Expecting",
        "in column 35",
    ),
    (b'{"instruction": "q", "output": "a", "x": NaN}', "NaN is not JSON", ""),
    (b'{"instruction": "q", "output": "a", "x": -Infinity}', "-Infinity is not JSON", ""),
    (b'[{"instruction": "q"}]', "expected a JSON object, got list", ""),
    (b"3", "expected a JSON object, got int", ""),
    (b"null", "expected a JSON object, got NoneType", ""),
    (b"{} {}", "expected a JSON object, but Extra data", ""),
    (b"[" * 100_000, "expected at most 500 lists and objects inside each other", ""),
    (b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}", "expected at most 500 lists", "got more"),
    (b'{"x": [{"a": 1, "b": 2, "a": 1}]}', "each key once in an object", "got 'a' twice"),
    (
        b'{"instruction": "caf\xe9", "output": "a"}',
        "expected UTF-8",
        "got byte 0xe9 at position 20",
    ),
    (b'{"instruction": "\\ud83d", "output": "a"}', "half a surrogate pair", "'\\ud83d'"),
    (b'{"instruction": "q", "output": "a", "x": ["\\udc00"]}', "half a surrogate pair", ""),
    (b'{"instruction": "q", "output": 5}', "field 'output': expected text, got int", ""),
    (b'{"instruction": ["q"], "output": "a"}', "field 'instruction': expected text, got list", ""),
    (
        b'{"instruction": "q", "output": "a", "input": {}}',
        "field 'input': expected text, got dict",
        "",
    ),
    (
        b'{"instruction": "q", "output": "a", "source": false}',
        "field 'source': expected text, got bool",
        "",
    ),
    (
        b'{"instruction": "q", "output": null}',
        "field 'output': expected text, got a value that is null or missing",
        "",
    ),
    (
        b'{"instruction": "q"}',
        "field 'output': expected text, got a value that is null or missing",
        "",
    ),
    (
        b'{"instruction": "q", "output": ""}',
        "field 'output': expected text, got a value that is empty",
        "",
    ),
    (
        b'{"instruction": " \\n\\t", "output": "a"}',
        "field 'instruction': expected text, got a value that is empty",
        "",
    ),
    (
        b'{"instruction": "q", "output": "a", "source": ""}',
        "field 'source': expected text, got a value that is empty",
        "",
    ),
]


@pytest.mark.parametrize(("bad", "reason", "detail"), BAD_LINES)
def test_a_bad_line_stops_the_run_or_is_listed(
    tmp_path: Path, bad: bytes, reason: str, detail: str
) -> None:
    good = {**GOOD, "input": "i", "source": "s"}
    path = lines(tmp_path / "x.jsonl", good, b"", bad, good)
    message = refusal(path)
    assert f"{path}, line 3: " in message
    assert reason in message
    assert detail in message
    assert "with examples.on_bad_row: reject" in message

    made = read(path, "reject")
    assert made.table["example_id"].to_pylist() == [0, 3]
    (reject,) = made.rejects
    assert (reject["file"], reject["row"]) == ("x.jsonl", 3)
    assert reason in reject["reason"]
    assert reject["text"]
    assert len(reject["text"]) <= 500


def test_reasons_do_not_grow_with_the_rows(tmp_path: Path) -> None:
    broken = [b'{"instruction": "' + b"q" * n + b'", "output": "a"' for n in range(50)]
    broken += [b'{"instruction": "' + b"q" * n + b'\xff", "output": "a"}' for n in range(50)]
    made = read(lines(tmp_path / "x.jsonl", GOOD, *broken), "reject", rows_per_part=200)
    assert len(made.rejects) == 100
    assert len({reject["reason"] for reject in made.rejects}) == 2


def test_a_part_of_rejected_or_blank_lines_only_is_an_empty_part(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {**GOOD, "n": 1}, GOOD, b"{broken", b"3", b"", b"")
    first, broken, empty = (
        read_part(p, Columns(), "reject") for p in parts_of(path, rows_per_part=2)
    )
    assert (first.table.num_rows, len(first.rejects)) == (2, 0)
    assert (broken.table.num_rows, len(broken.rejects)) == (0, 2)
    assert (empty.table.num_rows, len(empty.rejects)) == (0, 0)
    assert empty.table.schema == first.table.drop_columns(["original"]).schema
    assert original_rows(broken.table).num_columns == 0
    assert read_parquet(parquet_bytes(empty.table), "x").num_rows == 0


def test_bad_rows_of_parquet_are_named_or_listed(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "x.parquet",
        {"instruction": ["q", None, " ", "r"], "output": ["a", "b", "c", ""], "n": [1, 2, 3, 4]},
    )
    assert (
        "row 2: field 'instruction': expected text, got a value that is null or missing"
        in refusal(path)
    )
    made = read(path, "reject")
    assert made.table["example_id"].to_pylist() == [0]
    assert sorted(reject["row"] for reject in made.rejects) == [2, 3, 4]
    assert original_rows(made.table).to_pylist() == [{"instruction": "q", "output": "a", "n": 1}]


@pytest.mark.parametrize("column", ["output", "note"])
def test_text_of_parquet_that_is_not_utf8_is_named_or_listed(tmp_path: Path, column: str) -> None:
    broken = pa.array([b"fine", b"\xff\xfe", None]).view(pa.string())
    columns = {"instruction": ["q"] * 3, "output": ["a"] * 3, "note": ["n"] * 3, column: broken}
    path = parquet(tmp_path / "x.parquet", columns)
    assert f"row 2: field '{column}': expected UTF-8" in refusal(path)
    made = read(path, "reject")
    assert 0 in made.table["example_id"].to_pylist()
    assert {reject["row"] for reject in made.rejects} == ({2, 3} if column == "output" else {2})


@pytest.mark.parametrize("values", [[1, 2], [b"a", b"b"], [["a"], ["b"]], [{"a": 1}, {"a": 2}]])
def test_a_parquet_column_that_is_no_text_is_refused(tmp_path: Path, values: list[Any]) -> None:
    message = refusal(
        parquet(tmp_path / "x.parquet", {"instruction": ["q", "r"], "output": values}), "reject"
    )
    assert "field 'output': expected text, got" in message
    assert "examples.columns.output" in message


def test_text_of_parquet_may_be_of_any_string_type(tmp_path: Path) -> None:
    columns = {
        "instruction": pa.array(["q", "r"]).dictionary_encode(),
        "input": pa.array(["i", None], pa.string_view()),
        "output": pa.array(["a", "b"], pa.large_string()),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
        "none": pa.nulls(2),
    }
    made = read(parquet(tmp_path / "x.parquet", columns))
    assert original_rows(made.table).to_pylist() == [
        {"instruction": "q", "input": "i", "output": "a", "kind": "x", "none": None},
        {"instruction": "r", "input": None, "output": "b", "kind": "y", "none": None},
    ]


# ---- files that are not what they seem


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_parquet_that_is_cut_off_is_refused(tmp_path: Path, keep: float) -> None:
    path = parquet(tmp_path / "x.parquet", {"instruction": ["q"] * 100, "output": ["a"] * 100})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=r"x.parquet: expected a whole Parquet file, but"):
        parts_of(path)


def test_parquet_with_damaged_pages_is_refused(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "x.parquet", {"instruction": ["q"] * 100, "output": [str(n) for n in range(100)]}
    )
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.parquet: the data are damaged"):
        read(path)


def test_a_file_that_changed_or_went_after_it_was_cut_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", GOOD, GOOD)
    (part,) = parts_of(path)
    lines(path, GOOD)
    with pytest.raises(
        UserError,
        match=r"x.jsonl: expected \d+ bytes with SHA-256 \w{16}, got \d+: the file changed",
    ):
        read_part(part, Columns())
    path.unlink()
    with pytest.raises(UserError, match=r"must be readable under the same name on every node"):
        read_part(part, Columns())


def test_ordinary_parquet_from_pandas_is_read(tmp_path: Path) -> None:
    import pandas

    frame = pandas.DataFrame(
        {"instruction": ["q"], "output": ["a"], "kind": pandas.Categorical(["x"])}, index=[7]
    )
    frame.to_parquet(tmp_path / "x.parquet")
    made = read(tmp_path / "x.parquet")
    assert original_rows(made.table).to_pylist() == [
        {"instruction": "q", "output": "a", "kind": "x", "__index_level_0__": 7}
    ]
