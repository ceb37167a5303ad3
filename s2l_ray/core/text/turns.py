"""The turns of a conversation, as renderers and the report read them from `examples`."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

THOUGHT_START, THOUGHT_END = "<think>", "</think>"
# Fields of a turn that hold its thought.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")


class Turn(NamedTuple):
    """One turn of a conversation; the fields of the column `messages`.

    Attributes:
        role: who speaks; the turns of the role assistant are answers.
        input: a further text beside an instruction, where the data has one.
        extra: JSON text of an object with all other fields of the turn, tool calls among them.
        masked: an assistant turn that is not to be learned.
    """

    role: str
    content: str
    input: str | None = None
    extra: str | None = None
    masked: bool | None = False


class Refused(ValueError):
    """A row that cannot be rendered; the message is the reason, for people and for counting."""


def turns_of(rows: pa.Table) -> Iterator[tuple[list[Turn], str | None]]:
    """The turns and the tools of each row (columns messages, tools).

    The list column is read as flat columns over the turns of all rows, which is faster than a
    Python list a row.
    """
    lists = rows["messages"].combine_chunks()
    flat = lists.flatten()
    columns = (flat.field(name).to_pylist() for name in Turn._fields)
    turns = list(map(Turn._make, zip(*columns, strict=True)))
    ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False)).tolist()
    for first, end, tools in zip([0, *ends], ends, rows["tools"].to_pylist(), strict=False):
        yield turns[first:end], tools


def last_answer(turns: Sequence[Turn]) -> int:
    """Place of the last assistant turn.

    Raises:
        Refused: there is none.
    """
    for number in range(len(turns) - 1, -1, -1):
        if turns[number].role == "assistant":
            return number
    raise Refused("the conversation has no assistant turn")


def learned_answers(turns: Sequence[Turn], learn: str) -> list[int]:
    """Places of the assistant turns that are learned.

    Args:
        learn: last takes the last answer alone, everything else all of them.

    Raises:
        Refused: there is no answer, or the data mark all of these as not to be learned.
    """
    last = last_answer(turns)
    answers = [
        number
        for number, turn in enumerate(turns)
        if turn.role == "assistant" and not turn.masked and (learn != "last" or number == last)
    ]
    if not answers:
        raise Refused("the conversation marks its answers as not to be learned")
    return answers


def asked(turns: Sequence[Turn], text: str) -> Sequence[Turn]:
    """The turns with a text behind the last one before the last answer.

    Raises:
        Refused: there is no answer.
    """
    place = last_answer(turns) - 1
    if not text or place < 0:
        return turns
    turn = turns[place]
    if turn.input:
        changed = turn._replace(input=turn.input + text)
    else:
        changed = turn._replace(content=turn.content + text)
    return [*turns[:place], changed, *turns[place + 1 :]]


def with_input(turn: Turn) -> str:
    """The content of a turn, and its input on the lines after it."""
    return f"{turn.content}\n{turn.input}" if turn.input else turn.content


def answer_text(turn: Turn) -> str:
    """What an assistant turn says, without a template: its thought where it has one, its content,
    then its tool calls as JSON."""
    said = turn.content
    if THOUGHT_END not in said:
        for thought in thoughts(turn):
            said = f"{THOUGHT_START}\n{thought}\n{THOUGHT_END}\n\n{said}"
    calls = tool_calls(turn)
    if not calls:
        return said
    text = json.dumps(calls, ensure_ascii=False)
    return f"{said}\n{text}" if said else text


def thoughts(turn: Turn) -> list[str]:
    """The thought of an assistant turn, at most one from a field of its own and one from its
    content."""
    extra = json.loads(turn.extra) if turn.extra else {}
    fields = (extra.get(key) for key in THOUGHT_KEYS)
    found = [text.strip() for text in fields if isinstance(text, str)][:1]
    inside, end, _ = turn.content.rpartition(THOUGHT_END)
    found += [inside.replace(THOUGHT_START, "", 1).strip()] if end else []
    return [text for text in found if text]


def tool_calls(turn: Turn) -> list[Any]:
    """The tool calls of a turn, as they stand in its extra fields."""
    calls = json.loads(turn.extra).get("tool_calls") if turn.extra else None
    return calls if isinstance(calls, list) else []


def prompt_and_answer(messages: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The text before the last assistant turn and the text of that turn, without a template.

    The roles of the speakers are written only where more than one turn comes before the answer.
    """
    turns = [Turn(**message) for message in messages]
    last = last_answer(turns)
    if last == 1:
        asked = with_input(turns[0])
    else:
        asked = "\n".join(f"{turn.role}: {with_input(turn)}" for turn in turns[:last])
    return asked, answer_text(turns[last])


def without_thought(answer: str) -> str:
    """An answer without the thought before it, and without white space around it.

    A thought is no part of an answer: some models write one, and some templates an empty one.
    """
    return answer.rpartition(THOUGHT_END)[2].strip()
