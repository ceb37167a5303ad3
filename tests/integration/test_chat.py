"""A whole run on conversations: a chat template of the user's, tools, several turns, rows that
cannot be rendered, answers decoded.
"""

import json
from typing import Any

import pyarrow as pa
import pytest

from s2l_ray.core.storage.artifact import Artifact
from tests import tiny
from tests.integration.conftest import Finished, Runs, write_job

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CALL = {"function": {"name": "upper", "arguments": '{"word": "ab"}'}}
TOOLS = [{"type": "function", "function": {"name": "upper", "parameters": {}}}]


def conversation(number: int) -> dict[str, Any]:
    """Two questions, every fourth row with a tool.

    What is learned of a row is in `learned` below.
    """
    asked = [
        {"role": "user", "content": f"copy {number}"},
        {"role": "assistant", "content": str(number)},
    ]
    if number % 4:
        return {"messages": [*asked, *asked]}
    called = [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "AB"},
    ]
    return {
        "messages": [
            *asked,
            {"role": "user", "content": "upper"},
            *called,
            {"role": "assistant", "content": "AB"},
        ],
        "tools": TOOLS,
    }


def learned(row: dict[str, Any]) -> int:
    """Number of learned bytes: every answer, the calls it makes, its end token and line end."""
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    return sum(
        len(a["content"]) + (len('upper({"word": "ab"})') if "tool_calls" in a else 0) + 2
        for a in answers
    )


@pytest.fixture(scope="module")
def chatted(tmp_path_factory: pytest.TempPathFactory, runs: Runs) -> Finished:
    folder = tmp_path_factory.mktemp("chatted")
    rows = [conversation(number) for number in range(60)]
    rows[7]["messages"][0]["content"] = "say <|end|>"
    (folder / "mine.jinja").write_text(TEMPLATE)
    training = {"prompt": "chat", "template": str(folder / "mine.jinja"), "max_length": 250}
    tree = tiny.job(
        folder,
        examples={"files": [str(folder / "raw" / "talks.jsonl")], "rows_per_part": 24},
        proxy={**training, "checkpoints": 2},
        clusters={"k": 3},
        subset={"budget": 32},
        target={**training, "learn": "last", "truncation": "left", "steps": 3},
    )
    tiny.write_jsonl(folder / "raw" / "talks.jsonl", rows)
    tiny.write_jsonl(folder / "heldout" / "h.jsonl", rows[20:28])
    job = write_job(folder, tree)
    ended = runs(job)
    assert ended.status == 0, ended.err
    return Finished(folder, job, ended)


def rows_of(artifact: Artifact) -> list[dict[str, Any]]:
    return pa.concat_tables(
        [artifact.read_part(part) for part in artifact.manifest().parts]
    ).to_pylist()


def test_every_turn_is_scored_and_what_cannot_be_rendered_says_why(chatted: Finished) -> None:
    raw = [
        json.loads(line)
        for line in (chatted.folder / "raw" / "talks.jsonl").read_text().splitlines()
    ]
    stored = rows_of(chatted.artifact("trajectories"))
    assert len(stored) == len(raw)
    for number, (row, scored) in enumerate(zip(raw, stored, strict=True)):
        if number == 7:
            assert scored["losses"] is None
            assert "special token <|end|>" in scored["reason"]
        else:
            assert scored["reason"] is None
            assert scored["num_tokens"] == learned(row)
    assert chatted.manifest("trajectories").info["left_out"] == {stored[7]["reason"]: 1}
    assert 7 not in {row["example_id"] for row in rows_of(chatted.artifact("subset"))}


def test_the_last_answer_is_evaluated_and_decoded(chatted: Finished) -> None:
    evaluated = rows_of(chatted.artifact("evaluation"))
    assert [row["num_tokens"] for row in evaluated] == [len("20e\n"), *[4] * 7]
    assert all(isinstance(row["generated"], str) and row["exact"] is not None for row in evaluated)


def test_the_report_shows_what_was_asked_and_answered(chatted: Finished) -> None:
    report = (chatted.folder / "storage" / "runs" / "tiny" / "report.html").read_text()
    assert "assistant: 1" in report


def test_again_reuses_all_though_the_template_has_moved(chatted: Finished, runs: Runs) -> None:
    moved = chatted.folder / "moved.jinja"
    moved.write_text(TEMPLATE)
    again = runs(chatted.job, *(f"--{stage}.template={moved}" for stage in ("proxy", "target")))
    assert again.status == 0, again.err
    assert "│ made" not in again.out


def test_a_length_that_leaves_nothing_to_learn_is_told_before_training(
    chatted: Finished, runs: Runs
) -> None:
    refused = runs(chatted.job, "--proxy.max_length=5", "--until=proxy")
    assert refused.status != 0
    assert (
        "preparing the proxy: of the first 24 rows not one has a token to learn "
        "(23 x no learned token within" in refused.err
    )
    assert len(list((chatted.folder / "storage" / "proxy").glob("*/manifest.json"))) == 1
