"""Columns that a job ignores are in no row, whatever they hold."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from s2l_ray.config import Columns, Evaluation, Examples
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.data.original import original_rows
from s2l_ray.core.data.read import PartRows, read_part
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from tests.unit.core.data.raw import GOOD, lines, parquet, parts_of


def read(path: Path, *ignore: str) -> PartRows:
    (part,) = parts_of(path)
    return read_part(part, Columns(), ignore=ignore)


@pytest.mark.parametrize("values", [[1, "two"], [{"a": 1}, [1]], [None, 2**70], [{}, {}]])
def test_an_ignored_column_may_hold_anything(tmp_path: Path, values: list[Any]) -> None:
    rows = [{**GOOD, "n": number, "odd": value} for number, value in enumerate(values)]
    table = read(lines(tmp_path / "x.jsonl", *rows), "odd", "absent").table
    assert original_rows(table).to_pylist() == [{**GOOD, "n": 0}, {**GOOD, "n": 1}]


def test_columns_that_the_subset_adds_itself_can_be_ignored(tmp_path: Path) -> None:
    row = {**GOOD, "example_id": 1, "cluster": 2}
    path = lines(tmp_path / "x.jsonl", row)
    with pytest.raises(UserError, match=r"'example_id'.*leave it out with examples.ignore"):
        read(path)
    assert original_rows(read(path, "example_id", "cluster").table).to_pylist() == [GOOD]


def test_planning_leaves_out_what_is_ignored(tmp_path: Path) -> None:
    for name, value in (("a", "text"), ("b", 1)):
        columns = {key: [text] for key, text in GOOD.items()}
        parquet(tmp_path / "raw" / f"{name}.parquet", {**columns, "cluster": [value]})
    raw = RawFiles(Store(str(tmp_path / "storage")), assume=False)
    with pytest.raises(UserError, match="'cluster'"):
        raw.ranges(Examples(files=[str(tmp_path / "raw")]), "examples")
    for section in (Examples, Evaluation):
        given = section(files=[str(tmp_path / "raw")], ignore=["cluster"])
        assert len(raw.ranges(given, "examples")) == 2


def test_arrow_columns_are_left_out_as_others_are(tmp_path: Path) -> None:
    columns = {key: [text] for key, text in GOOD.items()}
    path = parquet(tmp_path / "x.parquet", {**columns, "odd": pa.array([2**63], pa.uint64())})
    assert original_rows(read(path, "odd").table).column_names == list(GOOD)


@pytest.mark.parametrize("section", [Examples, Evaluation])
def test_a_column_is_read_or_ignored_but_not_both(section: type[Examples | Evaluation]) -> None:
    with pytest.raises(ValueError, match=r"in columns or in ignore; \['q'\] are in both"):
        section.model_validate(
            {"columns": {"instruction": "q", "output": "a"}, "ignore": ["q", "meta"]}
        )
    kept = section.model_validate({"columns": {"content": "q"}, "ignore": ["q"]})
    assert kept.ignore == ["q"]


@pytest.mark.parametrize("kind", [Examples, Evaluation])
def test_a_name_to_ignore_that_no_file_has_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[Examples | Evaluation]
) -> None:
    (tmp_path / "raw").mkdir()
    lines(tmp_path / "raw" / "x.jsonl", {**GOOD, "meta": 1})
    lines(tmp_path / "raw" / "y.jsonl", {**GOOD, "odd": 1})
    raw = RawFiles(Store(str(tmp_path / "storage")), assume=False)
    name = "examples" if kind is Examples else "evaluation"
    raw.ranges(kind(files=[str(tmp_path / "raw")], ignore=["meta", "odd"]), name)
    assert not caplog.records
    raw.ranges(kind(files=[str(tmp_path / "raw")], ignore=["meta", "mta"]), name)
    (record,) = caplog.records
    assert f"{name}.ignore names 'mta', which no file has" in record.message
    assert "'meta', 'odd'" in record.message
