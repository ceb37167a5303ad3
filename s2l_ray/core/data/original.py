"""All columns of raw rows as they were, in one column `original`, and back.

A row of JSON is kept as its text, because columns cannot hold all of it: which keys a row has,
numbers of any size, values of any depth. Beside the text stands the schema of the columns that the
rows become. Rows of other formats are kept as a struct of their columns.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.core.data.formats.spans import Rows
from s2l_ray.core.data.json_text import members, object_text, texts_of
from s2l_ray.core.storage.columns import (
    converted,
    is_deeper,
    is_float,
    is_json,
    json_field,
    leaves_of,
    typed_field,
)
from s2l_ray.core.storage.parquet import parquet_bytes, schema_from_text, schema_text

NAME = "original"
# of the metadata of `original` where it is JSON text
SCHEMA_KEY = b"s2l_ray_schema"
# Keys in objects, over all rows of a part, beyond which a column is stored as JSON text.
MAX_LEAVES = 256
# Lists and objects inside each other, likewise; Arrow cannot read schemas of much more.
MAX_LEVELS = 32
# Integers up to this one are floats too.
MAX_EXACT = 1 << 53


def original_column(rows: Rows, good_N: np.ndarray) -> tuple[pa.Field, pa.Array]:
    """The good rows as they were.

    Args:
        good_N: bool, which rows are kept.
    """
    good = np.flatnonzero(good_N)
    if rows.texts is not None:
        schema = pa.schema(
            [
                _inferred(name, [column[row] for row in good])
                for name, column in rows.columns.items()
            ]
        )
        metadata = {SCHEMA_KEY: schema_text(schema).encode()}
        texts = [rows.texts[row] for row in good]
        return pa.field(NAME, pa.string(), metadata=metadata), pa.array(texts, pa.string())
    fields, arrays = [], []
    for name, column in rows.columns.items():
        array = pa.array(column) if isinstance(column, list) else column.combine_chunks()
        field, array = _stored(name, array.filter(pa.array(good_N)))
        fields.append(field)
        arrays.append(array)
    struct = pa.StructArray.from_arrays(arrays, fields=fields)
    return pa.field(NAME, struct.type), struct


def original_rows(table: pa.Table, schema: pa.Schema | None = None) -> pa.Table:
    """The original columns, in their order, of rows in the columns of `examples`. Keys that a row
    of JSON lacks are null.

    Args:
        schema: the one that all files share; the rows get its columns and types.
    """
    if NAME not in table.column_names:
        return (pa.schema([]) if schema is None else schema).empty_table()
    column = table[NAME].combine_chunks()
    if not pa.types.is_string(column.type):
        rows = pa.Table.from_struct_array(column)
        return rows if schema is None else _under(rows, schema)
    own = schema_from_text(table.schema.field(NAME).metadata[SCHEMA_KEY].decode(), "examples")
    schema = own if schema is None else schema
    texts = column.to_pylist()
    values = [json.loads(text) for text in texts]
    raw = [members(text) if any(map(is_json, schema)) else {} for text in texts]
    columns = [
        pa.array([row.get(field.name) for row in values], field.type)
        if not is_json(field)
        else _present([row.get(field.name, "null") for row in raw])
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def original_texts(table: pa.Table) -> list[str]:
    """The original rows, of rows in the columns of `examples`, each as a JSON object in one line;
    JSON as it was read."""
    if pa.types.is_string(table.schema.field(NAME).type):
        texts: list[str] = table[NAME].to_pylist()
        return texts
    rows = original_rows(table)
    columns = [_values(rows, field) for field in rows.schema]
    return [
        object_text(dict(zip(rows.column_names, row, strict=True)))
        for row in zip(*columns, strict=True)
    ]


def under_one_schema(tables: Sequence[pa.Table], text: str) -> list[pa.Table]:
    """Rows in columns of `examples`, whose original columns are one type where tables differ.

    Keys that a row of JSON lacks are then null.

    Args:
        text: the schema that all files share, as `schema_text` writes it.
    """
    kinds = {table.schema.field(NAME).type for table in tables if NAME in table.column_names}
    if len(kinds) < 2:
        return list(tables)
    made, schema = [], schema_from_text(text, "examples")
    for table in tables:
        struct = original_rows(table, schema).combine_chunks().to_struct_array()
        place = table.column_names.index(NAME)
        made.append(table.set_column(place, pa.field(NAME, struct.type), struct))
    return made


def schema_of(table: pa.Table) -> pa.Schema:
    """The schema of the original columns of rows in the columns of `examples`."""
    return original_rows(table.slice(0, 0)).schema


def _under(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Columns of one file under the schema that all files share."""
    columns: list[Any] = []
    for field in schema:
        if field.name not in rows.column_names:
            columns.append(pa.nulls(len(rows), field.type))
        elif is_json(field):
            columns.append(_present(_values(rows, rows.schema.field(field.name))))
        else:
            columns.append(converted(rows[field.name].combine_chunks(), field.type))
    return pa.table(columns, schema=schema)


