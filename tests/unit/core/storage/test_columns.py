"""Columns of several files under one schema."""

from typing import Any

import pyarrow as pa
import pytest

from s2l_ray.core.storage.columns import json_field, unify
from s2l_ray.errors import UserError


def schema(**types: Any) -> pa.Schema:
    return pa.schema(list(types.items()))


def test_columns_of_several_files_are_unified() -> None:
    one = schema(a=pa.int64(), b=pa.string(), c=pa.null(), d=pa.struct([("x", pa.int64())]))
    two = schema(
        a=pa.float64(), c=pa.list_(pa.string()), d=pa.struct([("y", pa.string())]), e=pa.bool_()
    )
    found = unify([("one", one), ("two", two), ("one again", one)])
    assert found.names == ["a", "b", "c", "d", "e"]
    assert found.field("a").type == pa.float64()
    assert found.field("c").type == pa.list_(pa.string())
    assert found.field("d").type == pa.struct([("x", pa.int64()), ("y", pa.string())])


@pytest.mark.parametrize("other", [pa.string(), pa.list_(pa.int64()), pa.bool_()])
def test_columns_that_do_not_fit_are_named_with_both_files(other: pa.DataType) -> None:
    fine = schema(b=pa.string())
    with pytest.raises(
        UserError, match=r"field 'a' of three does not fit that of two .*remove the field"
    ):
        unify([("one", fine), ("two", schema(a=pa.int64())), ("three", schema(a=other))])
    with pytest.raises(UserError, match=r"field 'a' of two does not fit that of one"):
        unify([("one", pa.schema([json_field("a")])), ("two", schema(a=pa.int64()))])
