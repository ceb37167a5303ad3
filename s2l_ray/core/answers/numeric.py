"""Our own rule for answers: numbers by their value, lists as sets, letters, and text as text.

Two whole numbers must be equal, other numbers within a relative 1e-6. A list in brackets, in braces
or with commas is a set; a tuple in parentheses and numbers between spaces keep their order. Units,
currency signs and thousands separators do not count, and `50%` is both 50 and 0.5. What is no
number is compared as text, without layout and case.
"""

import cmath
import math
import re
from typing import Any

from s2l_ray.core.answers.arithmetic import NUMBER as NUMBERS
from s2l_ray.core.answers.arithmetic import value_of
from s2l_ray.core.answers.reading import NUMBER, gold_text, told_answer

CLOSE = 1e-6
# Larger whole numbers are compared as text.
LARGEST = 10**300
LETTERS = "ABCDE"
_LETTER = re.compile(r"(?<![A-Za-z\\])([A-E])(?![A-Za-z'\u2019])")
_NAMES: dict[str, Any] = {"pi": math.pi, "i": 1j, "sqrt": lambda value: value**0.5}
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|(?<!\\)\\[!,;: ]|\\quad|\\displaystyle"
    r"|\^\s*\{?\s*\\circ\s*\}?"
    r"|\\degree|\u00b0|\$|\\\(|\\\)|\\\[|\\\]|\*\*|[\u20ac\u00a3\u200b]"
)
_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3})((?:\{?,\}?\d{3})+)(?!\d)")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")
_ROOT = re.compile(r"\\sqrt\s*(?:\[([^][]*)\])?\s*(?:\{([^{}]*)\}|(\w))")
_MIXED = re.compile(
    r"(?<![\w.)])(\d+)\s*(?:\s(\d+)\s*/\s*(\d+)|\\[dt]?frac\{(\d+)\}\{(\d+)\})(?![\d.])"
)
_UNITS = re.compile(
    r"^([-+]?[\d.]+(?:/\d+)?)\s*[A-Za-z]+(?:\^?\d)?(?:[\s/.-]+[A-Za-z]+(?:\^?\d)?)*$"
)
# What a number may be equal to: a name, words, or other arithmetic.
_NAMED = re.compile(r"[A-Za-z_\s\\]+(?:\([A-Za-z]\)|_?\{?\d\}?)?\s*|[^A-Za-z]*")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def correct(generated: str, gold: str) -> bool:
    """Whether an answer is right.

    Args:
        generated: what the model wrote, or what its program printed.
        gold: the answer, or a solution that ends with it.
    """
    wanted = gold_text(gold)
    told = told_answer(generated)
    answer = generated.strip() if told is None else told
    letter = _letter_of(wanted)
    if letter is not None:
        return _letter_in(answer, told is not None) == letter
    if _same(answer, wanted):
        return True
    if _numbers(wanted) is None or _numbers(answer) is not None:
        return False
    # Words around the number: the first one of a told answer, or else the last of the whole text.
    found = NUMBER.findall(_plain(answer.rpartition("=")[2]))
    return bool(found) and _same(found[-1 if told is None else 0], wanted)


def _same(answer: str, wanted: str) -> bool:
    gold, found = _numbers(wanted), _numbers(answer)
    if gold is None:
        return _as_text(answer) == _as_text(wanted)
    if found is None or len(gold) != len(found) or not _brackets_fit(answer, wanted):
        return False
    if _ordered(wanted):
        return all(map(_equal, found, gold))
    return _each_in(gold, found) and _each_in(found, gold)


def _each_in(some: list[Any], others: list[Any]) -> bool:
    return all(any(_equal(other, one) for other in others) for one in some)


def _equal(found: tuple[Any, bool], gold: tuple[Any, bool]) -> bool:
    (value, percent), (wanted, in_percent) = found, gold
    values = {value, value / 100} if percent else {value}
    golds = {wanted, wanted / 100} if in_percent else {wanted}
    return any(_close(one, other) for one in values for other in golds)


def _close(value: Any, gold: Any) -> bool:
    if isinstance(value, int) and isinstance(gold, int):
        return value == gold
    try:
        return bool(abs(value - gold) <= max(CLOSE * abs(gold), 1e-12))
    except OverflowError:
        return False


# --- letters


def _letter_of(text: str) -> str | None:
    bare = text.strip(" ().$")
    return bare if len(bare) == 1 and bare in LETTERS else None


def _letter_in(text: str, told: bool) -> str | None:
    """The letter of a choice: the first one of a told answer, or else the last of a whole text."""
    bare = _WORDS.sub(r"\1", text).strip(" ().$*:,\n").upper()
    if len(bare) == 1:
        return bare
    found = _LETTER.findall(_WORDS.sub(r"\1", text))
    if not found:
        return None
    return str(found[0] if told else found[-1])


