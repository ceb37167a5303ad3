"""Columns of raw files that can be stored, checked from a file's schema before any row is read."""

import json
from typing import Any

import pyarrow as pa

from s2l_ray.core.storage.columns import plain_type
from s2l_ray.core.storage.parquet import schema_text
from s2l_ray.errors import UserError

PLAIN_FEATURES = {
    "Value",
    "ClassLabel",
    "Sequence",
    "List",
    "LargeList",
    "Translation",
    "TranslationVariableLanguages",
}


def stored_schema(uri: str, schema: pa.Schema) -> str:
    """The schema that a file's rows will have in the storage, as text.

    Raises:
        UserError: two columns of one name, or a column of pictures or the like.
    """
    names = schema.names
    if len(set(names)) < len(names):
        raise UserError(f"reading {uri}: two columns have the same name in {names}. Rename one.")
    for column in schema:
        twice = _name_twice(column.type)
        if twice is not None:
            raise UserError(
                f"reading {uri}, field {column.name!r}: expected each key once in a struct, got "
                f"{twice!r} twice. Rename one, or remove the field."
            )
    _check_metadata(uri, schema.metadata or {})
    return schema_text(pa.schema([(column.name, plain_type(column.type)) for column in schema]))


def _name_twice(kind: pa.DataType) -> str | None:
    """A name that two fields of a struct inside a type have."""
    inner = [kind.field(number) for number in range(kind.num_fields)]
    names = [field.name for field in inner] if pa.types.is_struct(kind) else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return twice
    return next(filter(None, (_name_twice(field.type) for field in inner)), None)


def _check_metadata(uri: str, metadata: dict[bytes, bytes]) -> None:
    """Check the features that the `datasets` library notes in the metadata of its files."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return
    check_features(uri, features)


def check_features(what: str, features: dict[str, Any]) -> None:
    """Refuse columns of pictures, sound and the like.

    Args:
        what: the file or data set, for messages.
        features: column -> its feature of the `datasets` library, as JSON.
    """
    for name, feature in features.items():
        odd = sorted(_feature_types(feature) - PLAIN_FEATURES)
        if odd:
            raise UserError(
                f"reading {what}, field {name!r}: expected text, numbers, or lists and objects of "
                f"them, got the feature {odd[0]}. Remove the column."
            )


def _feature_types(feature: Any) -> set[str]:
    if isinstance(feature, list):
        return set().union(*map(_feature_types, feature))
    if not isinstance(feature, dict):
        return set()
    kind = {feature["_type"]} if isinstance(feature.get("_type"), str) else set()
    return kind.union(*map(_feature_types, feature.values()))
