"""Turns as chat templates get them, and whether a template shows what they say."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from s2l_ray.core.text.turns import (
    Refused,
    Turn,
    thoughts,
    tool_calls,
    with_input,
    without_thought,
)

NO_TOOLS = "the chat template leaves out the tools. Give another template"


def message_of(turn: Turn, as_text: bool) -> dict[str, Any]:
    """A turn as chat templates want it.

    Args:
        as_text: the arguments of a tool call are JSON text, as in OpenAI's files, else an object.
    """
    extra = json.loads(turn.extra) if turn.extra else {}
    for call in extra.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict):
            continue
        if as_text and isinstance(function.get("arguments"), dict):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        elif not as_text and isinstance(function.get("arguments"), str):
            # Text that is no JSON is handed to the template as it is.
            with contextlib.suppress(ValueError):
                function["arguments"] = json.loads(function["arguments"])
    return {**extra, "role": turn.role, "content": with_input(turn)}


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def shows(text: str, turn: Turn) -> bool:
    """Whether a text has a turn's content and the names of its tool calls, plain or as JSON.

    A thought in an answer may be missing, as templates rearrange or drop thoughts.
    """
    content = without_thought(turn.content) if turn.role == "assistant" else turn.content.strip()
    wanted = [content, (turn.input or "").strip(), *function_names(tool_calls(turn))]
    return all(_says(text, part) for part in wanted)


def _says(text: str, part: str) -> bool:
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def functions(tools: list[Any]) -> list[dict[str, Any]]:
    """What is said of the functions of tools, or of calls of them."""
    found = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [function for function in found if isinstance(function, dict)]


def function_names(tools: list[Any]) -> list[str]:
    """The names of the functions of tools, or of calls of them."""
    return [str(function.get("name", "")) for function in functions(tools)]


def refuse_omissions(turns: Sequence[Turn], schemas: list[Any] | None, text: str) -> None:
    """Refuse a text without a turn, a tool call or a tool: some templates drop silently what they
    do not know."""
    for turn in turns:
        if not shows(text, turn):
            raise Refused(
                f"the chat template leaves out what a turn of the role {turn.role} says. "
                "Give another template"
            )
    if not all(name in text for name in function_names(schemas or [])):
        raise Refused(NO_TOOLS)


def refuse_python_arguments(messages: list[dict[str, Any]], text: str) -> None:
    """Refuse a text with the arguments of a tool call as Python writes an object.

    Args:
        messages: the turns as the template got them.
    """
    for message in messages:
        for function in functions(message.get("tool_calls") or []):
            arguments = function.get("arguments")
            if isinstance(arguments, dict) and arguments and str(arguments) in text:
                raise Refused(
                    "the chat template writes the arguments of a tool call as Python does. "
                    "Give another template"
                )


def refuse_cut_thoughts(learned: Sequence[Turn], text: str) -> None:
    """Refuse a text without the thought of a learned answer."""
    if not all(_says(text, thought) for turn in learned for thought in thoughts(turn)):
        raise Refused(
            "the chat template leaves out the thought of an answer. Give another template, set "
            "learn: last where only earlier thoughts are cut, or thoughts: optional"
        )
