"""The final answer in what a model wrote: after its last mark, or else its last number."""

import re

# What announces a final answer; the last one counts.
_MARK = re.compile(
    r"\\boxed\s*(?=\{)|\\fbox\s*(?=\{)|####"
    r"|(?:\b(?:final|correct)\s+)?\banswer\s*(?:\*\*)?\s*(?:is|are|:|=)(?:\s*:)?(?:\s*\*\*)?",
    re.IGNORECASE,
)
# The end of a sentence, but no point inside a number.
_END = re.compile(r"\n|(?<!\\)[.!?;](?=\s|$)|\\\]|\\\)(?=[.\s]*$)")
NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.?\d+)(?:[eE][-+]?\d+)?"
)


def told_answer(text: str) -> str | None:
    """What stands behind the last mark of a final answer; None where there is none.

    Marks are `\\boxed{...}`, `#### ...` and "the answer is ..." or "answer: ...", which end with
    their sentence.
    """
    for mark in reversed(list(_MARK.finditer(text))):
        after = text[mark.end() :]
        if mark[0].endswith("box") or mark[0].startswith(("\\boxed", "\\fbox")):
            found = _in_braces(after)
        else:
            after = after.lstrip(" \t\n:")
            end = _END.search(after)
            found = (after[: end.start()] if end else after).strip()
        if found:
            return found
    return None


def _in_braces(text: str) -> str:
    depth = 0
    for place, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[1:place].strip()
    return text[1:].strip()


def gold_text(text: str) -> str:
    """The answer of a gold text, which is the answer itself or a solution with a mark."""
    told = told_answer(text)
    return text.strip() if told is None else told
