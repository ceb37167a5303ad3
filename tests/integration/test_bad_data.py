"""Bad data that only show once Ray reads or computes them: one error that names the thing and the
remedy, and no artifact of it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from s2l_ray import run
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import FileEntry
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.store import Store
from tests import tiny
from tests.integration.conftest import Finished

pytestmark = pytest.mark.usefixtures("local_ray")


class Case:
    """The shared finished job on a copy of its storage, to be damaged."""

    def __init__(self, finished: Finished, folder: Path) -> None:
        self.folder, self.storage = folder, folder / "storage"
        shutil.copytree(finished.folder / "storage", self.storage)
        self.job: dict[str, Any] = yaml.safe_load(finished.job.read_text())
        self.job["run"]["storage"] = str(self.storage)
        self.finished = finished

    def artifact(self, stage: str) -> Artifact:
        fingerprint = self.finished.artifact(stage).fingerprint
        return Artifact(Store(str(self.storage)), stage, fingerprint)

    def rewrite(self, stage: str, change: Callable[[bytes], bytes], wanted: str) -> str:
        """Give an artifact's file other content, with the right size and hash in the manifest."""
        artifact = self.artifact(stage)
        manifest = artifact.manifest()
        entry = next(entry for entry in manifest.data_files if wanted in entry.name)
        written = artifact.write_named(entry.name, change(artifact.read_file(entry)))
        write_with_entry(artifact, written)
        return entry.name

    def rows(self, *content: dict[str, Any]) -> None:
        """Other raw rows; everything is made anew."""
        shutil.rmtree(self.storage)
        tiny.write_jsonl(self.folder / "raw" / "a.jsonl", list(content))
        self.job["examples"]["files"] = [str(self.folder / "raw")]
        self.job["proxy"] |= {"epochs": None, "steps": 3}
        self.job["subset"]["budget"] = 5


def write_with_entry(artifact: Artifact, entry: FileEntry) -> None:
    """Write the manifest of an artifact with this entry for the file of its name."""

    def changed(old: FileEntry) -> FileEntry:
        return entry if old.name == entry.name else old

    manifest = artifact.manifest()
    parts = [
        replace(part, files={role: changed(old) for role, old in part.files.items()})
        for part in manifest.parts
    ]
    files = [changed(old) for old in manifest.files]
    artifact.write("manifest.json", replace(manifest, parts=parts, files=files).to_bytes())


@pytest.fixture
def case(finished: Finished, tmp_path: Path) -> Case:
    return Case(finished, tmp_path)


def weights_that_are_nan(case: Case) -> list[str]:
    def spoil(data: bytes) -> bytes:
        from safetensors.torch import load, save

        weights = load(data)
        weights["lm_head.weight"][7] = float("nan")
        return save(weights, {"format": "pt"})

    step = case.artifact("proxy").manifest().info["members"][0]["steps"][2]
    case.rewrite("proxy", spoil, f"step-{step:06d}/model.safetensors")
    case.job["trajectories"]["tokens_per_batch"] = 512
    return ["loss of example_id", f"the proxy at step {step}", "nan", "lower its learning_rate"]


def weights_that_are_missing(case: Case) -> list[str]:
    artifact = case.artifact("proxy")
    gone = next(
        entry for entry in artifact.manifest().files if entry.name.endswith("model.safetensors")
    )
    (case.storage / artifact.path / gone.name).unlink()
    case.job["trajectories"]["tokens_per_batch"] = 512
    return [gone.name, "missing", "Restore the file"]


def stored_losses_of_a_wrong_type(case: Case) -> list[str]:
    def spoil(data: bytes) -> bytes:
        table = pa.parquet.read_table(pa.BufferReader(data))
        place = table.column_names.index("losses")
        return parquet_bytes(
            table.set_column(place, "losses", pa.nulls(table.num_rows, pa.float64()))
        )

    case.rewrite("trajectories", spoil, "part-00002")
    case.job["clusters"]["seed"] = 9
    return ["fixed_size_list<float>", "double", "remove the artifact's folder"]


def stored_losses_that_are_infinite(case: Case) -> list[str]:
    def spoil(data: bytes) -> bytes:
        table = pa.parquet.read_table(pa.BufferReader(data))
        losses = table["losses"].combine_chunks()
        values = losses.flatten().to_numpy(zero_copy_only=False).copy()
        values[3] = np.inf
        spoiled = pa.FixedSizeListArray.from_arrays(
            pa.array(values, pa.float32()), losses.type.list_size
        )
        return parquet_bytes(
            table.set_column(table.column_names.index("losses"), "losses", spoiled)
        )

    case.rewrite("trajectories", spoil, "part-00002")
    case.job["clusters"]["seed"] = 9
    return ["finite", "inf", "example_id", "score"]


