"""Original columns are kept as they were, in whatever type they all have."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pytest

from s2l_ray.core.data.exports import json_lines
from s2l_ray.core.data.original import original_rows, original_texts, schema_of
from s2l_ray.core.storage.columns import is_json, plain_type, unify
from s2l_ray.core.storage.parquet import parquet_bytes, read_parquet
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED
from tests.unit.core.data.raw import GOOD, lines, read


def test_every_column_is_kept_in_its_order(tmp_path: Path) -> None:
    content = [
        {"z": 1, "output": "a", "source": "s", "m": {"a": [1, 2], "b": {"c": "x"}},
         "instruction": "q", "input": "", "f": 1.5, "t": True},
        {"z": None, "output": "b", "source": "t", "m": None,
         "instruction": "r", "input": None, "f": 2, "t": None, "late": "é"},
    ]  # fmt: skip
    made = read(lines(tmp_path / "x.jsonl", *content))
    back = original_rows(read_parquet(parquet_bytes(made.table), "x"))
    assert back.column_names == list(content[1])
    assert back.to_pylist() == [{**content[0], "late": None}, content[1]]
    assert made.table["source"].to_pylist() == ["s", "t"]
    assert [turns[0]["input"] for turns in made.table["messages"].to_pylist()] == [None, None]
    assert made.table.drop_columns(["original"]).schema == EXAMPLES_FIXED


def exported(table: pa.Table) -> list[Any]:
    return [json.loads(text) for text in original_texts(table)]


def test_rows_of_json_come_out_as_they_came_in(tmp_path: Path) -> None:
    texts = [
        '{"instruction": "q", "output": "a", "meta": {}, "deep": [{"a": {}, "b": 1}], "none": []}',
        '{"instruction":"q","output":"a","meta":{"x":null},"deep":[],"n":1e9999,"f":1.50}',
        '{"instruction": "q", "output": "a\\u00e9", "n": 123456789012345678901234567890}',
        '{"instruction": "q", "output": "a", "n": "one", "m": null, "id": true, "f": 2}',
        '{"instruction": "q", "output": "a", "id": 1, "call": {"arguments": {"city": "Oslo"}}}',
        '{"instruction": "q", "output": "a", "id": 0.5, "call": {"arguments": {"n": [1, null]}}}',
        '{"instruction": "q", "output": "a", "nest": ' + "[" * 400 + "]" * 400 + "}",
    ]
    made = read(lines(tmp_path / "x.jsonl", *(text.encode() for text in texts)))
    table = read_parquet(parquet_bytes(made.table), "x")
    assert original_texts(table) == texts
    kept = original_rows(table)
    as_text = [field.name for field in kept.schema if is_json(field)]
    assert as_text == ["deep", "n", "id", "nest"]
    assert kept["n"].to_pylist() == [
        None, "1e9999", "123456789012345678901234567890", '"one"', None, None, None
    ]  # fmt: skip
    assert kept["id"].to_pylist()[3:6] == ["true", "1", "0.5"]
    assert kept["f"].to_pylist()[:4] == [None, 1.5, None, 2.0]


def test_items_of_an_array_stand_in_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('\ufeff[\n{"instruction": "q\\n",\r\n  "output":\n "a", "n": 1e3\n}\n]')
    (text,) = original_texts(read(path).table)
    assert json_lines(pa.table({"source": ["s"]}), [pa.scalar(text)]).decode() == (
        '{"source": "s", "instruction": "q\\n", "output": "a", "n": 1e3}\n'
    )


def test_numbers_that_a_float_does_not_hold_are_kept_as_json_text(tmp_path: Path) -> None:
    text = '{"instruction": "q", "output": "a", "f": [0.5, -1e999]}'
    made = original_rows(read(lines(tmp_path / "x.jsonl", text.encode())).table)
    assert made["f"].to_pylist() == ["[0.5, -1e999]"]


@pytest.mark.parametrize("values", [[{}, {}], [[{}], []], [1, "two"], [2**64, 1], [True, 0.5]])
def test_values_that_have_no_one_type_are_kept_as_json_text(
    tmp_path: Path, values: list[Any]
) -> None:
    rows = [{**GOOD, "m": value} for value in values]
    table = read(lines(tmp_path / "x.jsonl", *rows)).table
    assert is_json(original_rows(table).schema.field("m"))
    assert [json.loads(text) for text in original_rows(table)["m"].to_pylist()] == values
    assert exported(table) == rows


def union(values: list[Any]) -> pa.Array:
    numbers = pa.array([value if isinstance(value, int) else None for value in values])
    texts = pa.array([value if isinstance(value, str) else None for value in values])
    which = pa.array([int(isinstance(value, str)) for value in values], pa.int8())
    return pa.UnionArray.from_sparse(which, [numbers, texts], ["i", "s"])


ODD = {
    "union": (union([1, "two"]), [1, "two"], True),
    "months": (pa.array([pa.MonthDayNano([1, 2, 3]), None]), [[1, 2, 3], None], True),
    "late": (
        pa.array([1_600_000_000_000_000, 0], pa.timestamp("ms")),
        ["<value out of range: 1600000000000000>", "1970-01-01 00:00:00.000"],
        False,
    ),
    "too late": (
        pa.array([1 << 62, 0], pa.timestamp("s")),
        ["<value out of range: 4611686018427387904>", "1970-01-01 00:00:00"],
        True,
    ),
    "zone": (
        pa.array([0, None], pa.timestamp("ms", "No/Where")),
        ["1970-01-01 00:00:00.000", None],
        False,
    ),
    "day": (
        pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()),
        ["<value out of range: 2147483647>", "1970-01-01"],
        False,
    ),
    "inside": (
        pa.array([[{"t": 1}], []], pa.list_(pa.struct([("t", pa.timestamp("ns"))]))),
        [[{"t": "1970-01-01 00:00:00.000000001"}], []],
        False,
    ),
    "runs": (pa.RunEndEncodedArray.from_arrays([2], ["x"]), ["x", "x"], False),
    "views": (
        pa.ListViewArray.from_arrays([2, 0], [1, 2], pa.array([1, 2, 3])), [[3], [1, 2]], False
    ),
    "wide": (pa.array([2**64 - 1, 1], pa.uint64()), [2**64 - 1, 1], False),
    "bytes": (pa.array([b"\x00\xff", None]), ["AP8=", None], False),
    "floats": (pa.array([float("nan"), 0.5], pa.float16()), [None, 0.5], False),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_columns_of_any_type_are_kept_and_exported(tmp_path: Path, name: str) -> None:
    column, expected, as_text = ODD[name]
    table = pa.table({"instruction": ["q"] * 2, "output": ["a"] * 2, "odd": column})
    feather.write_feather(table, tmp_path / "x.arrow", compression="uncompressed")
    made = read_parquet(parquet_bytes(read(tmp_path / "x.arrow").table), "x")
    assert [row["odd"] for row in exported(made)] == expected
    kept = original_rows(made)
    assert is_json(kept.schema.field("odd")) == as_text
    if not as_text:
        assert kept["odd"].type == plain_type(column.type)
        assert str(original_rows(made, unify([kept.schema, kept.schema]))) == str(kept)


def test_an_empty_batch_with_a_union_is_read(tmp_path: Path) -> None:
    columns = [pa.array(["q"]), pa.array(["a"]), union(["x"])]
    full = pa.record_batch(columns, names=["instruction", "output", "u"])
    for name, opened in (("x.arrow", pa.ipc.new_file), ("y.arrow", pa.ipc.new_stream)):
        with opened(str(tmp_path / name), full.schema) as writer:
            writer.write_batch(full.slice(0, 0))
            writer.write_batch(full)
        assert [row["u"] for row in exported(read(tmp_path / name).table)] == ["x"]


def test_integers_that_are_no_floats_are_found_before_the_files_are_unified(
    tmp_path: Path,
) -> None:
    rows = [{**GOOD, "n": 2**60 + 1, "m": [2**60 + 1]}, {**GOOD, "n": 0.5, "m": [0.5]}]
    tables = [read(lines(tmp_path / "x.jsonl", row)).table for row in rows]
    found = unify(schema_of(table) for table in tables)
    kept = pa.concat_tables([original_rows(table, found) for table in tables])
    assert kept["n"].to_pylist() == [str(2**60 + 1), "0.5"]
    assert kept["m"].to_pylist() == [f"[{2**60 + 1}]", "[0.5]"]


def test_objects_of_several_types_are_kept_as_json_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "a", "args": {"value": 1, "b": None}, "n": 1},
        {"prompt": "q", "completion": "a", "args": {"value": ["x"]}, "n": 2},
        {"prompt": "q", "completion": "a", "args": None, "n": 3},
    ]
    original = original_rows(read(lines(tmp_path / "x.jsonl", *rows)).table)
    assert is_json(original.schema.field("args"))
    assert [
        None if text is None else json.loads(text) for text in original["args"].to_pylist()
    ] == [row["args"] for row in rows]
    assert original.schema.field("n").type == pa.int64()


def test_objects_of_very_many_keys_are_kept_as_json_text(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "args": {f"k{n}": n}} for n in range(300)]
    path = lines(tmp_path / "x.jsonl", *rows)
    original = original_rows(read(path, rows_per_part=1000).table)
    assert is_json(original.schema.field("args"))
    assert original["args"][299].as_py() == '{"k299": 299}'


def test_objects_that_do_not_fit_become_json_text_and_original_rows_follow(tmp_path: Path) -> None:
    def table(value: Any) -> pa.Table:
        row = {"prompt": "q", "completion": "a", "args": value}
        return read(lines(tmp_path / "x.jsonl", row)).table

    tables = [table({"v": 1}), table({"v": "one"}), table([{"v": 1}, {"v": "one"}]), table(None)]
    found = unify(map(schema_of, tables))
    assert is_json(found.field("args"))
    rows = pa.concat_tables([original_rows(t, found) for t in tables])
    assert [text and json.loads(text) for text in rows["args"].to_pylist()] == [
        {"v": 1},
        {"v": "one"},
        [{"v": 1}, {"v": "one"}],
        None,
    ]
