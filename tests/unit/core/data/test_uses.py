"""What becomes of each column, and that none that looks like conversation is in no text."""

from pathlib import Path
from typing import Any

import pytest

from s2l_ray.config import Evaluation, Examples
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.data.read import read_part
from s2l_ray.core.data.uses import DATA
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from tests.unit.core.data import raw

PAIR = {"instruction": "q", "output": "a"}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def uses(tmp_path: Path, *rows: dict[str, Any], **section: Any) -> dict[str, str]:
    """What planning says of the columns of a file with these rows."""
    path = raw.lines(tmp_path / "x.jsonl", *rows)
    files = RawFiles(Store(str(tmp_path / "storage")), False)
    files.ranges(Examples(files=[str(path)], **section), "examples")
    return dict(files.uses["examples"]["x.jsonl"])


def refused(tmp_path: Path, *rows: dict[str, Any], **section: Any) -> str:
    with pytest.raises(UserError) as error:
        uses(tmp_path, *rows, **section)
    assert str(tmp_path / "x.jsonl") in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"instruction": "q", "input": "i", "response": "a"}, {"input": "input"}),
        ({"instruction": "q", "context": "i", "output": "a"}, {"context": "input"}),
        ({"question": "q", "context": "i", "answer": "a"}, {"context": "input"}),
        ({"prompt": "q", "input": "i", "completion": "a"}, {"input": "input"}),
        ({**PAIR, "history": [["b", "c"]]}, {"history": "history"}),
        ({**PAIR, "system": "s", "tools": "[]"}, {"system": "system", "tools": "tools"}),
        ({**PAIR, "id": 1, "url": "u", "subject": "s"}, {"id": DATA, "url": DATA, "subject": DATA}),
        ({"messages": TALK, "prompt": "q "}, {"messages": "messages", "prompt": DATA}),
        ({**PAIR, "context": None, "images": [], "label": True}, {"images": DATA, "label": DATA}),
    ],
)
def test_what_goes_with_a_conversation_is_read_and_the_rest_is_data(
    tmp_path: Path, row: dict[str, Any], read: dict[str, str]
) -> None:
    assert read.items() <= uses(tmp_path, row).items()


@pytest.mark.parametrize(
    ("row", "column", "said"),
    [
        ({**PAIR, "input": "", "context": "i"}, "context", "Name it as examples.columns.input"),
        (
            {"messages": TALK, "context": "i"},
            "context",
            "as messages. To go without it",
        ),
        ({"messages": TALK, "history": [["b", "c"]]}, "history", "is in no text"),
        ({"messages": TALK, "talk": [{"from": "human", "value": "x"}]}, "talk", "columns.messages"),
        ({**PAIR, "reasoning_content": "hm"}, "reasoning_content", "is in no text"),
        ({**PAIR, "chosen": "b", "rejected": "c"}, "chosen", "examples.columns.output: chosen"),
        ({**PAIR, "images": ["cat.jpg"]}, "images", "holds what is no text"),
        ({**PAIR, "image": {"bytes": None, "path": None}}, "image", "holds what is no text"),
        ({**PAIR, "label": False}, "label", "examples.columns.label: label"),
    ],
)
def test_what_looks_like_conversation_and_is_in_no_text_stops_before_any_work(
    tmp_path: Path, row: dict[str, Any], column: str, said: str
) -> None:
    fine = {**row, column: None}
    message = refused(tmp_path, fine, row)
    assert f"row 2: column {column!r} " in message
    assert said in message
    assert f"examples.ignore: [{column}]" in message
    ignore = [name for name in row if name in (column, "rejected")]
    assert uses(tmp_path, fine, row, ignore=ignore)[column] == "left out (examples.ignore)"


def test_what_comes_after_the_first_rows_is_seen_where_it_is_read(tmp_path: Path) -> None:
    rows = [{"messages": TALK, "context": None}] * 30 + [{"messages": TALK, "context": "i"}]
    assert uses(tmp_path, *rows)["context"] == DATA
    with pytest.raises(UserError, match="row 31: column 'context' looks like"):
        raw.read(tmp_path / "x.jsonl", "reject")


def test_a_text_that_the_user_decided_against_is_data(tmp_path: Path) -> None:
    row = {**PAIR, "better": "b"}
    assert uses(tmp_path, row, columns={"output": "better"})["output"] == DATA