# --- text to numbers


def _plain(text: str) -> str:
    """Text without layout, words out of their commands, thousands without separators."""
    text = text.replace("\\%", "%").replace("\\$", "").replace("\u2212", "-")
    text = re.sub(r"(?<=\d),\s*\\!\s*(?=\d)", ",", text)
    text = _LAYOUT.sub("", _WORDS.sub(r" \1 ", text)).strip(" \t\n:;,").rstrip(". ")
    if text[:1] not in _PAIRS:
        text = _THOUSANDS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    return text


def _numbers(text: str) -> list[tuple[Any, bool]] | None:
    """The numbers that a text consists of, each with whether it is in percent; None: other text."""
    found = [_number(item) for item in _items(_plain(text))]
    values = [value for value in found if value is not None]
    return values if found and len(values) == len(found) else None


def _items(text: str) -> list[str]:
    inner = text.replace("\\{", "{").replace("\\}", "}")
    closed = inner[:1] in _PAIRS and inner.endswith(_PAIRS[inner[0]])
    if closed and ("," in inner or inner[0] == "["):
        inner = inner[1:-1]
    if _spaced(inner):
        return inner.split()
    if "(" in inner or "\\frac" in inner:
        # A comma inside brackets divides nothing.
        return _outside(inner)
    return [item for item in re.split(r",|;|\band\b|\bor\b", inner) if item.strip()]


def _outside(text: str) -> list[str]:
    depth, items = 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return items


def _spaced(text: str) -> bool:
    """Whether these are numbers with spaces between; `1 1/2` is a mixed number instead."""
    pieces = text.split()
    return len(pieces) > 1 and all(re.fullmatch(r"[-+]?\d+(\.\d+)?", piece) for piece in pieces)


def _ordered(text: str) -> bool:
    plain = _plain(text)
    return plain.startswith("(") or _spaced(plain)


def _brackets_fit(answer: str, wanted: str) -> bool:
    """A tuple or an open interval is no list."""
    pair = [re.sub(r"\\([{}])", r"\1", _plain(text)) for text in (answer, wanted)]
    if any("," not in text or text[:1] not in _PAIRS for text in pair):
        return True
    return (pair[0][0] == "(") == (pair[1][0] == "(")


def _number(item: str) -> tuple[Any, bool] | None:
    left, equals, text = item.rpartition("=")
    if equals and not _NAMED.fullmatch(left):
        return None
    text = text.strip()
    percent = text.endswith("%") or text.endswith(" percent")
    text = text.removesuffix("percent").rstrip("% ").strip()
    units = _UNITS.match(text)
    value = _value(text)
    if value is None and units:
        value = _value(units[1])
    return None if value is None else (value, percent)


def _value(text: str) -> Any:
    """What an expression of numbers in LaTeX or plain arithmetic is worth; None: it is none."""
    text = _MIXED.sub(lambda m: f"({m[1]}+{m[2] or m[4]}/{m[3] or m[5]})", text)
    for _ in range(4):
        text = _ROOT.sub(lambda m: f"(({m[2] or m[3]})**(1/({m[1] or 2})))", text)
        text = _FRACTION.sub(lambda m: f"(({m[1] or m[2]})/({m[3] or m[4]}))", text)
    text = re.sub(r"\\cdot|\\times|\u00d7|\u00b7", "*", text)
    text = text.replace("\\div", "/").replace("\\pi", "pi").replace("\u03c0", "pi")
    text = text.replace("^", "**").replace("{", "(").replace("}", ")")
    if re.search(
        r"[A-Za-z]", re.sub(r"pi|sqrt|(?<![A-Za-z])i(?![A-Za-z])|(?<=\d)e[-+]?\d", "", text)
    ):
        return None
    # A product without its sign.
    text = re.sub(
        r"(?<=[\d)])\s*(?=pi|sqrt|i\b|\()|(?<=\))\s*(?=\d)|(?<=pi)\s*(?=[\d(])", "*", text
    )
    # Python reads no number with zeros before it.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    value = value_of(text, _NAMES)
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        return None
    if isinstance(value, int):
        return value if abs(value) <= LARGEST else None
    if not cmath.isfinite(value):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_text(text: str) -> str:
    plain = _plain(text)
    plain = re.sub(r"\\[dtc]frac", r"\\frac", plain)
    plain = re.sub(r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}", plain)
    plain = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", plain)
    return re.sub(r"\s|\*|\\cdot|\\times", "", plain).casefold().strip(".,")
