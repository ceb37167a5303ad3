"""Records come back from JSON as they were, and what is no such record is named by its field."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.core.storage.records import from_bytes, from_json, to_bytes, to_json


class Place(NamedTuple):
    start: int
    end: int


@dataclass(frozen=True)
class Inner:
    name: str
    weight: float


@dataclass(frozen=True)
class Outer:
    number: int
    by_role: dict[str, Inner]
    places: list[Place] = field(default_factory=list)
    steps: tuple[int, ...] = ()
    inner: Inner | None = None
    free: dict[str, Any] = field(default_factory=dict)


INNERS = st.builds(Inner, st.text(), st.floats(allow_nan=False, allow_infinity=False))
NUMBERS = st.integers(-(2**62), 2**62)
OUTERS = st.builds(
    Outer,
    NUMBERS,
    st.dictionaries(st.text(), INNERS),
    st.lists(st.builds(Place, NUMBERS, NUMBERS)),
    st.lists(NUMBERS).map(tuple),
    st.none() | INNERS,
    st.dictionaries(st.text(), st.none() | st.text() | st.lists(NUMBERS) | st.booleans()),
)


@given(OUTERS)
def test_records_come_back_as_they_were(record: Outer) -> None:
    assert from_bytes(Outer, to_bytes(record)) == record
    assert from_json(Outer, json.loads(json.dumps(to_json(record)))) == record
    assert from_json(Outer, to_json(record)) == record


def test_nested_values_have_their_types_again() -> None:
    record = from_json(Outer, {"number": 1, "by_role": {"a": {"name": "b", "weight": 2}}})
    assert record.by_role["a"] == Inner("b", 2.0)
    assert type(from_json(Outer, to_json(Outer(1, {}, [Place(1, 2)]))).places[0]) is Place


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"by_role": {}}, "not a Outer: number: Field required"),
        ({"number": 1, "by_role": {}, "other": 2}, "other: Unexpected keyword argument, got 2"),
        ({"number": "one", "by_role": {}}, "number: Input should be a valid integer"),
        ({"number": 1, "by_role": {"a": {"name": "b"}}}, "by_role.a.weight: Field required"),
        ({"number": 1, "by_role": {}, "places": [[1]]}, "places.0"),
        ([1], "value: Input should be"),
    ],
)
def test_what_is_no_such_record_is_named_by_its_field(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match="not a Outer") as raised:
        from_json(Outer, value)
    assert words in str(raised.value)


def test_not_a_number_is_refused_and_never_written_as_null() -> None:
    for record in (Outer(1, {"a": Inner("b", math.nan)}), Outer(1, {}, free={"a": [math.inf]})):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_bytes(record)
