"""What `init` sees of data, and the job that it writes for them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from s2l_ray import config, init, pipeline
from s2l_ray.config import load
from tests import tiny


def data(rows: int, characters: int = 100, **changes: Any) -> init.Data:
    values = {
        "rows": rows,
        "files": 1,
        "characters": np.full(min(rows, 50), characters),
        "sources": Counter(a=rows),
        "whole_conversations": False,
    }
    return init.Data(**values | changes)


def loaded(tree: dict[str, Any]) -> config.Job:
    return load(None, ["examples.files=[a.jsonl]"], tree)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 100, 999, 40_000, 262_039])
@pytest.mark.parametrize("gpus", [0, 1, 3, 8])
@pytest.mark.parametrize("model", [None, "org/name"])
def test_every_proposal_is_a_valid_job(rows: int, gpus: int, model: str | None) -> None:
    first = loaded(init.proposed(data(rows), model, 2, gpus)).first
    assert (
        first.proxy.global_batch % (first.scaling.proxy.workers * first.scaling.proxy.micro_batch)
        == 0
    )
    assert first.proxy.dtype == ("bf16" if gpus else "fp32")


def test_large_data_get_the_settings_of_the_paper() -> None:
    proxy = loaded(init.proposed(data(262_039), "org/name", 8, 4)).first.proxy
    assert (proxy.epochs, proxy.global_batch, proxy.checkpoints) == (3, 128, 12)
    assert (proxy.learning_rate, proxy.model.hub) == (2e-5, "org/name")


@pytest.mark.parametrize(
    ("characters", "model", "expected"),
    [
        (100, None, 128),
        (900, None, 1024),
        (50_000, None, 1024),
        (900, "o/n", 256),
        (10**6, "o/n", 4096),
    ],
)
def test_the_length_holds_most_rows(characters: int, model: str | None, expected: int) -> None:
    made = init.proposed(data(1000, characters), model, 2, 0)["proxy"]
    assert made["max_length"] == expected


def test_rows_lengths_and_sources_are_seen(tmp_path: Path) -> None:
    rows = tiny.rows(30)
    tiny.write_jsonl(tmp_path / "mine" / "a.jsonl", rows)
    tree = tiny.job(tmp_path, examples={"files": [str(tmp_path / "mine")]})
    seen = init.look(load(None, [], tree).first)
    assert (seen.rows, seen.files, seen.whole_conversations) == (30, 1, False)
    assert seen.sources == Counter(row["source"] for row in rows)
    expected = [len(row["instruction"]) + len(row["output"]) for row in rows]
    assert seen.characters.tolist() == expected


def test_the_job_is_written_once_and_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "raw" / "a.jsonl", tiny.rows(40))
    command = ["raw", "--clusters.k=3", "--run.name=mine"]
    assert init.main(command) == 0
    assert "wrote job.yaml" in capsys.readouterr().out
    text = (tmp_path / "job.yaml").read_text()
    assert "1 files with 40 rows" in text
    assert yaml.safe_load(text)["clusters"] == {"k": 3}
    made = config.load("job.yaml", [])
    assert (made.first.run.name, made.first.examples.files) == ("mine", ["raw"])
    assert "subset" in pipeline.plan(made, "subset").of("s2l")
    assert init.main(command) == 2
    assert "it is there already" in capsys.readouterr().err
    assert (tmp_path / "job.yaml").read_text() == text


def test_data_that_cannot_be_read_leave_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"heading": "x", "body": "y"}\n')
    assert init.main(["a.jsonl"]) == 1
    assert "examples.columns" in capsys.readouterr().err
    assert not (tmp_path / "job.yaml").exists()
