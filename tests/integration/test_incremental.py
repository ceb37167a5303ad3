"""A data set that grows: old rows keep ids, losses and clusters; only new parts are read and
scored; missing files are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.store import Store
from tests import tiny
from tests.integration.conftest import Ended, Runs, write_job

# Sorts before all old files, so that numbers by name would be wrong.
NEW_FIRST = "aaa.jsonl"


class Growing:
    """A job on two files, run once; its files, and further runs that extend it."""

    def __init__(self, folder: Path, runs: Runs) -> None:
        self.folder, self.runs = folder, runs
        self.tree = tiny.job(folder, count=200, target=None, evaluation=None)
        self.tree["clusters"] = {"k": 5, "within": "all"}
        self.first = self.artifacts(self.run())

    def run(self, *overrides: str, name: str = "tiny") -> Ended:
        job = write_job(
            self.folder / name, {**self.tree, "run": {**self.tree["run"], "name": name}}
        )
        return self.runs(job, *overrides)

    def artifacts(self, ended: Ended, name: str = "tiny") -> dict[str, Artifact]:
        assert ended.status == 0, ended.err
        record = json.loads((self.folder / "storage" / "runs" / name / "run.json").read_text())
        store = Store(str(self.folder / "storage"))
        return {
            stage: Artifact(store, stage, made["fingerprint"])
            for stage, made in record["artifacts"].items()
        }

    def extend(self, *overrides: str, name: str) -> Ended:
        used = {"examples.extends": "examples", "proxy.use": "proxy", "clusters.use": "clusters"}
        fields = [f"--{field}={self.first[stage].uri}" for field, stage in used.items()]
        return self.run(*fields, *overrides, name=name)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory, runs: Runs) -> Growing:
    made = Growing(tmp_path_factory.mktemp("growing"), runs)
    tiny.write_jsonl(made.folder / "raw" / NEW_FIRST, tiny.rows(70, seed=9))
    return made


@pytest.fixture(scope="module")
def extended(growing: Growing) -> dict[str, Artifact]:
    return growing.artifacts(growing.extend(name="more"), "more")


def rows(artifact: Artifact, columns: list[str]) -> dict[int, dict[str, Any]]:
    """Rows by example_id, in the order of the parts."""
    tables = [artifact.read_part(part, columns) for part in artifact.manifest().parts]
    return {row["example_id"]: row for row in pa.concat_tables(tables).to_pylist()}


@pytest.mark.parametrize(
    ("stage", "columns"),
    [
        ("examples", ["example_id", "source", "messages", "original"]),
        ("trajectories", ["example_id", "losses", "reason"]),
        ("clusters", ["example_id", "cluster", "distance"]),
    ],
)
def test_old_rows_are_as_they_were(
    growing: Growing, extended: dict[str, Artifact], stage: str, columns: list[str]
) -> None:
    before, after = rows(growing.first[stage], columns), rows(extended[stage], columns)
    assert len(after) == len(before) + 70
    assert {example_id: after[example_id] for example_id in before} == before


@pytest.mark.parametrize("stage", ["examples", "trajectories"])
def test_only_parts_of_new_files_are_made(
    growing: Growing, extended: dict[str, Artifact], stage: str
) -> None:
    old, new = growing.first[stage].manifest(), extended[stage].manifest()
    hashes = [part.files["data"].sha256 for part in old.parts]
    assert [part.files["data"].sha256 for part in new.parts[: len(old.parts)]] == hashes
    assert new.parts_made_by(old.run) == len(old.parts)
    assert new.parts_made_by(new.run) == len(new.parts) - len(old.parts) > 0


def test_the_files_and_what_is_new_are_recorded(
    growing: Growing, extended: dict[str, Artifact]
) -> None:
    info = extended["examples"].manifest().info
    assert [(file["number"], file["name"]) for file in info["files"]] == [
        (0, "a.jsonl"),
        (1, "b.jsonl"),
        (2, NEW_FIRST),
    ]
    assert (info["new_files"], info["dropped_files"], info["next_file_number"]) == (
        [NEW_FIRST],
        [],
        3,
    )
    assert extended["proxy"].fingerprint == growing.first["proxy"].fingerprint
    report = (growing.folder / "storage" / "runs" / "more" / "report.html").read_text()
    assert NEW_FIRST in report


def test_kept_centroids_are_those_of_the_base_and_refined_ones_move(
    growing: Growing, extended: dict[str, Artifact]
) -> None:
    def clusters(artifacts: dict[str, Artifact]) -> Manifest:
        return artifacts["clusters"].manifest()

    base, kept = clusters(growing.first), clusters(extended)
    assert kept.info["centroids"] == base.info["centroids"]
    assert kept.info["moved"]["changed"] == 0
    assert kept.info["moved"]["new_rows"] == 70
    refined = clusters(
        growing.artifacts(growing.extend("--clusters.refine=true", name="refined"), "refined")
    )
    assert refined.info["centroids"] != base.info["centroids"]
    assert refined.info["objective"] <= kept.info["objective"]


def test_an_extended_data_set_can_be_extended(
    growing: Growing, extended: dict[str, Artifact]
) -> None:
    tiny.write_jsonl(growing.folder / "raw" / "zzz.jsonl", tiny.rows(5, seed=10))
    try:
        again = growing.extend(f"--examples.extends={extended['examples'].uri}", name="again")
        made = growing.artifacts(again, "again")["trajectories"].manifest()
    finally:
        (growing.folder / "raw" / "zzz.jsonl").unlink()
    assert made.parts_made_by(made.run) == 1


def removed(raw: Path) -> str:
    (raw / "a.jsonl").unlink()
    return "1 of its files is gone (a.jsonl)"


def changed(raw: Path) -> str:
    tiny.write_jsonl(raw / "b.jsonl", tiny.rows(100, seed=11))
    return "1 of its files is changed (b.jsonl)"


@pytest.mark.parametrize("change", [removed, changed])
def test_lost_files_stop_the_run_or_are_dropped_by_config(
    growing: Growing, change: Callable[[Path], str]
) -> None:
    raw = growing.folder / "raw"
    saved = {path: path.read_bytes() for path in raw.iterdir()}
    try:
        said = change(raw)
        stopped = growing.extend(name="stopped")
        assert stopped.status == 1
        assert said in stopped.err
        assert "Ray" not in stopped.err
        dropped = growing.artifacts(
            growing.extend("--examples.on_changed_file=drop", name="dropped"), "dropped"
        )
    finally:
        for path, content in saved.items():
            path.write_bytes(content)
    info = dropped["examples"].manifest().info
    lost = said.split("(")[1].removesuffix(")")
    assert info["dropped_files"] == [lost]
    old_number = {"a.jsonl": 0, "b.jsonl": 1}[lost]
    assert old_number not in {
        example_id >> 40 for example_id in rows(dropped["trajectories"], ["example_id"])
    }
