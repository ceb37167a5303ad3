"""The same rows in every format: identical conversations and original values, however the file is
cut, compressed or chunked."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2l_ray.config import Columns
from s2l_ray.core.data import formats
from s2l_ray.core.data.find import find_files, source_of
from s2l_ray.core.data.formats import columnar, json_array, source
from s2l_ray.core.data.formats.spans import FileIndex, Span
from s2l_ray.core.data.original import original_rows, schema_of
from s2l_ray.core.data.parts import PartRange, part_ranges
from s2l_ray.core.data.read import index_file, read_part, read_parts
from s2l_ray.core.storage.columns import unify
from s2l_ray.core.storage.records import from_bytes, to_bytes
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED

Row = dict[str, Any]


# ---- writers, one a format; none of them is ours


def as_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_array(rows: list[Row], indent: int | None = None) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=indent).encode()


def as_csv(rows: list[Row], delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting)
    writer.writerows([list(rows[0]), *([row[name] for name in rows[0]] for row in rows)])
    return text.getvalue().encode()


def as_parquet(rows: list[Row], group: int = 3) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=group)
    return sink.getvalue()


def as_arrow(rows: list[Row], stream: bool, batch: int = 3, **options: Any) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=batch)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "a.json": as_array,
    "pretty.json": lambda rows: b"\xef\xbb\xbf \n" + as_array(rows, 2) + b"\n ",
    "lines.json": as_lines,
    "a.csv": as_csv,
    "marked.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "a.parquet": as_parquet,
    "file.arrow": lambda rows: as_arrow(rows, False),
    "stream.arrow": lambda rows: as_arrow(rows, True),
    "old.arrow": lambda rows: as_arrow(rows, True, use_legacy_format=True),
    "a.feather": lambda rows: as_arrow(rows, False),
    "a.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "two.jsonl.gz": lambda rows: (
        gzip.compress(as_lines(rows[:1])) + gzip.compress(as_lines(rows[1:]))
    ),
    "a.jsonl.zst": lambda rows: pa.compress(as_lines(rows), "zstd", asbytes=True),
    "A.JSONL.XZ": lambda rows: lzma.compress(as_lines(rows)),
    "a.jsonlines": as_lines,
    "array.jsonl": as_array,
    "a.PQ": as_parquet,
    "B.CSV": as_csv,
    "quoted.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows, quoting=csv.QUOTE_ALL),
    "a.jsonl.bz2": lambda rows: bz2.compress(as_lines(rows)),
    "a.json.gz": lambda rows: gzip.compress(as_array(rows)),
    "a.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "a.tsv.zst": lambda rows: pa.compress(as_csv(rows, "\t"), "zstd", asbytes=True),
}
ONLY_TEXT = [name for name in WRITERS if ".csv" in name.lower() or ".tsv" in name]


def parts_of(folder: Path, name: str, data: bytes, every: int) -> list[PartRange]:
    path = folder / name
    path.write_bytes(data)
    files = find_files([str(path)], None)
    return part_ranges(files, [index_file(file, every) for file in files])


def read_all(parts: list[PartRange], columns: Columns, together: bool) -> pa.Table:
    """All rows of a file, its parts read one by one or one after the other."""
    if together:
        tables = [read.table for read in read_parts(parts, columns)]
    else:
        tables = [read_part(part, columns).table for part in reversed(parts)][::-1]
    schema = unify(map(schema_of, tables))
    return pa.concat_tables([under_one_schema(table, schema) for table in tables])


def under_one_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    original = original_rows(table, schema).combine_chunks().to_struct_array()
    fixed = table.select(EXAMPLES_FIXED.names)
    return fixed.append_column("original", original).replace_schema_metadata(None)


def facts(table: pa.Table) -> tuple[list[Any], ...]:
    """What must not depend on the format: numbers, conversations, tools and original values."""
    columns = (table[name].to_pylist() for name in ("example_id", "messages", "tools"))
    return (*columns, original_rows(table).to_pylist())


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=9).map(
    "x".__add__
)
odd = st.sampled_from(
    ['say "a", b', "two\nlines", "back\\slash\\", '\\"', "[{,]}", "tab\there", "ü\u2028é", "'"]
)
text = st.one_of(words, odd)
plain_rows = st.lists(
    st.fixed_dictionaries(
        {"instruction": text, "input": st.one_of(st.just(""), text), "output": text}
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("name", list(WRITERS))
@settings(max_examples=25, deadline=None)
@given(rows=plain_rows, every=st.integers(1, 5), chunk=st.integers(1, 60), together=st.booleans())
@example(
    rows=[{"instruction": '\\"', "input": "", "output": "\\"}] * 5, every=2, chunk=7, together=True
)
def test_rows_of_text_are_the_same_in_every_format(
    name: str, rows: list[Row], every: int, chunk: int, together: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "CHUNK", chunk)
        parts = parts_of(Path(folder), name, WRITERS[name](rows), every)
        made = read_all(parts, Columns(), together)
    assert [part.rows for part in parts] == [
        len(rows[n : n + every]) for n in range(0, len(rows), every)
    ]
    ids, messages, tools, original = facts(made)
    assert ids == list(range(len(rows)))
    assert original == rows
    assert tools == [None] * len(rows)
    for row, (user, assistant) in zip(rows, messages, strict=True):
        assert user == {
            "role": "user",
            "content": row["instruction"],
            "input": row["input"] or None,
            "extra": None,
            "masked": False,
        }
        assert assistant == {
            "role": "assistant",
            "content": row["output"],
            "input": None,
            "extra": None,
            "masked": False,
        }


calls = st.lists(
    st.fixed_dictionaries(
        {"name": words, "arguments": st.fixed_dictionaries({"n": st.integers(-9, 9)})}
    ),
    min_size=1,
    max_size=2,
)


@st.composite
def dialogues(draw: st.DrawFn) -> list[Row]:
    """A conversation of one to three exchanges; a tool may be called and answer in each."""
    turns: list[Row] = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(text)})
        if draw(st.booleans()):
            turns.append({"role": "assistant", "content": None, "tool_calls": draw(calls)})
            turns += [{"role": "tool", "content": draw(text), "name": "t"}] * draw(
                st.integers(1, 2)
            )
        turns.append({"role": "assistant", "content": draw(text)})
    return turns


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ONLY_TEXT])
@settings(max_examples=20, deadline=None)
@given(
    conversations=st.lists(dialogues(), min_size=1, max_size=6),
    every=st.integers(1, 4),
    tools=st.booleans(),
    together=st.booleans(),
)
def test_conversations_are_the_same_in_every_format(
    name: str, conversations: list[list[Row]], every: int, tools: bool, together: bool
) -> None:
    tool = {"type": "function", "function": {"name": "t", "parameters": {"n": "int"}}}
    rows = [
        {"id": n, "messages": turns, **({"tools": [tool] if n % 2 else None} if tools else {})}
        for n, turns in enumerate(conversations)
    ]
    with tempfile.TemporaryDirectory() as folder:
        made = read_all(
            parts_of(Path(folder), name, WRITERS[name](rows), every), Columns(), together
        )
    for row, messages, text_of_tools in zip(
        rows, made["messages"].to_pylist(), made["tools"].to_pylist(), strict=True
    ):
        assert [(turn["role"], turn["content"]) for turn in messages] == [
            (turn["role"], turn["content"] or "") for turn in row["messages"]
        ]
        extra = [json.loads(turn["extra"]) if turn["extra"] else {} for turn in messages]
        assert extra == [
            {k: v for k, v in turn.items() if k not in ("role", "content")}
            for turn in row["messages"]
        ]
        assert text_of_tools == (
            json.dumps([tool], separators=(",", ":")) if row.get("tools") else None
        )
    assert [row["id"] for row in original_rows(made).to_pylist()] == list(range(len(rows)))


def test_a_conversation_as_json_text_in_a_csv_is_the_one_it_stands_for(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 'a, "b"\nc'}, {"role": "assistant", "content": "d"}]
    tools = [{"name": "t"}]
    rows = [
        {"messages": json.dumps(turns), "tools": json.dumps(tools)},
        {"messages": json.dumps(turns), "tools": ""},
    ]
    made = read_all(parts_of(tmp_path, "a.csv", as_csv(rows), 9), Columns(), True)
    lines = read_all(
        parts_of(tmp_path, "a.jsonl", as_lines([{"messages": turns}] * 2), 9), Columns(), True
    )
    assert made["messages"].to_pylist() == lines["messages"].to_pylist()
    assert made["tools"].to_pylist() == ['[{"name":"t"}]', None]
    assert original_rows(made).to_pylist() == rows


# ---- where items of an array end


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-99, 99),
        st.text(st.sampled_from('"\\[]{},: é'), max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text('"\\[,', max_size=3), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    items=st.lists(values, max_size=8),
    chunk=st.integers(1, 11),
    indent=st.sampled_from([None, 0, 1]),
)
def test_items_of_an_array_end_where_json_says(
    items: list[Any], chunk: int, indent: int | None
) -> None:
    data = json.dumps(items, ensure_ascii=False, indent=indent).encode()
    scanner, ends, closed = json_array.ItemScanner(0), [], None
    for first in range(0, len(data), chunk):
        ends += (first + scanner.ends(data[first : first + chunk])).tolist()
        if scanner.closed is not None:
            closed = first + scanner.closed
    assert closed == len(data) - 1
    pieces = [
        data[start : end - 1] for start, end in zip([1, *ends], [*ends, closed + 1], strict=True)
    ]
    assert [json.loads(piece) for piece in pieces if piece.strip()] == items


def test_parts_of_a_compressed_file_are_read_in_one_pass(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a" * 50} for n in range(2000)]
    parts = parts_of(tmp_path, "a.jsonl.gz", gzip.compress(as_lines(rows)), 100)
    assert len({part.task for part in parts}) == 1
    wanted = [parts[3], parts[4], parts[17]]
    found = [original_rows(read.table).to_pylist() for read in read_parts(wanted, Columns())]
    assert found == [rows[300:400], rows[400:500], rows[1700:1800]]
    assert len({part.task for part in parts_of(tmp_path, "b.json", as_array(rows), 100)}) == 20


def test_parts_of_a_large_row_group_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(100)]
    monkeypatch.setattr(formats, "ROWS_PER_READ", 20)
    parts = parts_of(tmp_path, "a.parquet", as_parquet(rows, group=50), 5)
    tasks = [[int(part.task.split("/")[1]) for part in parts], len({part.task for part in parts})]
    # Rows 0-19, 20-39, 40-49 of the first group; 50-59, 60-79, 80-99 of the second.
    assert tasks == [[0] * 10 + [1] * 10, 6]
    assert (
        len({part.task for part in parts_of(tmp_path, "b.parquet", as_parquet(rows, group=4), 5)})
        == 20
    )
    wanted = [parts[1], parts[3], parts[12]]
    found = [original_rows(read.table).to_pylist() for read in read_parts(wanted, Columns())]
    assert found == [rows[5:10], rows[15:20], rows[60:65]]


@pytest.mark.parametrize("stream", [False, True])
def test_batches_of_arrow_may_be_of_any_size(tmp_path: Path, stream: bool) -> None:
    table = pa.table(
        {"prompt": [f"q{n}" for n in range(50)], "completion": ["a"] * 50, "n": range(50)}
    )
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        for first, end in ((0, 0), (0, 1), (1, 1), (1, 30), (30, 31), (31, 50), (50, 50)):
            writer.write_batch(
                table.slice(first, end - first).combine_chunks().to_batches()[0]
                if end > first
                else pa.RecordBatch.from_pylist([], table.schema)
            )
    for every in (1, 7, 50, 99):
        parts = parts_of(tmp_path, f"{every}.arrow", sink.getvalue(), every)
        for together in (False, True):
            assert read_all(parts, Columns(), together)["original"].to_pylist() == table.to_pylist()


def test_arrow_of_other_libraries_is_read(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars", reason="polars is not installed")
    rows = [
        {"prompt": f"q{n}", "completion": "a", "kind": "k", "tags": ["x", "y"]} for n in range(9)
    ]
    frame = polars.DataFrame(rows).with_columns(polars.col("kind").cast(polars.Categorical))
    frame.write_ipc(tmp_path / "file.arrow", compression="zstd")
    frame.write_ipc_stream(tmp_path / "stream.arrow")
    frame.write_parquet(tmp_path / "a.parquet")
    frame.drop("tags").write_csv(tmp_path / "a.csv")
    for file in find_files([str(tmp_path)], None):
        parts = part_ranges([file], [index_file(file, 4)])
        expected = [
            {k: v for k, v in row.items() if k != "tags" or file.name != "a.csv"} for row in rows
        ]
        assert read_all(parts, Columns(), True)["original"].to_pylist() == expected


def test_numbers_keep_their_types_where_the_format_has_any(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "a", "n": n, "f": n / 2, "t": n > 1, "none": None}
        for n in range(3)
    ]
    for name in ("a.jsonl", "a.json", "a.parquet", "file.arrow", "stream.arrow", "a.json.gz"):
        made = read_all(parts_of(tmp_path, name, WRITERS[name](rows), 2), Columns(), True)
        assert original_rows(made).to_pylist() == rows
    made = read_all(parts_of(tmp_path, "a.csv", as_csv(rows), 2), Columns(), True)
    assert original_rows(made)["f"].to_pylist() == ["0.0", "0.5", "1.0"]


def test_csv_of_quoted_lines_blank_lines_and_any_line_end(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        data = end.join(["prompt,completion", '"a', 'b","say ""c"""', "", "d,e", 'f,"g"'])
        parts = parts_of(tmp_path, "x.csv", data.encode(), 2)
        assert [(part.first_row, part.rows) for part in parts] == [(0, 2), (2, 2)]
        made = read_all(parts, Columns(), False)
        assert made["example_id"].to_pylist() == [0, 2, 3]
        assert [list(row.values()) for row in original_rows(made).to_pylist()] == [
            [f"a{end}b", 'say "c"'],
            ["d", "e"],
            ["f", "g"],
        ]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "file.arrow", "stream.arrow", "a.jsonl.gz"]
)
def test_rows_of_five_megabytes(tmp_path: Path, name: str) -> None:
    big = "ä" * 2_500_000
    rows = [{"prompt": f"{n} {big}", "completion": "a" * 5_000_000} for n in range(3)]
    made = read_all(parts_of(tmp_path, name, WRITERS[name](rows), 1), Columns(), True)
    assert original_rows(made).to_pylist() == rows


