"""The table of what becomes of the columns: of the plan, on the console, and of the report."""

from pathlib import Path

import pytest

from s2l_ray import run
from s2l_ray.core.report.data import ReportData
from s2l_ray.core.report.page import render
from tests import tiny


def test_a_dry_run_says_what_becomes_of_every_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows = [{"question": "q", "context": "i", "answer": "a", "[b]id[/b]": n} for n in range(300)]
    for name in ("a", "b"):
        tiny.write_jsonl(tmp_path / "raw" / f"{name}.jsonl", rows)
    arguments = [
        f"--run.storage={tmp_path / 'storage'}",
        f"--examples.files={tmp_path / 'raw'}",
        "--examples.ignore=[context]",
        "--until=examples",
        "--dry-run",
    ]
    assert run.main(arguments) == 0
    lines = [line.split("\u2502")[1:5] for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 4]
    both = "a.jsonl and 1 more"
    assert ["examples", "question", "instruction", both] in cells
    assert ["examples", "answer", "output", both] in cells
    assert ["examples", "context", "left out (examples.ignore)", both] in cells
    assert ["examples", "[b]id[/b]", "kept only as data", both] in cells


def test_the_report_says_it_too() -> None:
    columns = {"<q>": ["instruction"], "id": ["kept only as data", "source"]}
    page = render(ReportData(run="r", created="now", num_examples=1, columns=columns))
    assert '<td><code>&lt;q&gt;</code></td><td class="text">instruction</td>' in page
    assert "kept only as data, source" in page
