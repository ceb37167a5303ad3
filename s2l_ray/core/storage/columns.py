"""One schema for the columns of several raw files: plain types, common types, JSON text."""

from collections.abc import Iterable

import pyarrow as pa

from s2l_ray.errors import UserError

JSON_KEY = b"s2l_ray"  # of the metadata of a column of JSON text


def unify(schemas: Iterable[tuple[str, pa.Schema]]) -> pa.Schema:
    """One schema for the columns of several files.

    Missing columns become nulls, integers may become floats, and lists and objects that do not
    fit become JSON text.

    Args:
        schemas: file name and schema.

    Raises:
        UserError: two files that do not fit, by their names.
    """
    fields: dict[str, pa.Field] = {}
    seen: dict[pa.Schema, str] = {}
    for name, schema in schemas:
        if schema in seen:
            continue
        for column in schema:
            try:
                fields[column.name] = _fitting(fields.get(column.name), column)
            except pa.ArrowException as error:
                other = next(
                    (n for s, n in seen.items() if not _fit(s, column)), "the files before it"
                )
                raise UserError(
                    f"unifying the columns of all files: field {column.name!r} of {name} does not "
                    f"fit that of {other} ({error}). Make the field's type the same in all files, "
                    "or remove the field."
                ) from None
        seen[schema] = name
    return pa.schema(list(fields.values()))


def _fitting(one: pa.Field | None, other: pa.Field) -> pa.Field:
    """The column that holds the values of both."""
    if one is None or pa.types.is_null(one.type):
        return other
    if pa.types.is_null(other.type):
        return one
    as_json = all(is_json(field) or pa.types.is_nested(field.type) for field in (one, other))
    if as_json and (is_json(one) or is_json(other)):
        return json_field(one.name)
    try:
        if is_json(one) or is_json(other):
            raise pa.ArrowTypeError(
                f"Unable to merge: lists or objects vs {one.type} and {other.type}"
            )
        return pa.unify_schemas(
            [pa.schema([one]), pa.schema([other])], promote_options="permissive"
        ).field(0)
    except pa.ArrowException:
        if as_json:
            return json_field(one.name)
        raise


def _fit(schema: pa.Schema, column: pa.Field) -> bool:
    try:
        _fitting(schema.field(column.name) if column.name in schema.names else None, column)
    except pa.ArrowException:
        return False
    return True


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views, whose values few kernels take."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(item.name, plain_type(item.type)) for item in kind])
    return kind


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column in its `plain_type`."""
    kind = plain_type(column.type)
    if column.type == kind:
        return column
    if pa.types.is_dictionary(
        column.type
    ):  # whose values may be views, which a cast of the whole does not take
        return pa.chunked_array([_decoded(chunk, kind) for chunk in column.chunks], kind)
    return column.cast(kind)


def _decoded(chunk: pa.DictionaryArray, kind: pa.DataType) -> pa.Array:
    return chunk.dictionary.cast(kind).take(chunk.indices)


def json_field(name: str) -> pa.Field:
    """A column of JSON text, for objects and lists whose values have no one type in all rows."""
    return pa.field(name, pa.string(), metadata={JSON_KEY: b"json"})


def is_json(field: pa.Field) -> bool:
    """Whether a column's text stands for the values it was written from, as in JSON exports."""
    return JSON_KEY in (field.metadata or {})
