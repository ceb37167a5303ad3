"""Rows of every schema to conversations: what becomes of each, and how bad rows are named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.data.json_text import to_json_text, without_nulls
from s2l_ray.core.data.original import original_rows
from s2l_ray.core.data.read import PartRows
from s2l_ray.core.data.turns import FOLLOWERS, ROLES, START
from s2l_ray.core.storage.columns import is_json
from s2l_ray.core.storage.schemas import MESSAGES
from s2l_ray.errors import UserError
from tests.unit.core.data import raw

Row = dict[str, Any]
Turn = tuple[str, str]


def read(path: Path, rows: list[Row], on_bad_row: str = "stop", **columns: Any) -> PartRows:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        raw.lines(path, *rows)
    return raw.read(path, on_bad_row, **columns)


def turns_of(made: PartRows, row: int = 0) -> list[Turn]:
    return [(turn["role"], turn["content"]) for turn in made.table["messages"][row].as_py()]


def said(*pairs: Turn) -> list[Row]:
    return [{"role": role, "content": content} for role, content in pairs]


QA = [("user", "q"), ("assistant", "a")]
SCHEMAS: list[tuple[Row, dict[str, Any], list[Turn]]] = [
    ({"instruction": "q", "output": "a"}, {}, QA),
    ({"instruction": "q", "response": "a"}, {}, QA),
    ({"prompt": "q", "completion": "a"}, {}, QA),
    ({"question": "q", "answer": "a"}, {}, QA),
    ({"query": "q", "response": "a"}, {}, QA),
    ({"system": "s", "instruction": "q", "output": "a"}, {}, [("system", "s"), *QA]),
    ({"system": "", "instruction": "q", "output": "a"}, {}, QA),
    (
        {"rules": "s", "instruction": "q", "output": "a"},
        {"system": "rules"},
        [("system", "s"), *QA],
    ),
    ({"messages": said(*QA)}, {}, QA),
    ({"messages": said(*QA), "prompt": "q"}, {}, QA),
    ({"messages": said(("developer", "s"), *QA)}, {}, [("system", "s"), *QA]),
    ({"messages": said(*QA), "system": "s"}, {}, [("system", "s"), *QA]),
    ({"messages": said(*QA, ("user", "r"))}, {}, [*QA, ("user", "r")]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}, QA),
    ({"conversations": said(*QA)}, {}, QA),
    ({"talk": said(*QA)}, {"messages": "talk"}, QA),
    ({"talk": json.dumps(said(*QA))}, {"messages": "talk"}, QA),
    (
        {"messages": [{"who": "me", "says": "q"}, {"who": "bot", "says": "a"}]},
        {"role": "who", "content": "says", "roles": {"me": "user"}},
        QA,
    ),
    (
        {"prompt": said(("system", "s"), ("user", "q")), "completion": said(("assistant", "a"))},
        {},
        [("system", "s"), *QA],
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
            ]
        },
        {},
        [("user", "q"), ("assistant", "ab")],
    ),
    (
        {
            "conversations": [
                {"from": "user", "value": "q"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                {"from": "assistant", "value": "a"},
            ]
        },
        {},
        [("user", "q"), ("assistant", "{}"), ("tool", "1"), ("assistant", "a")],
    ),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "columns", "turns"), SCHEMAS)
def test_every_schema_becomes_a_conversation(
    tmp_path: Path, kind: str, row: Row, columns: dict[str, Any], turns: list[Turn]
) -> None:
    made = read(tmp_path / f"x.{kind}", [row, row], **columns)
    assert made.table["messages"].type == MESSAGES
    assert turns_of(made, 0) == turns_of(made, 1) == turns
    assert original_rows(made.table).to_pylist() == [row, row]


def test_input_stays_apart_and_an_empty_one_is_none(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "input": text, "output": "a"} for text in ("i", "", None)]
    made = read(tmp_path / "x.jsonl", rows)
    assert [turns[0]["input"] for turns in made.table["messages"].to_pylist()] == ["i", None, None]
    made = read(tmp_path / "y.jsonl", [{"instruction": "q", "context": "i", "response": "a"}])
    assert made.table["messages"][0][0]["input"].as_py() == "i"


def test_what_else_a_turn_has_is_kept_as_json_in_its_order(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": "ü"}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q", "name": None},
                {"content": None, "role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "", "tool_call_id": "1"},
                {"role": "assistant", "content": "a", "reasoning_content": "r"},
            ],
            "tools": [{"name": "f", "b": 1, "a": None}],
        }
    ]
    for kind in ("jsonl", "parquet"):
        made = read(tmp_path / f"x.{kind}", rows)
        extra = [turn["extra"] for turn in made.table["messages"][0].as_py()]
        assert extra == [
            None,
            '{"tool_calls":[{"type":"function","function":{"name":"f","arguments":{"b":1,"a":"ü"}}}]}',
            '{"tool_call_id":"1"}',
            '{"reasoning_content":"r"}',
        ]
        assert turns_of(made)[1] == ("assistant", "")
        null = ',"a":null' if kind == "jsonl" else ""
        assert made.table["tools"].to_pylist() == [f'[{{"name":"f","b":1{null}}}]']


def test_a_null_argument_of_json_is_kept_and_no_tool_calls_are_none(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"q": "x", "filter": None}}}
    turns = [
        user("q"),
        assistant(None, tool_calls=[call]),
        assistant("a", tool_calls=[], name=None),
    ]
    turns = [turns[0], turns[1], {"role": "tool", "content": "r"}, turns[2]]
    text = '{"tool_calls":[{"function":{"name":"f","arguments":{"q":"x","filter":null}}}]}'
    for value in (turns, json.dumps(turns)):
        made = read(tmp_path / "x.jsonl", [{"messages": value}])
        extra = [turn["extra"] for turn in made.table["messages"][0].as_py()]
        assert extra == [None, text, None, None]


@pytest.mark.parametrize("key", ["text", "value", "content"])
def test_a_part_of_text_names_its_text_by_any_usual_key(tmp_path: Path, key: str) -> None:
    turns = [user([{"type": "text", key: "q"}]), assistant([{"type": "text", key: "a"}])]
    assert turns_of(read(tmp_path / "x.jsonl", [{"messages": turns}])) == QA


def test_nulls_that_columns_fill_in_are_the_same_as_absent_keys() -> None:
    value = [{"a": None, "b": [{"c": None}, None], "d": {}}]
    assert without_nulls(value) == [{"b": [{}, None], "d": {}}]
    assert to_json_text({"b": 1, "a": "é"}) == '{"b":1,"a":"é"}'


# ---- order of roles


def allowed(roles: list[str]) -> bool:
    """The rules once more, turn by turn."""
    before, tool_called = None, False
    for role in roles:
        if role == "system" and before is not None:
            return False
        if role == "user" and before not in (None, "system", "assistant"):
            return False
        if role == "assistant" and not (
            before in ("user", "tool") or (before == "assistant" and tool_called)
        ):
            return False
        if role == "tool" and before not in ("assistant", "tool"):
            return False
        tool_called = role == "tool" or (tool_called and role != "user")
        before = role
    return "assistant" in roles


@settings(max_examples=400, deadline=None)
@given(
    several=st.lists(
        st.lists(st.sampled_from(ROLES), min_size=1, max_size=7), min_size=1, max_size=8
    )
)
def test_roles_follow_each_other_as_the_rules_say(
    several: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [{"messages": said(*((role, "x") for role in roles))} for roles in several]
    made = read(tmp_path_factory.getbasetemp() / "roles.jsonl", rows, "reject")
    good = [number for number, roles in enumerate(several) if allowed(roles)]
    assert made.table["example_id"].to_pylist() == good
    assert sorted(reject["row"] - 1 for reject in made.rejects) == sorted(
        set(range(len(rows))) - set(good)
    )
    assert [[role for role, _ in turns_of(made, n)] for n in range(len(good))] == [
        several[n] for n in good
    ]


def test_text_and_lists_of_parts_may_stand_in_one_column(tmp_path: Path) -> None:
    rows = [
        {"messages": [user([{"type": "text", "text": "q"}]), assistant("a")]},
        {"messages": [user("q"), assistant("a")]},
    ]
    made = read(tmp_path / "x.jsonl", rows)
    assert turns_of(made, 0) == turns_of(made, 1) == QA
    kept = original_rows(made.table)
    assert is_json(kept.schema.field("messages"))
    assert [json.loads(text) for text in kept["messages"].to_pylist()] == [
        row["messages"] for row in rows
    ]


def test_the_table_of_roles_knows_them_all() -> None:
    assert set(FOLLOWERS) == {START, *range(len(ROLES))}


# ---- rows that are no conversation


def user(content: Any, **more: Any) -> Row:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


BAD: list[tuple[Any, str, str]] = [
    ([], "expected turns, got an empty conversation", ""),
    (None, "expected a list of turns, got NoneType", ""),
    (5, "expected a list of turns, got int", ""),
    ("hello", "expected the JSON text of a list of turns", ", but Expecting value"),
    ('{"role": "user"}', "expected the JSON text of a list of turns, got that of dict", ""),
    (["q", "a"], "expected turns that are objects, got str", ", turn 1"),
    (
        [user("q"), {"content": "a"}],
        "expected a known role under the key 'role'",
        ", got None in turn 2",
    ),
    (
        [user("q"), {"role": "oracle", "content": "a"}],
        "expected a known role under the key 'role'",
        "got 'oracle' in turn 2; examples.columns.roles",
    ),
    (
        [user("q"), {"role": ["user"], "content": "a"}],
        "expected a known role",
        "got ['user'] in turn 2",
    ),
    ([user("q"), assistant(5)], "expected text under the key 'content', got int", ", turn 2"),
    (
        [user("q"), {"role": "assistant"}],
        "expected text under the key 'content', got NoneType",
        ", turn 2",
    ),
    (
        [user("q"), assistant(None)],
        "expected text under the key 'content', got NoneType",
        ", turn 2",
    ),
    (
        [user([{"type": "image_url", "image_url": "u"}]), assistant("a")],
        "expected nothing but parts of text under the key 'content'",
        "type 'image_url' in turn 1",
    ),
    (
        [user([{"type": "text", "text": 5}]), assistant("a")],
        "expected nothing but parts of text",
        "type 'text' in turn 1",
    ),
    ([user("q"), assistant("")], "expected text, got an empty assistant turn", ", turn 2"),
    (
        [user("q"), assistant(" \n", tool_calls=[])],
        "expected text, got an empty assistant turn",
        ", turn 2",
    ),
    ([user(""), assistant("a")], "expected text, got an empty user turn", ", turn 1"),
    (
        [assistant("a"), user("q")],
        "roles out of order: expected system or user first, got assistant",
        ", turn 1",
    ),
    (
        [user("q"), user("r"), assistant("a")],
        "roles out of order: expected assistant after user, got user",
        ", turn 2",
    ),
    (
        [user("q"), assistant("a"), assistant("b")],
        "roles out of order: expected user or tool after assistant, got assistant",
        ", turn 3",
    ),
    (
        [user("q"), {"role": "system", "content": "s"}, assistant("a")],
        "expected assistant after user, got system",
        ", turn 2",
    ),
    (
        [user("q"), {"role": "tool", "content": "s"}, assistant("a")],
        "expected assistant after user, got tool",
        ", turn 2",
    ),
    ([user("q")], "expected an assistant turn, got none", ""),
]


@pytest.mark.parametrize(("value", "reason", "detail"), BAD)
def test_a_row_that_is_no_conversation_is_named(
    tmp_path: Path, value: Any, reason: str, detail: str
) -> None:
    good = {"messages": said(*QA)}
    path = tmp_path / "x.jsonl"
    # A value that cannot stand beside lists in one column.
    mixed = not isinstance(value, list | None)
    rows = [{"messages": value}] if mixed else [good, {"messages": value}, good]
    with pytest.raises(UserError) as error:
        read(path, rows)
    message = str(error.value)
    assert f"x.jsonl, line {1 if mixed else 2}: field 'messages': " in message
    assert reason in message
    assert detail in message
    assert "Correct the row" in message
    made = read(path, rows, "reject")
    assert reason in made.rejects[0]["reason"]
    assert made.table["example_id"].to_pylist() == ([] if mixed else [0, 2])


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("search", "expected the JSON text of a list of tools"),
        ('{"name": "f"}', "expected the JSON text of a list of tools, got that of dict"),
        ({"name": "f"}, "expected a list of tools or its JSON text, got dict"),
        (5, "expected a list of tools or its JSON text, got int"),
    ],
)
def test_tools_that_are_no_list_are_named(tmp_path: Path, tools: Any, reason: str) -> None:
    with pytest.raises(UserError, match=r"line 1: field 'tools': ") as error:
        read(tmp_path / "x.jsonl", [{"messages": said(*QA), "tools": tools}])
    assert reason in str(error.value)


@pytest.mark.parametrize("column", [[1, 2], [{"a": 1}, {"a": 2}]])
def test_a_column_that_holds_no_lists_is_refused(tmp_path: Path, column: list[Any]) -> None:
    with pytest.raises(
        UserError,
        match=r"field 'messages': expected lists of turns, got .*examples.columns.messages",
    ):
        read(tmp_path / "x.parquet", [{"messages": value} for value in column], "reject")


# ---- turns that are not to be learned


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        ("train", False, True),
        ("training", False, True),
        ("loss", False, True),
        ("loss_weight", 0.0, None),
        ("masked", True, False),
    ],
)
def test_answers_that_say_so_are_not_learned(
    tmp_path: Path, kind: str, key: str, no: Any, yes: Any
) -> None:
    turns = [
        user("a", **{key: no}),
        assistant("b", **{key: no}),
        user("c"),
        assistant("d", **{key: yes}),
        user("e"),
        assistant("f"),
    ]
    made = read(tmp_path / f"x.{kind}", [{"messages": turns}])
    masked = [turn["masked"] for turn in made.table["messages"][0].as_py()]
    assert masked == [False, True, False, False, False, False]


def test_a_mark_between_yes_and_no_is_named(tmp_path: Path) -> None:
    for value in (0.5, "no", [0]):
        with pytest.raises(UserError, match=r"expected 0 or 1, .* 'weight', which .*turn 2"):
            read(tmp_path / "x.jsonl", [{"messages": [user("a"), assistant("b", weight=value)]}])


def test_marks_of_parts_of_a_turn_are_named(tmp_path: Path) -> None:
    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    turns = [user("a"), assistant("b", train_detail=detail)]
    with pytest.raises(UserError, match=r"learned whole or not at all, got the key 'train_detail'"):
        read(tmp_path / "x.jsonl", [{"messages": turns}])


def test_answers_in_a_prompt_are_not_learned(tmp_path: Path) -> None:
    prompt = said(("user", "a"), ("assistant", "b"), ("user", "c"))
    row = {"prompt": prompt, "completion": said(("assistant", "d"))}
    made = read(tmp_path / "x.jsonl", [row])
    assert [(t["content"], t["masked"]) for t in made.table["messages"][0].as_py()] == [
        ("a", False),
        ("b", True),
        ("c", False),
        ("d", False),
    ]
