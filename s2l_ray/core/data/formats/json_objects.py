"""JSON objects from pieces of text, one object a piece."""

import json
from itertools import chain
from typing import Any

import numpy as np

from s2l_ray.core.data.formats.spans import BadRow, Column, Rows

SPACE = b" \t\r\n"
BYTE_ORDER_MARK = "\ufeff"


def _not_json(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return made


# NaN and Infinity, which Python reads, are not JSON.
DECODER = json.JSONDecoder(parse_constant=_not_json, object_pairs_hook=_unique)
# Lists and objects inside each other; Python's own limit depends on what called it.
MAX_LEVELS = 500


def objects(pieces: list[bytes], first_row: int, needed: bool, bad: BadRow) -> Rows:
    """The objects that pieces of text hold.

    Args:
        needed: whether a blank piece is a bad row; elsewhere it is passed over.
    """
    numbers, rows, texts = [], [], []
    for number, piece in enumerate(pieces, first_row):
        stripped = piece.strip(SPACE)
        if not stripped and not needed:
            continue
        try:
            text = stripped.decode()
            row, end = DECODER.raw_decode(text)
            plain = (
                end == len(text)
                and type(row) is dict
                and "\\ud" not in text
                and "\\uD" not in text
                and text.count("[") + text.count("{") <= MAX_LEVELS
            )
        except (ValueError, RecursionError):
            plain = False
        if plain or (row := _object(number, piece, bad)) is not None:
            numbers.append(number)
            rows.append(row)
            texts.append(text.removeprefix(BYTE_ORDER_MARK))
    # Only rows say which columns there are: a span of blank lines and bad rows has none.
    present: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= present.keys():
            present |= dict.fromkeys(row)
    columns: dict[str, Column] = {name: [row.get(name) for row in rows] for name in present}
    return Rows(np.array(numbers, np.int64), columns, texts)


def _object(number: int, piece: bytes, bad: BadRow) -> dict[str, Any] | None:
    """The object of a piece of text; None where it holds none, with the reason reported."""
    text = piece.decode(errors="replace")
    try:
        row = DECODER.decode(piece.decode("utf-8-sig" if number == 0 else "utf-8"))
        json.dumps(row, ensure_ascii=False).encode()
        _check_levels(row)
    except UnicodeDecodeError as error:
        where = f", got byte 0x{error.object[error.start]:02x} at position {error.start}"
        bad(number, "expected UTF-8", repr(piece), where)
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        bad(number, "expected text, got half a surrogate pair", text, f", {half}")
    except json.JSONDecodeError as error:
        bad(number, f"expected a JSON object, but {error.msg}", text, f", in column {error.colno}")
    except _TwiceError as error:
        bad(number, "expected each key once in an object", text, f", got {error.args[0]!r} twice")
    except RecursionError:
        said = f"expected at most {MAX_LEVELS} lists and objects inside each other"
        bad(number, said, text, ", got more")
    except ValueError as error:
        bad(number, f"expected a JSON object, but {error}", text, "")
    else:
        if isinstance(row, dict):
            return row
        bad(number, f"expected a JSON object, got {type(row).__name__}", text, "")
    return None


def _check_levels(row: Any) -> None:
    """Raises a RecursionError for more than MAX_LEVELS lists and objects inside each other."""
    level = [row]
    for _ in range(MAX_LEVELS):
        lists = [value for value in level if isinstance(value, list)]
        objects_ = [value.values() for value in level if isinstance(value, dict)]
        level = list(chain.from_iterable([*lists, *objects_]))
    if level:
        raise RecursionError
