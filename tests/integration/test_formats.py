"""`examples` of a folder with every format has the conversations and original values of `examples`
of one file of lines."""

import json
from pathlib import Path
from typing import Any

import yaml

from s2l_ray.core.data.original import original_rows
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.store import Store
from tests import tiny
from tests.integration.conftest import Runs
from tests.unit.core.data.test_formats import WRITERS

ROWS_PER_FILE = 30


def job_of(folder: Path, name: str, raw: Path) -> Path:
    job = tiny.job(folder, examples={"files": [str(raw)], "rows_per_part": 8})
    job["run"]["name"] = name
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def examples(folder: Path, name: str) -> tuple[Artifact, Manifest]:
    record = json.loads((folder / "storage" / "runs" / name / "run.json").read_text())
    artifact = Artifact(
        Store(str(folder / "storage")), "examples", record["artifacts"]["examples"]["fingerprint"]
    )
    return artifact, artifact.manifest()


def facts(artifact: Artifact, manifest: Manifest) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for table in map(artifact.read_part, manifest.parts):
        columns = (table[name].to_pylist() for name in ("source", "messages", "tools"))
        found += zip(*columns, original_rows(table).to_pylist(), strict=True)
    return found


def test_a_folder_of_every_format_is_one_data_set(tmp_path: Path, runs: Runs) -> None:
    names = sorted(WRITERS)
    rows = tiny.rows(ROWS_PER_FILE * len(names), seed=7)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, name in enumerate(names):
        own = rows[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE]
        (mixed / name).write_bytes(WRITERS[name](own))
    tiny.write_jsonl(tmp_path / "lines" / "all.jsonl", rows)

    made = {}
    for name, raw in (("mixed", mixed), ("lines", tmp_path / "lines")):
        ended = runs(job_of(tmp_path, name, raw), "--until=examples")
        assert ended.status == 0, ended.err
        made[name] = examples(tmp_path, name)
    assert facts(*made["mixed"]) == facts(*made["lines"])
    manifest = made["mixed"][1]
    assert [file["name"] for file in manifest.info["files"]] == names
    assert all(len(file["sha256"]) == 64 and file["bytes"] for file in manifest.info["files"])
    assert manifest.info["sources"] == made["lines"][1].info["sources"]
    assert [part.rows for part in manifest.parts] == [8, 8, 8, 6] * len(names)


def test_a_bad_row_of_a_compressed_file_stops_the_run_and_the_parts_before_it_stay(
    tmp_path: Path, runs: Runs
) -> None:
    rows = tiny.rows(80)
    raw = tmp_path / "bad"
    raw.mkdir()
    (raw / "a.jsonl.gz").write_bytes(
        WRITERS["a.jsonl.gz"]([*rows[:35], {**rows[35], "output": 5}, *rows[36:]])
    )
    job = job_of(tmp_path, "bad", raw)
    ended = runs(job, "--until=examples")
    assert ended.status != 0
    assert "a.jsonl.gz, line 36: field 'output': expected text, got int" in ended.err
    assert not list((tmp_path / "storage").rglob("manifest.json"))
    receipts = sorted(path.name for path in (tmp_path / "storage").rglob("receipts/part-*.json"))
    assert receipts == [f"part-{number:05d}.json" for number in range(4)]

    again = runs(job, "--until=examples", "--examples.on_bad_row=reject")
    assert again.status == 0, again.err
    assert examples(tmp_path, "bad")[1].info["rejects"] == {
        "field 'output': expected text, got int": 1
    }