def test_indexes_survive_json(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        (tmp_path / name).write_bytes(write([{"prompt": "q", "completion": "a"}] * 5))
    for file in find_files([str(tmp_path)], None):
        index = index_file(file, 2)
        assert from_bytes(FileIndex, to_bytes(index)) == index
        assert index.rows == 5
        assert index.sha256 == hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.jsonl", "a"),
        ("deep/a.b.jsonl.gz", "deep/a.b"),
        ("a.csv.zst", "a"),
        ("train-00003-of-00017.parquet", "train"),
        ("x/data-00000-of-00001.arrow", "x/data"),
        ("a-1-of-2.json", "a-1-of-2"),
    ],
)
def test_the_source_is_the_name_without_suffixes_and_shard(name: str, source: str) -> None:
    assert source_of(name) == source


def ids(parts: Iterable[PartRange]) -> np.ndarray:
    return np.concatenate(
        [read_part(part, Columns()).table["example_id"].to_numpy() for part in parts]
    )


def test_real_files_are_all_readable() -> None:
    """Every training and evaluation file, its columns found by name, where the data are at hand."""
    folder = Path(__file__).parents[5] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("there is no ../shared/data beside this checkout")
    files = find_files([str(folder / "train"), str(folder / "eval")], None)
    assert len(files) == 32
    for file in files:
        parts = part_ranges([file], [index_file(file, 4096)])
        found = ids(parts)
        assert len(found) == sum(part.rows for part in parts)
        assert (np.diff(found) == 1).all()


def test_batches_that_no_later_span_needs_are_let_go() -> None:
    table = pa.table({"n": range(100)})
    batches = ((first, table.slice(first, 5).to_batches()[0]) for first in range(0, 100, 5))
    held: list[tuple[int, pa.RecordBatch]] = []
    for first in range(0, 100, 12):
        span = Span(first, min(12, 100 - first))
        assert columnar.gather(span, held, batches, table.schema)["n"].to_pylist() == list(
            range(first, first + span.rows)
        )
        assert len(held) <= 4
