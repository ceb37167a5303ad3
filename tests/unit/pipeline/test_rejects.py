"""Rows that are left out are told: how many, which, and where they are listed."""

import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from s2l_ray import config, pipeline
from s2l_ray.core.storage.info import ExamplesInfo, info_of
from s2l_ray.errors import UserError
from tests import inline_ray, tiny


def made(folder: Path, bad: int, count: int, **examples: Any) -> pipeline.Done:
    """The examples of a job with so many bad rows at the end of its rows."""
    job = tiny.job(folder, evaluation=None)
    rows = [{"instruction": "q", "output": "a" if n < count - bad else None} for n in range(count)]
    path = tiny.write_jsonl(folder / "raw" / "x.jsonl", rows)
    job["examples"] = {"files": str(path), "rows_per_part": 8, "on_bad_row": "reject", **examples}
    plan = pipeline.plan(config.load(None, [], job), "examples")
    with inline_ray.used():
        return pipeline.run(plan)[0]


def test_the_first_rejected_rows_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "s2l_ray"):
        done = made(tmp_path, 5, 100)
    (said,) = (record.getMessage() for record in caplog.records if "left out" in record.message)
    reason = "field 'output': expected text, got a value that is null or missing"
    places = [f"x.jsonl row {row}: {reason}" for row in (96, 97, 98)]
    assert f"5 of 100 rows are left out; the first: {'; '.join(places)}. They are listed" in said
    table = pq.read_table(said.rpartition("as in ")[2])
    assert table["row"].to_pylist() == [96]
    info = info_of(done.manifest, ExamplesInfo)
    assert info.places == {reason: ["x.jsonl:96", "x.jsonl:97", "x.jsonl:98"]}


@pytest.mark.parametrize(("bad", "most"), [(11, 0.1), (1, 0.0), (51, 0.5)])
def test_more_bad_rows_than_allowed_stop_the_run(tmp_path: Path, bad: int, most: float) -> None:
    with pytest.raises(UserError, match=rf"{bad} of 100 rows .* examples.most_rejects = {most:g} "):
        made(tmp_path, bad, 100, most_rejects=most)
    assert not list((tmp_path / "storage" / "examples").glob("*/manifest.json"))


def test_as_many_bad_rows_as_allowed_do_not(tmp_path: Path) -> None:
    assert made(tmp_path, 10, 100).manifest.rows == 90


def test_rows_that_a_label_leaves_out_are_no_bad_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = tiny.job(tmp_path, evaluation=None)
    rows = [{"instruction": "q", "output": "a", "label": n % 2 == 0} for n in range(200)]
    path = tiny.write_jsonl(tmp_path / "raw" / "x.jsonl", rows)
    job["examples"] = {"files": str(path), "columns": {"label": "label"}}
    plan = pipeline.plan(config.load(None, [], job), "examples")
    with inline_ray.used(), caplog.at_level(logging.WARNING, "s2l_ray"):
        assert pipeline.run(plan)[0].manifest.rows == 100
    assert "100 of 200 rows are left out" in caplog.text


def test_files_passed_over_stand_in_the_report_and_credentials_do_not(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, target=None, evaluation=None)
    (tmp_path / "raw" / "NOTES.text").write_text("x")
    plan = pipeline.plan(config.load(None, [], job))
    assert list(plan.passed_over) == ["examples"]
    plan.passed_over["evaluation"] = {"s3://KEY:SECRET@bucket/x.md": "empty"}
    # The report of the examples alone.
    examples, *_, report = plan.nodes
    report.inputs = {"s2l/examples": examples.artifact}
    plan.nodes = [examples, report]
    with inline_ray.used():
        _, done = pipeline.run(plan, only={examples.label, report.label})
    page = report.artifact.read_file(done.manifest.files[0]).decode()
    assert "NOTES.text" in page
    assert "no kind of file that is read" in page
    assert "bucket/x.md" in page
    assert "SECRET" not in page
