"""How the S2L authors' lab and MAmmoTH score six sets of questions, with the bugs of their rules.

From BigML-CS-UCLA/CoLM, commit 395abfd86cacb40e404bf5fd96a0b7d5918ac8a8: `math_eval/utils.py`
(answer_clean, extract_math_answer, _strip_string, delete_extra_zero, number_it, compare_*) and
`math_eval/data_loader.py` (the gold answers). Numbers found with them can be laid beside published
ones, and beside nothing else: a number near the right one counts on MATH (4 %, or 2.5 for 2), a
gold answer `1363.0` or `[3]` of Mathematics can never be met, and a lone "a" is the choice A.

Two things differ. Where that code calls `eval` on what a model wrote, arithmetic alone is worked
out here (core/answers/arithmetic.py). And its file of MATH has a number beside each gold answer;
here that number is what the rules make of the answer's text.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from s2l_ray.core.answers.arithmetic import value_of

# Our name of a set -> how its answers are read: numbers, letters before numbers, or LaTeX.
SETS = {
    "gsm8k": "numbers",
    "svamp": "numbers",
    "mathematics": "numbers",
    "simuleq": "numbers",
    "numglue": "letters",
    "math": "latex",
}
TRIGGERS = ("####", "The answer is")
_NUMBERS = re.compile(r"-?\d+/?\.?\d*")
_LAST_NUMBER = re.compile(r"-?\d*\.?\d+")
_LETTERS = re.compile(r"\b(A|B|C|D|E)\b")
_FRACTION = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}")
# MATH: an integer is met by what is rounded to it, another number within this share.
NEAR = 0.04


def correct(name: str, generated: str, gold: str) -> bool:
    """Whether an answer to a question of a set counts as right.

    Args:
        name: one of SETS.
        generated: what the model wrote, or "The answer is " and what its program printed.
        gold: as the set's file has it: the answer, or for GSM8K and MATH the whole solution.
    """
    answer, wanted = answer_of(name, generated), gold_of(name, gold)
    if SETS[name] != "latex" or answer == wanted:
        return answer == wanted
    number = _as_number(wanted)
    return number is not None and _near(_as_number(answer), number)


def gold_of(name: str, text: str) -> str:
    """The gold answer of a row, as the authors' loader reads it."""
    if name == "gsm8k":
        return _without_zeros(text.split("#### ")[-1].replace(",", ""))
    if name == "svamp":
        return _without_zeros(text.removesuffix(".0"))
    if name == "math":
        return _stripped(_boxed(text)) if "boxed" in text else _stripped(text)
    return text


def answer_of(name: str, text: str) -> str:
    """The answer that is read out of a text; "" where there is none."""
    kind = SETS[name]
    if kind == "latex":
        return _latex_answer(text) if text else ""
    if any(text.count(trigger) > 1 for trigger in TRIGGERS):
        # The model went on with another question.
        text = text.split("\n\n")[0]
    pieces = re.split("|".join(TRIGGERS), text)
    told, text = len(pieces) > 1, pieces[-1]
    if "=" in text:
        text = text.split("=")[-1].strip()
    found = _LETTERS.findall(text.upper()) if kind == "letters" else []
    if not found:
        found = [_without_zeros(number) for number in _NUMBERS.findall(text.replace(",", ""))]
    if not found:
        return ""
    return (found[0] if told else found[-1]).removesuffix(".").removesuffix("/")


def _without_zeros(number: str) -> str:
    """A number without zeros at its end, `1e+20` among them; other text as it is."""
    try:
        short = str(float(number)).rstrip("0")
    except ValueError:
        return number
    return str(int(short.rstrip("."))) if short.endswith(".") else str(float(short))


# --- MATH


def _latex_answer(text: str) -> str:
    for trigger in ("The answer is ", "the answer is "):
        if trigger in text:
            found = text.split(trigger)[-1].strip()
            break
    else:
        if "boxed" in text:
            if text.endswith("boxed"):
                return ""
            found = _stripped(_boxed(text))
        else:
            numbers = _LAST_NUMBER.findall(text)
            found = numbers[-1] if numbers else ""
    found = _stripped(found.removesuffix(".").removesuffix("/"))
    if "boxed" not in found:
        return found
    return "" if found.endswith("boxed") else _stripped(_boxed(found))


def _boxed(text: str) -> str:
    """What stands in the braces after the last `boxed`, or before the next dollar sign."""
    after = text.split("boxed")[-1]
    if not after.startswith("{"):
        return after.split("$")[0].strip()
    depth, end = 1, 1
    while end < len(after):
        depth += {"{": 1, "}": -1}.get(after[end], 0)
        if depth == 0:
            break
        end += 1
    return after[1:end]


def _replacing(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        for old, new in pairs:
            text = text.replace(old, new)
        return text

    return apply


_WITHOUT_LAYOUT = _replacing(
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
    ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip
_WITH_LEADING_ZEROS = _replacing(("\\%", ""), (" .", " 0."), ("{.", "{0."))


def _stripped(text: str) -> str:
    """LaTeX in the one spelling in which answers are compared."""
    text = _WITHOUT_LAYOUT(text)
    # Only units are written with a space there.
    text = _WITH_LEADING_ZEROS(text.split("\\text{ ")[0])
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _with_braced_roots(text).replace(" ", "")
    return _slash_as_fraction(_with_braced_fractions(text))


def _with_braced_roots(text: str) -> str:
    first, *others = text.split("\\sqrt")
    return first + "".join(
        f"\\sqrt{{{other[0]}}}{other[1:]}" if other and other[0] != "{" else f"\\sqrt{other}"
        for other in others
    )


def _with_braced_fractions(text: str) -> str:
    first, *others = text.split("\\frac")
    made = first
    for other in others:
        if not other or other[0] == "{":
            made += f"\\frac{other}"
        elif len(other) < 2:
            return text
        elif other[1] == "{":
            made += f"\\frac{{{other[0]}}}{other[1:]}"
        else:
            made += f"\\frac{{{other[0]}}}{{{other[1]}}}{other[2:]}"
    return made


def _slash_as_fraction(text: str) -> str:
    sides = text.split("/")
    if len(sides) != 2:
        return text
    try:
        above, below = int(sides[0]), int(sides[1])
    except ValueError:
        return text
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def _as_number(text: str) -> int | float | None:
    """The number that a text is worth, a whole one as an int."""
    if "frac" in text:
        text = _FRACTION.sub(r"\1/\2", text)
        value = value_of(text)
        text = text if value is None else str(value)
    elif "," in text:
        text = text.replace(",", "")
    found = _whole_or_not(text)
    if found is not None:
        return found
    value = value_of(text)
    if isinstance(value, list):
        value = value[0] if value else None
    return _whole_or_not(value)


def _whole_or_not(value: Any) -> int | float | None:
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return round(number) if number.is_integer() else number


def _near(number: int | float | None, gold: int | float) -> bool:
    if number is None or not math.isfinite(number):
        return False
    if isinstance(gold, int):
        return round(number) == gold
    return gold - abs(gold) * NEAR <= number <= gold + abs(gold) * NEAR
