"""JSON text of values: written as templates need it, read as rows have it."""

import base64
import json
import math
from typing import Any

import pyarrow as pa

from s2l_ray.core.storage.columns import converted

DECODER = json.JSONDecoder()
SPACE = " \t\r\n"


class BadValue(ValueError):
    """What is wrong with a row's value: a reason that many rows may share, and a detail of this."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def to_json_text(value: Any) -> str:
    """JSON without spaces; keys stay in their order, which templates may write out.

    Raises:
        BadValue: a number that is not finite.
    """
    try:
        return json.dumps(
            value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_plain
        )
    except ValueError:
        raise BadValue(
            "expected numbers that a 64-bit float can hold, got one that is infinite or NaN"
        ) from None


def without_nulls(value: Any) -> Any:
    """The value less the keys of objects that are null: columnar files have every key of any row in
    all rows.

    Raises:
        BadValue: lists and objects inside each other that are too many for Python.
    """
    try:
        return _without_nulls(value)
    except RecursionError:
        raise BadValue("expected fewer lists and objects inside each other") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def json_list(text: str, what: str) -> list[Any]:
    """The list of a JSON text.

    Args:
        what: it is a list of, for messages.

    Raises:
        BadValue: no JSON, or not that of a list.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadValue(f"expected the JSON text of a list of {what}", f", but {error}") from None
    if not isinstance(value, list):
        raise BadValue(
            f"expected the JSON text of a list of {what}, got that of {type(value).__name__}"
        )
    return value


def members(text: str) -> dict[str, str]:
    """The members of a JSON object that was read before: key -> the text of its value, as it is."""
    found: dict[str, str] = {}
    place = _after_space(text, 1)
    while text[place] != "}":
        key, place = DECODER.raw_decode(text, place)
        start = _after_space(text, _after_space(text, place) + 1)
        _, end = DECODER.raw_decode(text, start)
        found[key] = text[start:end]
        place = _after_space(text, end)
        place = _after_space(text, place + 1) if text[place] == "," else place
    return found


def _after_space(text: str, place: int) -> int:
    while text[place] in SPACE:
        place += 1
    return place


def object_text(texts: dict[str, str]) -> str:
    """The JSON object that has these members, key -> text of the value, in one line."""
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in texts.items())
    # Line ends stand between tokens only: in strings they are written with a backslash.
    return "{" + ", ".join(pairs).replace("\n", " ").replace("\r", " ") + "}"


def texts_of(column: pa.Array) -> list[str]:
    """Each value as JSON: bytes become base64, times text, numbers that are not finite null."""
    return [_text(value) for value in values_of(column)]


def _text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=_plain)


def values_of(column: pa.Array) -> list[Any]:
    """The values as Python objects; times, which Python's calendar may not have, as text."""
    values: list[Any]
    try:
        values = converted(column, _in_python(column.type, True)).to_pylist()
    # A time zone that this system does not know.
    except pa.ArrowInvalid:
        naive = converted(column, _in_python(column.type, False))
        values = converted(naive, _in_python(naive.type, True)).to_pylist()
    return values


def _in_python(kind: pa.DataType, as_text: bool) -> pa.DataType:
    """The type with text for times; else without time zones."""
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(item.name, _in_python(item.type, as_text)) for item in kind])
    if pa.types.is_map(kind):
        return pa.map_(_in_python(kind.key_type, as_text), _in_python(kind.item_type, as_text))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _in_python(kind.value_type, as_text)
        return kind if item == kind.value_type else pa.large_list(item)
    if not as_text:
        return pa.timestamp(kind.unit) if pa.types.is_timestamp(kind) else kind
    is_time = pa.types.is_temporal(kind) and not pa.types.is_interval(kind)
    return pa.string() if is_time else kind


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
