"""Chat templates that TRL ships: our tokens, masks and prompts against those of transformers.

    python tests/conformance/templates.py [CHECKOUT...]

A checkout is one of huggingface/trl, or any folder with templates (*.jinja); without one, the
templates of the installed trl are taken. Each conversation, of the kinds that TRL's own tests of
templates have, is rendered and cut into tokens by `apply_chat_template`, as TRL does it, and by our
encoder. Compared are the tokens, the mask of what the assistant said where a template has
generation marks, and the prompt of the last answer. Counted are what is equal; what is as trained:
a prompt that ends where the learned part of the answer begins, and not as the template would prompt
for a thought; what we refuse in words; what does not apply, as transformers itself cannot render
it; and what is different. Exit status 1 if anything is different.
"""

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from s2l_ray.core.text.chat_template import FIXED_DATE
from s2l_ray.core.text.encoding import Encoder
from s2l_ray.core.text.turns import Turn
from s2l_ray.errors import UserError
from tests.unit.core.text.test_chat_template import (
    CALL,
    SCHEMA,
    as_given,
    assistant,
    table,
    tokenizer_for,
    turn,
    user,
)

EQUAL, AS_TRAINED, REFUSED = "equal", "as trained", "refused"
NOT_APPLICABLE, DIFFERENT = "not applicable", "different"
OUTCOMES = (EQUAL, AS_TRAINED, REFUSED, NOT_APPLICABLE, DIFFERENT)
OTHER = {"type": "function", "function": {"name": "time", "arguments": {}}}
ASKED = [user("Does it rain in Bern?")]
CALLED = assistant("I look.", tool_calls=[CALL])
TOLD = turn("tool", "dry", name="weather")
# The kinds of conversations; whether the tools' schemas go with them.
CONVERSATIONS: dict[str, tuple[list[Turn], bool]] = {
    "one answer": ([*ASKED, assistant("No rain today.")], False),
    "two answers": ([user("Hi"), assistant("Hello!"), user("Bye"), assistant("So long!")], False),
    "system": ([turn("system", "Be brief."), *ASKED, assistant("No.")], False),
    "a thought of its own": ([*ASKED, assistant("No.", reasoning_content="It is dry.")], False),
    "a thought in tags": ([*ASKED, assistant("<think>\nIt is dry.\n</think>\n\nNo.")], False),
    "a call": ([*ASKED, CALLED], True),
    "a call without words": ([*ASKED, assistant("", tool_calls=[CALL])], True),
    "two calls": ([*ASKED, assistant("", tool_calls=[CALL, OTHER])], True),
    "a call and its answer": ([*ASKED, CALLED, TOLD, assistant("No rain.")], True),
    "tools that are not called": ([*ASKED, assistant("No.")], True),
    "tools beside a system turn": (
        [turn("system", "Be brief."), *ASKED, CALLED, TOLD, assistant("No.")], True,
    ),
    "other letters": ([user("Où? 🎉"), assistant("日本, naïve café")], False),
    "spaces at the ends": ([user("  a \n"), assistant(" b\n\n")], False),
}  # fmt: skip


def cases(text: str) -> Iterator[tuple[str, str, str]]:
    """What is compared, the outcome and the detail, for each conversation with a template."""
    tokenizer = tokenizer_for(text)
    marks = "generation %}" in text or "generation -%}" in text
    encoder = Encoder(tokenizer, "chat", 100_000, "all" if marks else "everything")
    given = {"chat_template": FIXED_DATE + text if "strftime_now" in text else text}
    for name, (turns, with_tools) in CONVERSATIONS.items():
        tools = [SCHEMA] if with_tools else None
        rows = table(turns, json.dumps(tools) if tools else None)
        messages: list[Any] = as_given(turns)
        yield name, *_example(tokenizer, encoder, rows, messages, tools, marks, given)
        yield f"prompt of {name}", *_prompt(tokenizer, encoder, rows, messages[:-1], tools, given)


def _by_transformers(tokenizer: Any, messages: list[Any], tools: Any, **options: Any) -> Any:
    """What `apply_chat_template` gives; None where the template cannot render the conversation."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **options)
    # Whatever a template raises.
    except Exception:
        return None


def _example(
    tokenizer: Any,
    encoder: Encoder,
    rows: Any,
    messages: list[Any],
    tools: Any,
    marks: bool,
    given: dict[str, str],
) -> tuple[str, str]:
    (made,) = encoder.examples(rows)
    theirs = _by_transformers(
        tokenizer, messages, tools, return_assistant_tokens_mask=marks, **given
    )
    if made.reason is not None:
        return (REFUSED if theirs else NOT_APPLICABLE), made.reason
    if theirs is None:
        # Of objects and texts as arguments of calls, a template may take one alone.
        return NOT_APPLICABLE, "transformers takes the arguments of calls in one form only"
    if made.input_ids.tolist() != theirs["input_ids"]:
        ours = tokenizer.decode(made.input_ids.tolist())
        return DIFFERENT, f"{ours!r}, not {tokenizer.decode(theirs['input_ids'])!r}"
    if marks and made.learned.tolist() != [bool(one) for one in theirs["assistant_masks"]]:
        return DIFFERENT, "another mask"
    return EQUAL, ""


def _prompt(
    tokenizer: Any,
    encoder: Encoder,
    rows: Any,
    messages: list[Any],
    tools: Any,
    given: dict[str, str],
) -> tuple[str, str]:
    theirs = _by_transformers(tokenizer, messages, tools, add_generation_prompt=True, **given)
    try:
        (ours,) = encoder.prompts(rows)
    except UserError as error:
        return (REFUSED if theirs else NOT_APPLICABLE), str(error)
    if theirs is None:
        return NOT_APPLICABLE, "transformers takes the arguments of calls in one form only"
    if ours == theirs["input_ids"]:
        return EQUAL, ""
    (made,) = encoder.examples(rows)
    if made.reason is not None:
        return REFUSED, made.reason
    answer = np.flatnonzero(made.learned[len(ours) - 1 :])
    if made.input_ids.tolist()[: len(ours)] == ours and answer[:1].tolist() == [1]:
        return AS_TRAINED, "the template would begin a thought that the row does not have"
    return DIFFERENT, f"{tokenizer.decode(ours)!r}, not {tokenizer.decode(theirs['input_ids'])!r}"


def _folders(given: list[str]) -> Iterator[Path]:
    for name in given:
        inside = Path(name) / "trl" / "chat_templates"
        yield inside if inside.is_dir() else Path(name)
    if not given:
        found = importlib.util.find_spec("trl")
        if found is None or found.origin is None:
            sys.exit("trl is not installed; name a checkout of huggingface/trl")
        yield Path(found.origin).parent / "chat_templates"


def main() -> int:
    if sys.argv[1:2] and sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    different = 0
    for folder in _folders(sys.argv[1:]):
        counts: Counter[str] = Counter()
        reasons: Counter[tuple[str, str]] = Counter()
        templates = sorted(folder.glob("*.jinja"))
        for path in templates:
            for name, outcome, said in cases(path.read_text()):
                counts[outcome] += 1
                if outcome == DIFFERENT:
                    print(f"{DIFFERENT}: {path.stem}, {name}: {said[:600]}")
                elif outcome != EQUAL:
                    reasons[outcome, said[:100]] += 1
        for (outcome, said), count in reasons.most_common():
            print(f"{outcome}, {count} times: {said}")
        found = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES)
        print(f"{folder}: {len(templates)} templates: {found}", flush=True)
        different += counts[DIFFERENT]
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
