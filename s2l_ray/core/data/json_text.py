"""JSON text in columns: written as templates need it, read as rows have it."""

import json
from typing import Any


class BadValue(ValueError):
    """What is wrong with a row's value: a reason that many rows may share, and a detail of this."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def to_json_text(value: Any) -> str:
    """JSON without spaces; keys stay in their order, which templates may write out."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def without_nulls(value: Any) -> Any:
    """The value less the keys of objects that are null: columnar files have every key of any row in
    all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


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
