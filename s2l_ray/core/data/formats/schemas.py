"""Columns of raw files that can be stored, checked from a file's schema before any row is read."""

import json
from collections.abc import Collection
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
        UserError: two columns of one name, two keys of one name in a struct, or a type that pyarrow
            cannot give to Python.
    """
    names = schema.names
    if len(set(names)) < len(names):
        raise UserError(f"reading {uri}: two columns have the same name in {names}. Rename one.")
    for column in schema:
        try:
            pa.nulls(0, column.type)
        # Intervals of months alone, or of days.
        except KeyError:
            raise UserError(
                f"reading {uri}, field {column.name!r}: its type {column.type} is one that pyarrow "
                "cannot give to Python. Convert or remove the column."
            ) from None
        twice = _name_twice(column.type)
        if twice is not None:
            raise UserError(
                f"reading {uri}, field {column.name!r}: expected each key once in a struct, got "
                f"{twice!r} twice. Rename one, or remove the field."
            )
    return schema_text(pa.schema([(column.name, plain_type(column.type)) for column in schema]))


def _name_twice(kind: pa.DataType) -> str | None:
    """A name that two fields of a struct inside a type have."""
    inner = [kind.field(number) for number in range(kind.num_fields)]
    names = [field.name for field in inner] if pa.types.is_struct(kind) else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return twice
    return next(filter(None, (_name_twice(field.type) for field in inner)), None)


def media_of(metadata: dict[bytes, bytes] | None) -> dict[str, str]:
    """Columns of pictures and the like, by the features that the `datasets` library notes in the
    metadata of its files."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return media(features) if isinstance(features, dict) else {}


def media(features: dict[str, Any]) -> dict[str, str]:
    """Column -> feature, of columns that are no text, numbers, or lists and objects of them.

    Args:
        features: column -> its feature of the `datasets` library, as JSON.
    """
    odd = {name: sorted(_feature_types(own) - PLAIN_FEATURES) for name, own in features.items()}
    return {name: kinds[0] for name, kinds in odd.items() if kinds}


def check_media(what: str, found: dict[str, str], ignore: Collection[str], section: str) -> None:
    """Refuse columns of pictures, sound and the like that are not ignored.

    Args:
        what: the file or data set, for messages.
        found: column -> its feature.
        section: of the config, for messages.
    """
    for name, feature in found.items():
        if name not in ignore:
            raise UserError(
                f"reading {what}, field {name!r}: expected text, numbers, or lists and objects of "
                f"them, got the feature {feature}. Leave the column out with {section}.ignore: "
                f"[{name}]."
            )


def _feature_types(feature: Any) -> set[str]:
    if isinstance(feature, list):
        return set().union(*map(_feature_types, feature))
    if not isinstance(feature, dict):
        return set()
    kind = {feature["_type"]} if isinstance(feature.get("_type"), str) else set()
    return kind.union(*map(_feature_types, feature.values()))
