"""All columns of raw rows as they were, in one struct column, and back."""

from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.core.data.formats.spans import Rows
from s2l_ray.core.data.json_text import to_json_text
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.storage.columns import is_json, json_field
from s2l_ray.errors import UserError

# Keys in objects, over all rows of a part, beyond which a column is stored as JSON text.
MAX_LEAVES = 256


def original_column(rows: Rows, good_N: np.ndarray, part: PartRange) -> pa.StructArray:
    """All columns of the good rows in one struct.

    Args:
        good_N: bool, which rows are kept.

    Raises:
        UserError: a column whose values have several types.
    """
    good, every = np.flatnonzero(good_N), bool(good_N.all())
    fields, arrays = [], []
    for name, column in rows.columns.items():
        if isinstance(column, list):
            values = column if every else [column[row] for row in good]
            field, array = _typed(name, values, rows.numbers[good], part)
        else:
            array = (column if every else column.filter(pa.array(good_N))).combine_chunks()
            field = pa.field(name, array.type)
        fields.append(field)
        arrays.append(array)
    return pa.StructArray.from_arrays(arrays, fields=fields)


def original_rows(table: pa.Table, schema: pa.Schema | None = None) -> pa.Table:
    """The original columns, in their order, of rows in the columns of `examples`.

    Args:
        schema: the one that all files share; the rows get its columns and types.
    """
    rows = (
        pa.Table.from_struct_array(table["original"].combine_chunks())
        if "original" in table.column_names
        else pa.table({})
    )
    if schema is None:
        return rows
    for number, column in enumerate(rows.schema):
        if is_json(schema.field(column.name)) and not is_json(column):
            text = _json_texts(rows[number].to_pylist())
            rows = rows.set_column(number, json_field(column.name), text)
    return pa.concat_tables([schema.empty_table(), rows], promote_options="permissive")


def _typed(
    name: str, values: list[Any], numbers: np.ndarray, part: PartRange
) -> tuple[pa.Field, pa.Array]:
    """The values as an array of the type they all have; lists and objects that share no type, or
    one of very many keys, as JSON text."""
    try:
        array = pa.array(values)
        if not _storable(array.type):
            array = pa.array([_without_empty(value) for value in values])
        if _leaves(array.type) <= MAX_LEAVES:
            return pa.field(name, array.type), array
    except (pa.ArrowException, OverflowError) as error:
        if not all(isinstance(value, dict | list | None) for value in values):
            raise _several_types(name, values, numbers, part, error) from None
    return json_field(name), _json_texts(values)


def _json_texts(values: list[Any]) -> pa.Array:
    return pa.array(
        [None if value is None else to_json_text(value) for value in values], pa.string()
    )


def _several_types(
    name: str, values: list[Any], numbers: np.ndarray, part: PartRange, error: Exception
) -> UserError:
    """Names each type with the first row that has it."""
    first_rows = {
        type(value).__name__: number
        for value, number in zip(reversed(values), reversed(numbers.tolist()), strict=True)
        if value is not None
    }
    where = ", ".join(f"{kind} in {part.place_of(row)}" for kind, row in first_rows.items())
    return UserError(
        f"reading {part.file.uri}, field {name!r}: expected one type in all rows, got {where} "
        f"({error}). Make the field's type the same everywhere, or remove the field."
    )


def _leaves(kind: pa.DataType) -> int:
    """How many columns Parquet makes of the type."""
    return sum(_leaves(kind.field(number).type) for number in range(kind.num_fields)) or 1


def _storable(kind: pa.DataType) -> bool:
    """Whether Parquet can hold the type: it has no structs without fields."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return not (pa.types.is_struct(kind) and not inner) and all(_storable(item) for item in inner)


def _without_empty(value: Any) -> Any:
    """The value with null for every empty object."""
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items()} or None
    return [_without_empty(item) for item in value] if isinstance(value, list) else value