def test_held_out_files_are_looked_at_too(tmp_path: Path) -> None:
    path = raw.lines(tmp_path / "x.jsonl", {"messages": TALK, "context": "i"})
    files = RawFiles(Store(str(tmp_path / "storage")), False)
    with pytest.raises(UserError, match=r"column 'context'.*with evaluation.ignore: .context"):
        files.ranges(Evaluation(files=[str(path)]), "evaluation")


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"a": "x", "b": "y"}, {}, "with evaluation.columns.instruction"),
        ({**PAIR, "input2": "x"}, {"input": "in"}, "no column 'in' .evaluation.columns.input"),
        ({**PAIR, "cluster": 1}, {}, "leave it out with evaluation.ignore"),
        ({**PAIR, "context": "i"}, {"input": "output2"}, "evaluation.columns"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, {}, "set evaluation.columns.output"),
        ({**PAIR, "label": False}, {}, "with evaluation.columns.label"),
        ({**PAIR, "image": "x.png"}, {}, "with evaluation.ignore: .image"),
        ({"messages": [{"role": "x", "content": "y"}]}, {}, "evaluation.columns.roles can tell"),
        ({"instruction": "a", "output": None}, {}, "or leave it out[.]$"),
    ],
)
def test_errors_about_held_out_files_name_their_section(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], said: str
) -> None:
    path = raw.lines(tmp_path / "x.jsonl", row)
    section = Evaluation.model_validate({"files": [str(path)], "columns": columns})
    files = RawFiles(Store(str(tmp_path / "storage")), False)

    def read() -> None:
        for part in files.ranges(section, "evaluation"):
            read_part(part, section.columns, ignore=section.ignore)

    with pytest.raises(UserError, match=said) as caught:
        read()
    assert "examples." not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_the_first_rows_of_every_format_are_few_and_whole(tmp_path: Path, suffix: str) -> None:
    import json

    import pandas as pd

    long = [{"instruction": f'{n}, "{"é" * 2000}"\nx', "output": "a" * n} for n in range(1, 99)]
    path, frame = tmp_path / f"x.{suffix}", pd.DataFrame(long)
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines="jsonl" in suffix, force_ascii=False)
    (part,) = raw.parts_of(path)
    first = json.loads(raw.index(path).first or "")
    assert 10 < len(first) <= 20
    assert first == long[: len(first)]
    assert part.rows == 98


# ---- rows of preferences


def test_the_good_answers_of_preferences_can_be_learned(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    asked = [*turns, {"from": "human", "value": "r"}]
    row = {
        "conversations": asked,
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    path = raw.lines(tmp_path / "x.jsonl", row)
    made = raw.read(path, instruction="conversations", output="chosen")
    assert [(t["content"], t["masked"]) for t in made.table["messages"][0].as_py()] == [
        ("q", False),
        ("a", True),
        ("r", False),
        ("good", False),
    ]
    message = raw.refusal(raw.lines(path, {"prompt": "q", "chosen": "b", "rejected": "c"}))
    assert "examples.columns.output: chosen" in message
    made = raw.read(path, instruction="prompt", output="chosen")
    assert made.table["messages"][0][1]["content"].as_py() == "b"


@pytest.mark.parametrize(("no", "yes"), [(False, True), (0, 1), ("False", "true")])
def test_rows_with_a_false_label_are_left_out_where_the_label_is_named(
    tmp_path: Path, no: Any, yes: Any
) -> None:
    rows = [
        {"prompt": "q", "completion": f"a{n}", "label": said} for n, said in enumerate((yes, no))
    ]
    path = raw.lines(tmp_path / "x.jsonl", *rows)
    made = raw.read(path, label="label")
    assert made.table["example_id"].to_pylist() == [0]
    (reject,) = made.rejects
    assert (reject["row"], "not a good row" in reject["reason"]) == (2, True)
    assert "expected true or false" in raw.refusal(
        raw.lines(path, {**rows[0], "label": "perhaps"}), label="label"
    )


# ---- rounds before an instruction


def test_history_comes_between_the_system_turn_and_the_instruction(tmp_path: Path) -> None:
    row = {**PAIR, "system": "s", "input": "i", "history": [["b", "c"], ["d", "e"]]}
    path = raw.lines(tmp_path / "x.jsonl", row, {**row, "history": []}, {**row, "history": None})
    made = raw.read(path).table["messages"].to_pylist()
    assert [turn["content"] for turn in made[0]] == ["s", "b", "c", "d", "e", "q", "a"]
    assert [turn["masked"] for turn in made[0]] == [False] * 7
    assert (made[0][5]["input"], made[0][1]["input"]) == ("i", None)
    assert made[1] == made[2] == [made[0][0], *made[0][5:]]
    as_text = raw.read(raw.lines(path, {**row, "history": '[["b", "c"], ["d", "e"]]'}))
    assert as_text.table["messages"].to_pylist()[0] == made[0]


@pytest.mark.parametrize("history", [[["b"]], [["b", ""]], [["b", 1]], "b", [1]])
def test_history_that_is_no_list_of_rounds_is_named(tmp_path: Path, history: Any) -> None:
    message = raw.refusal(raw.lines(tmp_path / "x.jsonl", {**PAIR, "history": history}))
    assert "line 1: field 'history': expected " in message


# ---- pictures


@pytest.mark.parametrize("text", ["<image>What is this?", "What is this?\n<image> ", "<VIDEO>x"])
def test_the_mark_of_a_picture_is_no_text(tmp_path: Path, text: str) -> None:
    rows = [PAIR, {"instruction": text, "output": "a"}, PAIR]
    path = raw.lines(tmp_path / "x.jsonl", *rows)
    assert "line 2: the mark of a picture" in raw.refusal(path)
    assert raw.read(path, "reject").table["example_id"].to_pylist() == [0, 2]


def test_a_tag_inside_a_text_is_text(tmp_path: Path) -> None:
    row = {"instruction": "what is the <image> tag?", "output": "an <image> is"}
    assert raw.read(raw.lines(tmp_path / "x.jsonl", row)).table.num_rows == 1


# ---- objects without fields


def test_an_empty_object_is_named(tmp_path: Path) -> None:
    path = raw.lines(tmp_path / "x.jsonl", {}, {})
    assert "line 1: expected an object with fields, got an empty one" in raw.refusal(path)
    assert len(raw.read(path, "reject").rejects) == 2
