"""Columns of several files under one schema."""

from typing import Any

import pyarrow as pa
import pytest

from s2l_ray.core.storage.columns import is_json, json_field, typed_field, unify


def schema(**types: Any) -> pa.Schema:
    return pa.schema(list(types.items()))


def test_columns_of_several_files_are_unified() -> None:
    one = schema(a=pa.int64(), b=pa.string(), c=pa.null(), d=pa.struct([("x", pa.int64())]))
    two = schema(
        a=pa.float64(), c=pa.list_(pa.string()), d=pa.struct([("y", pa.string())]), e=pa.bool_()
    )
    found = unify([one, two, one])
    assert found.names == ["a", "b", "c", "d", "e"]
    assert found.field("a").type == pa.float64()
    assert found.field("c").type == pa.list_(pa.string())
    assert found.field("d").type == pa.struct([("x", pa.int64()), ("y", pa.string())])


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (pa.int64(), pa.string(), None),
        (pa.int64(), pa.list_(pa.int64()), None),
        (pa.int64(), pa.bool_(), None),
        (pa.bool_(), pa.float64(), None),
        (pa.int8(), pa.int32(), pa.int32()),
        (pa.uint32(), pa.int32(), pa.int64()),
        (pa.uint64(), pa.int64(), None),
        (pa.int32(), pa.float32(), pa.float64()),
        (pa.float16(), pa.float32(), pa.float64()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.list_(pa.int64(), 2), pa.list_(pa.float64()), pa.list_(pa.float64())),
        (pa.list_(pa.int64()), pa.list_(pa.string()), None),
        (pa.timestamp("s"), pa.timestamp("ns"), None),
        (pa.decimal128(38, 0), pa.decimal128(38, 10), None),
        (pa.struct([("x", pa.int64())]), pa.struct([("x", pa.string())]), None),
    ],
)
def test_two_types_become_one_that_holds_the_values_of_both_or_json_text(
    one: pa.DataType, other: pa.DataType, common: pa.DataType | None
) -> None:
    for pair in ((one, other), (other, one)):
        field = unify([schema(a=kind) for kind in pair]).field("a")
        assert is_json(field) == (common is None)
        assert field.type == (common or pa.string())
    assert is_json(unify([pa.schema([json_field("a")]), schema(a=pa.string())]).field("a"))


def test_integers_that_floats_do_not_hold_stay_integers_or_become_json_text() -> None:
    wide = pa.schema([typed_field("a", pa.int64(), True)])
    assert unify([wide, schema(a=pa.int64())]).field("a").type == pa.int64()
    for schemas in ([wide, schema(a=pa.float64())], [schema(a=pa.float64()), wide]):
        assert is_json(unify(schemas).field("a"))
    small = schema(a=pa.int64())
    assert is_json(unify([wide, small, schema(a=pa.float64())]).field("a"))
    assert unify([small, schema(a=pa.float64())]).field("a").type == pa.float64()
