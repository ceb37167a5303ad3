"""One schema for the columns of several raw files: plain types, common types, JSON text."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Of the metadata of a field: how its values stand in the column.
KEY = b"s2l_ray"
JSON, WIDE = b"json", b"wide"


def unify(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for the columns of several files.

    Missing columns become nulls. Where no type holds the values of both of two types as they are,
    the column becomes JSON text.
    """
    fields: dict[str, pa.Field] = {}
    for schema in schemas:
        for column in schema:
            known = fields.get(column.name)
            fields[column.name] = column if known is None else _fitting(known, column)
    return pa.schema(list(fields.values()))


def _fitting(one: pa.Field, other: pa.Field) -> pa.Field:
    """The column that holds the values of both."""
    if pa.types.is_null(one.type):
        return other
    if pa.types.is_null(other.type):
        return one
    if is_json(one) or is_json(other):
        return json_field(one.name)
    kind = common_type(one.type, other.type)
    wide = is_wide(one) or is_wide(other)
    if kind is None or (wide and one.type != other.type and any(map(is_float, leaves_of(kind)))):
        return json_field(one.name)
    return typed_field(one.name, kind, wide)


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both as they are, integers up to 2^53 where floats are;
    None where there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    both = (one, other)
    if all(map(pa.types.is_integer, both)):
        return _common_integer(one, other)
    if all(pa.types.is_integer(kind) or is_float(kind) for kind in both):
        return pa.float64()
    if all(map(_is_string, both)):
        return pa.large_string()
    if all(map(_is_list, both)):
        item = common_type(one.value_type, other.value_type)
        to_list = pa.large_list if any(map(pa.types.is_large_list, both)) else pa.list_
        return None if item is None else to_list(item)
    if all(map(pa.types.is_struct, both)):
        return _common_struct(one, other)
    return None


def _common_integer(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if pa.types.is_signed_integer(one) == pa.types.is_signed_integer(other):
        return max(one, other, key=lambda kind: kind.bit_width)
    unsigned = one if pa.types.is_unsigned_integer(one) else other
    return None if unsigned == pa.uint64() else pa.int64()


def _common_struct(one: pa.StructType, other: pa.StructType) -> pa.DataType | None:
    types = {item.name: item.type for item in one}
    for item in other:
        known = types.get(item.name, pa.null())
        found = common_type(known, item.type)
        if found is None:
            return None
        types[item.name] = found
    return pa.struct(list(types.items()))


def is_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def leaves_of(kind: pa.DataType) -> list[pa.DataType]:
    """The types of the columns that Parquet makes of a type."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return [leaf for item in inner for leaf in leaves_of(item)] if inner else [kind]


def is_deeper(kind: pa.DataType, levels: int) -> bool:
    """Whether more lists and structs than `levels` lie inside each other in a type."""
    if not levels:
        return bool(kind.num_fields)
    return any(is_deeper(kind.field(number).type, levels - 1) for number in range(kind.num_fields))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views, whose values few kernels take."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
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
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    kind = plain_type(column.type)
    if column.type == kind:
        return column
    # whose values may be views, which a cast of the whole does not take
    if pa.types.is_dictionary(column.type):
        return pa.chunked_array([_decoded(chunk, kind) for chunk in column.chunks], kind)
    # A cast keeps what lies between the values of list views, and then they cannot be joined.
    if pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type):
        chunks = [pa.array(chunk.to_pylist(), kind) for chunk in column.chunks]
        return pa.chunked_array(chunks, kind)
    return column.cast(kind)


def _decoded(chunk: pa.DictionaryArray, kind: pa.DataType) -> pa.Array:
    return chunk.dictionary.cast(kind).take(chunk.indices)


def converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array in another type that holds all of its values; structs may get fields.

    Arrow's own cast makes invalid arrays of structs with a field that is null in all rows.
    """
    if array.type == kind:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if pa.types.is_struct(kind):
        children = [
            converted(array.field(array.type.get_field_index(item.name)), item.type)
            if item.name in array.type.names
            else pa.nulls(len(array), item.type)
            for item in kind
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        large = pa.types.is_large_list(kind)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return (pa.LargeListArray if large else pa.ListArray).from_arrays(
            pa.array(ends, pa.int64() if large else pa.int32()),
            converted(array.flatten(), kind.value_type),
            type=kind,
            mask=array.is_null(),
        )
    return array.cast(kind)


def json_field(name: str) -> pa.Field:
    """A column of JSON text, for values that have no one type in all rows."""
    return pa.field(name, pa.string(), metadata={KEY: JSON})


def is_json(field: pa.Field) -> bool:
    """Whether a column's text stands for the values it was written from, as in JSON exports."""
    return _mark(field) == JSON


def typed_field(name: str, kind: pa.DataType, wide: bool) -> pa.Field:
    """A column of a type; `wide` marks integers that a 64-bit float does not hold."""
    return pa.field(name, kind, metadata={KEY: WIDE} if wide else None)


def is_wide(field: pa.Field) -> bool:
    return _mark(field) == WIDE


def _mark(field: pa.Field) -> bytes | None:
    return (field.metadata or {}).get(KEY)