def _values(rows: pa.Table, field: pa.Field) -> list[str]:
    """The JSON text of each value of a column."""
    column = rows[field.name].combine_chunks()
    return pc.fill_null(column, "null").to_pylist() if is_json(field) else texts_of(column)


def _present(texts: list[str]) -> pa.Array:
    """JSON texts as a column, in which null is null."""
    return pa.array([None if text == "null" else text for text in texts], pa.string())


def _inferred(name: str, values: list[Any]) -> pa.Field:
    """The column that holds the values as they are; JSON text where no type does."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError):
        return json_field(name)
    if not storable(array.type) or not _exact(array, values):
        return json_field(name)
    return typed_field(name, array.type, _wide(array))


def _stored(name: str, array: pa.Array) -> tuple[pa.Field, pa.Array]:
    """An Arrow column as Parquet and JSON can hold it; as JSON text where Parquet cannot."""
    if storable(array.type) and (not _has_times(array.type) or _writable(array)):
        return typed_field(name, array.type, _wide(array)), array
    return json_field(name), _present(texts_of(array))


@functools.lru_cache(maxsize=1024)
def storable(kind: pa.DataType) -> bool:
    """Whether a column of this type is kept as it is, and not as JSON text."""
    if is_deeper(kind, MAX_LEVELS) or len(leaves_of(kind)) > MAX_LEAVES:
        return False
    return _writable(pa.nulls(1, kind))


def _writable(array: pa.Array) -> bool:
    try:
        parquet_bytes(pa.table({NAME: array}))
    except pa.ArrowException:
        return False
    return True


def _has_times(kind: pa.DataType) -> bool:
    """Whether Parquet may have no room for a value of the type: it counts no seconds."""
    return any(map(pa.types.is_temporal, leaves_of(kind)))


def _exact(array: pa.Array, values: list[Any]) -> bool:
    """Whether floats stand for the numbers that were there: no `1e999`, no `true`."""
    if not any(map(is_float, leaves_of(array.type))):
        return True
    floats = [leaf for leaf in _leaf_arrays(array) if is_float(leaf.type)]
    finite = all(pc.all(pc.is_finite(leaf)).as_py() is not False for leaf in floats)
    return finite and all(_no_bool_for_float(value, array.type) for value in values)


def _no_bool_for_float(value: Any, kind: pa.DataType) -> bool:
    if isinstance(value, dict):
        return all(_no_bool_for_float(value.get(item.name), item.type) for item in kind)
    if isinstance(value, list):
        return all(_no_bool_for_float(item, kind.value_type) for item in value)
    return not (isinstance(value, bool) and is_float(kind))


def _wide(array: pa.Array) -> bool:
    """Whether an integer is one that a 64-bit float does not hold."""
    ends = [
        end
        for leaf in _leaf_arrays(array)
        if leaf.type in (pa.int64(), pa.uint64())
        for end in pc.min_max(leaf).as_py().values()
    ]
    return any(end is not None and abs(end) > MAX_EXACT for end in ends)


def _leaf_arrays(array: pa.Array) -> list[pa.Array]:
    kind = array.type
    if pa.types.is_struct(kind):
        return [leaf for item in array.flatten() for leaf in _leaf_arrays(item)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _leaf_arrays(array.flatten())
    return [array]
