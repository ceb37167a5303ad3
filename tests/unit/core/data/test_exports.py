"""Lines that other programs read, and the config that names them."""

import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from s2l_ray.core.data.exports import ChatFile, chat_lines, json_lines, stanzas
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED

CALL = {"function": {"arguments": {"city": "Graz"}, "name": "weather"}, "type": "function"}


def lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.decode().splitlines()]


def chat(*rows: tuple[list[tuple[str, str, str | None, str | None]], str | None]) -> list[Any]:
    made = [
        {
            "example_id": number,
            "source": "s",
            "messages": [
                dict(zip(("role", "content", "input", "extra"), turn, strict=True))
                for turn in turns
            ],
            "tools": tools,
        }
        for number, (turns, tools) in enumerate(rows)
    ]
    return lines(chat_lines(pa.Table.from_pylist(made, EXAMPLES_FIXED)))


def test_json_lines_hold_what_json_has_no_word_for() -> None:
    row = {
        "a": [math.nan, math.inf, 1.5],
        "b": b"\x00\xff",
        "c": date(2024, 2, 29),
        "d": None,
        "e": "ü\u2028",
    }
    added = pa.Table.from_pylist([row, {"a": [], "e": "x"}])
    written = json_lines(added, pa.array(['{"e": 1, "f": 1e999}', "{}"]))
    assert written.count(b"\n") == 2
    assert json.loads(written.decode().split("\n")[0]) == {
        "a": [None, None, 1.5],
        "b": "AP8=",
        "c": "2024-02-29",
        "d": None,
        "e": "ü\u2028",
        "f": math.inf,
    }


def test_an_input_stands_below_its_instruction() -> None:
    (row, empty) = chat(
        ([("user", "Add.", "1 2", None), ("assistant", "3", None, None)], None),
        ([("user", "Add.", "", None), ("assistant", "3", None, None)], None),
    )
    assert row["messages"][0] == {"role": "user", "content": "Add.\n1 2"}
    assert empty["messages"][0] == {"role": "user", "content": "Add."}
    assert list(row) == ["messages", "example_id", "source"]


def test_what_else_a_turn_had_is_there_again() -> None:
    extra = json.dumps({"tool_calls": [CALL], "role": "never", "content": "never"})
    ((row),) = chat(([("assistant", "", None, extra)], '[{"a":1}]'))
    assert row["messages"] == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert row["tools"] == '[{"a":1}]'


def written(stanza: dict[str, bytes]) -> tuple[Any, Any, Any]:
    (factory,) = json.loads(stanza["dataset_info.json"]).values()
    return factory, *(
        yaml.safe_load(stanza[name])["datasets"][0] for name in ("axolotl.yaml", "trl.yaml")
    )


def test_plain_conversations_are_named_by_a_pattern() -> None:
    factory, axolotl, trl = written(
        stanzas([ChatFile("chat/a.jsonl", 0, 0), ChatFile("chat/b.jsonl", 0, 0)])
    )
    assert (factory["file_name"], factory["formatting"]) == ("chat", "sharegpt")
    assert "tools" not in factory["columns"]
    assert axolotl["data_files"] == trl["data_files"] == ["chat/*.jsonl"]


def test_llama_factory_gets_the_reader_that_knows_tool_calls_only_where_there_are_some() -> None:
    named, _, _ = written(stanzas([ChatFile("chat/a.jsonl", 3, 0)]))
    assert (named["formatting"], named["columns"]["tools"]) == ("sharegpt", "tools")
    called, _, _ = written(stanzas([ChatFile("chat/a.jsonl", 3, 2)]))
    assert called["formatting"] == "openai"


@pytest.mark.parametrize("name", ["axolotl.yaml", "trl.yaml"])
def test_files_with_tools_come_first_because_the_first_decides_the_columns(
    name: str, tmp_path: Path
) -> None:
    import datasets

    plain = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "example_id": 1,
    }
    calls = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ],
        "tools": "[]",
        "example_id": 2,
    }
    for file, rows in (("a", [plain] * 3), ("b", [calls] * 3), ("c", [{**plain, "tools": "[]"}])):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [ChatFile("a.jsonl", 0, 0), ChatFile("b.jsonl", 3, 3), ChatFile("c.jsonl", 1, 0)]
    ordered = yaml.safe_load(stanzas(files)[name])["datasets"][0]["data_files"]
    assert ordered == ["b.jsonl", "c.jsonl", "a.jsonl"]
    paths = [str(tmp_path / file) for file in ordered]
    loaded = datasets.load_dataset(
        "json", data_files=paths, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["example_id"][:] == [2, 2, 2, 1, 1, 1, 1]
    assert loaded[0]["messages"][1]["tool_calls"] == [CALL]
    assert loaded[4]["messages"] == plain["messages"]


def test_trainers_are_told_which_answers_are_not_to_be_learned() -> None:
    turn = {"role": "assistant", "content": "a", "extra": None, "input": None, "masked": True}
    row = {"example_id": 0, "source": "s", "messages": [turn], "tools": None}
    (written_row,) = lines(chat_lines(pa.Table.from_pylist([row], EXAMPLES_FIXED)))
    assert written_row["messages"] == [{"role": "assistant", "content": "a", "train": False}]
    files = stanzas([ChatFile("a.jsonl", 0, 0), ChatFile("b.jsonl", 0, 0, 2)])
    _, axolotl, trl = written(files)
    assert axolotl["message_field_training"] == "train"
    assert trl["data_files"] == ["b.jsonl", "a.jsonl"]
    assert b"it learns 2 answers that have train: false" in files["trl.yaml"]
    assert b"prompt: alpaca and plain, whose headings TRL does not write" in files["trl.yaml"]
    _, without, _ = written(stanzas([ChatFile("a.jsonl", 0, 0)]))
    assert "message_field_training" not in without
