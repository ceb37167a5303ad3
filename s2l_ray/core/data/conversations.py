"""Rows of any schema to conversations, which every later stage reads.

A conversation is a list of turns (schemas.MESSAGES): system first if at all, then user and
assistant in turn, tool turns after an assistant's.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.config import Columns
from s2l_ray.core.data.chats import ChatReader
from s2l_ray.core.data.columns import PartColumns
from s2l_ray.core.data.json_text import BadValue, json_list, to_json_text, without_nulls
from s2l_ray.core.data.turns import (
    ASSISTANT,
    SYSTEM,
    USER,
    Turns,
    check_order,
    joined,
    to_lists,
    turns_of_role,
)

# The reason of rows that are left out as the user asked.
NOT_GOOD = "the column of examples.columns.label says that it is not a good row"


def conversations(part: PartColumns, given: Columns) -> dict[str, pa.Array]:
    """Columns of `examples`, by name: messages, tools, and source where the file has a column of
    it. What stands in bad rows is of no use.

    Args:
        given: the user's names of keys and roles.
    """
    if part.has("label"):
        _leave_out(part)
    made = {"messages": _messages(part, given), "tools": _tools(part)}
    return {**made, "source": part.text("source", True)} if part.has("source") else made


def _messages(part: PartColumns, given: Columns) -> pa.Array:
    """schemas.MESSAGES [N]"""
    turns = [_system(part)] if part.has("system") else []
    meanings = ["messages"] if part.has("messages") else ["instruction", "output"]
    reader = ChatReader(given)
    if part.has("history"):
        turns.append(reader.history(part))
    if part.has("messages") or all(map(part.has_turns, meanings)):
        # What comes before an answer is not learned, be it a turn of the assistant.
        turns += [
            reader.turns(part, meaning, masked=meaning == "instruction") for meaning in meanings
        ]
        every = joined(turns)
        check_order(every, lambda row, *said: part.report(row, meanings[0], *said))
        return to_lists(every, part.count)
    every = joined([*turns, *_pairs(part)])
    if part.has("history"):
        check_order(every, lambda row, *said: part.report(row, "history", *said))
    return to_lists(every, part.count)


def _leave_out(part: PartColumns) -> None:
    """Report the rows that a column says are not good ones."""
    for row, value in enumerate(part.objects("label")):
        said = value.lower() if isinstance(value, str) else value
        if said not in (0, 1, "0", "1", "false", "true"):
            part.report(row, "label", f"expected true or false, got {value!r}")
        elif said in (0, "0", "false"):
            part.bad(row, NOT_GOOD, "")


def _system(part: PartColumns) -> Turns:
    """A system turn for every row that has a text for it."""
    text = part.text("system", False)
    given = pc.fill_null(pc.not_equal(text, ""), False)
    row = np.flatnonzero(given.to_numpy(zero_copy_only=False))
    return turns_of_role(row, SYSTEM, text.take(pa.array(row)))


def _pairs(part: PartColumns) -> list[Turns]:
    """A user and an assistant turn a row, from two or three columns of text."""
    rows = np.arange(part.count)
    user = turns_of_role(rows, USER, part.text("instruction", True))
    if part.has("input"):
        text = part.text("input", False)
        given = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        user = replace(user, input=given)
    return [user, turns_of_role(rows, ASSISTANT, part.text("output", True))]


def _tools(part: PartColumns) -> pa.Array:
    """JSON text of each row's tools, string [N]; null where a row has none."""
    if not part.has("tools"):
        return pa.nulls(part.count, pa.string())
    made: list[str | None] = []
    # A columnar file has every key of any row in all rows.
    filled = not isinstance(part.values("tools"), list)
    for row, value in enumerate(part.objects("tools")):
        try:
            text = value.strip() if isinstance(value, str) else None
            tools = value if text is None else json_list(text, "tools") if text else None
            if not isinstance(tools, list | None):
                raise BadValue(
                    f"expected a list of tools or its JSON text, got {type(tools).__name__}"
                )
            if filled and text is None:
                tools = without_nulls(tools)
            made.append(to_json_text(tools) if tools else None)
        except BadValue as error:
            part.report(row, "tools", error.reason, error.detail)
            made.append(None)
    return pa.array(made, pa.string())
