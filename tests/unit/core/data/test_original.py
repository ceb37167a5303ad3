"""Original columns are kept as they were, in whatever type they all have."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from s2l_ray.core.data.original import original_rows
from s2l_ray.core.storage.columns import is_json, unify
from s2l_ray.core.storage.parquet import parquet_bytes, read_parquet
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED
from tests.unit.core.data.raw import GOOD, lines, read, refusal


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


def test_objects_without_fields_are_kept_as_null(tmp_path: Path) -> None:
    content = [
        {**GOOD, "meta": {}, "deep": [{"a": {}, "b": 1}], "none": []},
        {**GOOD, "meta": {}, "deep": [{"a": {}}], "none": []},
    ]
    made = read(lines(tmp_path / "x.jsonl", *content))
    back = original_rows(read_parquet(parquet_bytes(made.table), "x")).to_pylist()
    assert [(row["meta"], row["deep"], row["none"]) for row in back] == [
        (None, [{"a": None, "b": 1}], []),
        (None, [{"a": None, "b": None}], []),
    ]


def test_a_column_of_several_types_is_named_with_its_lines(tmp_path: Path) -> None:
    message = refusal(
        lines(tmp_path / "x.jsonl", {**GOOD, "m": 1}, {**GOOD, "m": None}, {**GOOD, "m": "one"})
    )
    assert "field 'm': expected one type in all rows" in message
    assert "str in line 3" in message
    assert "int in line 1" in message
    assert "field 'm'" in refusal(lines(tmp_path / "y.jsonl", {**GOOD, "m": 2**70}))


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
    assert original["args"][299].as_py() == '{"k299":299}'


def test_objects_that_do_not_fit_become_json_text_and_original_rows_follow(tmp_path: Path) -> None:
    def table(value: Any) -> pa.Table:
        row = {"prompt": "q", "completion": "a", "args": value}
        return read(lines(tmp_path / "x.jsonl", row)).table

    tables = [table({"v": 1}), table({"v": "one"}), table([{"v": 1}, {"v": "one"}]), table(None)]
    found = unify((str(n), original_rows(t).schema) for n, t in enumerate(tables))
    assert is_json(found.field("args"))
    rows = pa.concat_tables([original_rows(t, found) for t in tables])
    assert [text and json.loads(text) for text in rows["args"].to_pylist()] == [
        {"v": 1},
        {"v": "one"},
        [{"v": 1}, {"v": "one"}],
        None,
    ]
