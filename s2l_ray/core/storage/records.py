"""Frozen dataclasses as JSON and back: the one form in which records are stored and sent.

The types of the fields say how a record is read, nested dataclasses and named tuples included. A
field whose type JSON does not have says in its annotation how it is written and read, as
`Float32Array` does.
"""

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from s2l_ray.core.storage.store import is_plain_path

T = TypeVar("T")
# As nested lists; every float32 is exact in Python's float.
Float32Array = Annotated[
    np.ndarray,
    PlainValidator(lambda value: np.asarray(value, np.float32)),
    PlainSerializer(lambda array: array.tolist()),
]
MOST_ERRORS = 3


def _plain_path(text: str) -> str:
    if not is_plain_path(text):
        raise ValueError("expected plain names with slashes between them")
    return text


# Where something lies inside an artifact's folder: no such path escapes from it.
PlainPath = Annotated[str, AfterValidator(_plain_path)]

_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def to_json(record: Any) -> dict[str, Any]:
    """The fields of a record, for json.dumps; not-a-number stays, where pydantic's own JSON mode
    would write null."""
    fields: dict[str, Any] = _adapter(type(record)).dump_python(record)
    return fields


def from_json(cls: type[T], value: Any) -> T:
    """The record of type `cls` that `to_json` gave, also after its way through JSON.

    Raises:
        ValueError: a field that is missing, unknown or of another type, with its path.
    """
    try:
        record: T = _adapter(cls).validate_python(value, extra="forbid")
    except ValidationError as error:
        raise ValueError(f"not a {cls.__name__}: {_described(error)}") from None
    return record


def to_bytes(record: Any) -> bytes:
    """A record as JSON text in UTF-8, its keys sorted.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return json.dumps(to_json(record), sort_keys=True, allow_nan=False).encode()


def from_bytes(cls: type[T], data: bytes) -> T:
    """The record that `to_bytes` wrote.

    Raises:
        ValueError: no JSON, or not that of such a record.
    """
    return from_json(cls, json.loads(data))


def _described(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    texts = [
        f"{'.'.join(map(str, found['loc'])) or 'value'}: {found['msg']}, got {found['input']!r:.80}"
        for found in errors[:MOST_ERRORS]
    ]
    more = len(errors) - len(texts)
    return "; ".join(texts) + (f" and {more} more" if more else "")