def a_manifest_that_lies_about_a_hash(case: Case) -> list[str]:
    artifact = case.artifact("clusters")
    entry = artifact.manifest().parts[1].files["data"]
    write_with_entry(artifact, replace(entry, sha256="0" * 64))
    case.job["subset"]["seed"] = 9
    return [entry.name, "expected SHA-256 0000", "Restore the file"]


def rows_that_are_all_alike(case: Case) -> list[str]:
    case.rows(*[{"instruction": "copy a", "output": "a"}] * 40)
    return ["distinct trajectories", "clusters.k = 8", "Lower clusters.k"]


def no_row_with_a_learned_token(case: Case) -> list[str]:
    case.rows(*[{"instruction": 60 * "x", "output": f"{n}"} for n in range(40)])
    return ["no learned token within max_length", "example_id", "max_length"]


def every_row_rejected(case: Case) -> list[str]:
    case.rows(*[{"instruction": "x", "output": ""}] * 40)
    case.job["examples"]["on_bad_row"] = "reject"
    return ["every row was rejected", "rejects"]


def a_budget_above_what_is_scored(case: Case) -> list[str]:
    case.job["trajectories"] |= {"sample": 0.2}
    case.job["subset"]["budget"] = 300
    return ["subset.budget asks for 300 rows", "scored", "Lower the budget"]


def a_step_that_is_not_stored(case: Case) -> list[str]:
    case.job["subset"] |= {"rule": {"score": "at(loss)"}, "at": 12_345}
    return ["subset.at", "12345", "Change subset.at"]


def a_score_that_is_no_number(case: Case) -> list[str]:
    case.job["subset"]["rule"] = {"score": "log(num_tokens - 1000)"}
    return ["NaN", "log(num_tokens - 1000)", "example_id", "Change the expression"]


def weights_of_a_wrong_number(case: Case) -> list[str]:
    case.job["clusters"]["weights"] = [1.0, 2.0]
    return ["clusters.weights", "2", "3"]


def steps_that_are_not_stored(case: Case) -> list[str]:
    case.job["clusters"]["steps"] = [1, 99_999]
    return ["clusters.steps", "99999"]


def differences_of_one_step(case: Case) -> list[str]:
    case.job["clusters"] |= {"features": "differences", "steps": 1}
    return ["differences", "steps: expected at least 2"]


def used_clusters_of_another_k(case: Case) -> list[str]:
    case.job["clusters"] |= {"use": case.artifact("clusters").uri, "k": 7}
    return ["k is 8 there and 7 here", "Set these fields of clusters"]


def a_held_out_row_without_a_learned_token(case: Case) -> list[str]:
    held_out = case.folder / "heldout" / "long.jsonl"
    tiny.write_jsonl(held_out, [{"instruction": 90 * "x", "output": "y", "source": "s"}])
    case.job["evaluation"]["files"] = [str(held_out)]
    return ["long.jsonl", "no learned token", "example_id 0", "target.max_length"]


KINDS = [
    weights_that_are_nan,
    weights_that_are_missing,
    stored_losses_of_a_wrong_type,
    stored_losses_that_are_infinite,
    a_manifest_that_lies_about_a_hash,
    rows_that_are_all_alike,
    no_row_with_a_learned_token,
    every_row_rejected,
    a_budget_above_what_is_scored,
    a_step_that_is_not_stored,
    a_score_that_is_no_number,
    weights_of_a_wrong_number,
    steps_that_are_not_stored,
    differences_of_one_step,
    used_clusters_of_another_k,
    a_held_out_row_without_a_learned_token,
]
# The stage that fails; what is made before it may stay.
MADE_BEFORE = {
    rows_that_are_all_alike: "clusters",
    no_row_with_a_learned_token: "proxy",
    a_budget_above_what_is_scored: "subset",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_it_stops_the_run_with_one_message_and_commits_nothing_of_it(
    case: Case, kind: Callable[[Case], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = kind(case)
    before = set(case.storage.rglob("manifest.json"))
    path = case.folder / "job.yaml"
    path.write_text(yaml.safe_dump(case.job))
    assert run.main(["--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said
    made = {found.parts[-3] for found in set(case.storage.rglob("manifest.json")) - before}
    stages = [
        "examples",
        "proxy",
        "trajectories",
        "clusters",
        "subset",
        "target",
        "evaluation",
        "report",
    ]
    failed = MADE_BEFORE.get(kind)
    assert not made & set(stages[stages.index(failed) :] if failed else stages), made
