"""The command line on a whole tiny job: what comes out, what is reused, and how wrong input is
told.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from s2l_ray import config, pipeline, run
from s2l_ray.core.storage.schemas import vectors
from tests import tiny
from tests.integration.conftest import TOO_LONG, Finished, Runs, shared_job, write_job

STAGES = (
    "examples",
    "proxy",
    "trajectories",
    "clusters",
    "subset",
    "target",
    "evaluation",
    "report",
)


def states(out: str) -> dict[str, str]:
    """Stage -> made or reused, as the table at the end says."""
    return dict(re.findall(r"^│\s*(\w+)\s*│[^│]*│\s*(made|reused)\s*│", out, re.MULTILINE))


def losses_of(result: Finished, fingerprint: str | None = None) -> np.ndarray:
    """All scored trajectories, in row order: float32 [n, T]."""
    artifact = result.artifact("trajectories")
    if fingerprint is not None:
        artifact = type(artifact)(artifact.store, "trajectories", fingerprint)
    tables = [artifact.read_part(part) for part in artifact.manifest().parts]
    return vectors(pa.concat_tables(tables)["losses"], "test")[1]


# ----------------------------------------------------------------------------------- what comes out


def test_first_run_makes_every_stage(finished: Finished) -> None:
    assert states(finished.ended.out) == dict.fromkeys(STAGES, "made")
    assert str(finished.artifact("subset").uri) in finished.ended.out


def test_run_record_names_artifacts_that_are_there(finished: Finished) -> None:
    record = finished.record()
    assert set(record["artifacts"]) == set(STAGES)
    for stage, entry in record["artifacts"].items():
        assert entry["uri"].endswith(f"/{stage}/{entry['fingerprint']}")
        assert finished.manifest(stage).rows == entry["rows"]
        link = finished.folder / "storage" / "runs" / "tiny" / stage
        assert link.resolve() == Path(entry["uri"])
    rows = {
        stage: record["artifacts"][stage]["rows"]
        for stage in ("examples", "trajectories", "clusters")
    }
    assert set(rows.values()) == {420 + TOO_LONG}
    assert record["artifacts"]["subset"]["rows"] == 60
    assert record["artifacts"]["evaluation"]["rows"] == 30
    assert record["config"]["s2l"]["clusters"]["k"] == 8
    assert {"ray", "torch", "deepspeed", "pyarrow"} <= set(record["versions"])


def test_manifests_say_what_they_are_made_from(finished: Finished) -> None:
    prints = {stage: finished.artifact(stage).fingerprint for stage in STAGES}
    made_from = {stage: set(finished.manifest(stage).inputs.values()) for stage in STAGES[:-1]}
    assert made_from["subset"] == {
        prints[name] for name in ("examples", "trajectories", "clusters")
    }
    assert made_from["target"] == {prints["subset"]}
    assert not made_from["examples"]


def test_no_scratch_is_left(finished: Finished) -> None:
    storage = finished.folder / "storage"
    left = [p for name in ("receipts", "state", "rounds", ".*.tmp") for p in storage.rglob(name)]
    assert left == []
    assert not list((storage / "scratch").glob("*"))


def test_report_has_its_sections(finished: Finished) -> None:
    html = (finished.folder / "storage" / "runs" / "tiny" / "report.html").read_text()
    for section in ("sources", "clusters", "proxy", "left-out", "costs", "examples", "versions"):
        assert f'<section id="{section}">' in html
    assert html.count("<img") + html.count("<svg") >= 3
    assert "no learned token within max_length" in html
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html), (
        "the report must not load anything"
    )


def test_target_loads_and_gives_the_stored_losses(finished: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = finished.artifact("target")
    folder = Path(target.uri) / target.manifest().info["model"]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    evaluation = finished.artifact("evaluation")
    stored = pa.concat_tables([evaluation.read_part(part) for part in evaluation.manifest().parts])
    held_out = [
        json.loads(line)
        for line in (finished.folder / "heldout" / "h.jsonl").read_text().splitlines()
    ]
    assert stored.num_rows == len(held_out)
    for row, loss, source in zip(
        held_out, stored["loss"].to_pylist(), stored["source"].to_pylist(), strict=True
    ):
        assert source == row["source"]
        prompt = tokenizer(row["instruction"] + "\n")["input_ids"]
        answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids[0])[None]
        with torch.inference_mode():
            assert model(ids, labels=labels).loss.item() == pytest.approx(loss, abs=1e-5)


def test_every_row_of_the_subset_is_an_original_row(finished: Finished) -> None:
    raw = {}
    for number, name in enumerate(("a", "b", "c")):
        lines = (finished.folder / "raw" / f"{name}.jsonl").read_text().splitlines()
        raw.update({(number << 40) + row: json.loads(line) for row, line in enumerate(lines)})
    subset = finished.artifact("subset")
    rows = [row for part in subset.manifest().parts for row in subset.read_part(part).to_pylist()]
    assert len({row["example_id"] for row in rows}) == 60
    for row in rows:
        row.pop("cluster")
        assert row == {"example_id": row["example_id"], **raw[row["example_id"]]}


# ----------------------------------------------------------------------------------- what is reused


def test_again_reuses_all_and_starts_no_ray(finished: Finished, runs: Runs) -> None:
    again = runs(finished.job, python=("-X", "importtime"))
    assert again.status == 0, again.err
    assert states(again.out) == dict.fromkeys(STAGES, "reused")
    assert "Ray" not in "\n".join(
        line for line in again.err.splitlines() if not line.startswith("import time")
    )
    imported = set(re.findall(r"\| +([\w.]+)$", again.err, re.MULTILINE))
    assert "s2l_ray.pipeline" in imported
    assert "ray" not in imported
    assert again.seconds < 6


def test_other_clusters_remake_what_follows(finished: Finished, runs: Runs) -> None:
    changed = runs(finished.job, "--clusters.k=7", "--run.name=k7")
    assert changed.status == 0, changed.err
    assert "started Ray on this machine" in changed.err
    expected = {stage: "reused" if stage in STAGES[:3] else "made" for stage in STAGES}
    assert states(changed.out) == expected


CHANGES = {
    "clusters.k=6": STAGES[3:],
    "subset.budget=50": STAGES[4:],
    "subset.seed=1": STAGES[4:],
    "subset.rule=random": STAGES[4:],
    "clusters.seed=1": STAGES[3:],
    "trajectories.seed=1": STAGES[2:],
    "trajectories.tokens_per_batch=77": STAGES[2:],
    "target.seed=1": STAGES[5:],
    "evaluation.max_new_tokens=3": STAGES[6:],
    "report.sample_rows=1": STAGES[7:],
    "proxy.seed=1": STAGES[1:],
    "proxy.state_every=2": (),
    "scaling.clusters.workers=7": (),
    "scaling.proxy.micro_batch=4": (),
    "examples.rows_per_part=25": STAGES,
}


@pytest.mark.parametrize(("change", "remade"), CHANGES.items(), ids=CHANGES.keys())
def test_a_change_renames_only_what_follows_from_it(
    finished: Finished, change: str, remade: tuple[str, ...]
) -> None:
    plan = pipeline.plan(config.load(str(finished.job), [f"--{change}"]))
    missing = {node.stage.name for node in plan.nodes if node.artifact.committed() is None}
    assert missing == set(remade) - ({"clusters"} if "rule=random" in change else set())


def test_a_changed_byte_of_a_raw_file_renames_everything(
    finished: Finished, tmp_path: Path
) -> None:
    job = shared_job(tmp_path)
    job["run"]["storage"] = str(finished.folder / "storage")
    same = pipeline.plan(config.load(str(write_job(tmp_path, job)), []))
    assert all(node.artifact.committed() for node in same.nodes), (
        "files are known by name and content, not by place"
    )
    path = tmp_path / "raw" / "a.jsonl"
    path.write_text(path.read_text().replace("copy", "cozy", 1))
    changed = pipeline.plan(config.load(str(write_job(tmp_path, job)), []))
    assert not any(node.artifact.committed() for node in changed.nodes)


# -------------------------------------------------------------------------------------- wrong input


def broken(folder: Path, **sections: Any) -> Path:
    return write_job(folder, tiny.job(folder, **sections))


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a job that must be refused before Ray is looked at, and gives the message."""
    # importing it would fail
    monkeypatch.setitem(sys.modules, "s2l_ray.edge.session", None)
    return lambda job, *arguments: error_of(capsys, job, *arguments)


def error_of(capsys: pytest.CaptureFixture[str], job: Path, *arguments: str) -> str:
    status = run.main(["--config", str(job), *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error:") == 1
    assert status == (2 if "reading the command line" in captured.err else 1)
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clusters.kk=3"], ["clusters.kk", "Did you mean k"]),
        (["--clusters.k=three"], ["clusters.k", "'three'"]),
        (["--proxy.global_batch=12"], ["proxy.global_batch", "multiple of", "8", "12"]),
        (["--proxy.epochs=null", "--proxy.steps=2"], ["proxy.checkpoints", "2", "3"]),
        (["--target.steps=0"], ["target.steps", "0"]),
        (["--subset.budget=0"], ["subset.budget", "0"]),
        (["--subset.budget=301"], ["subset.budget", "301", "300"]),
        (["--subset.budget=1.5"], ["subset.budget", "1.5"]),
        (["--clusters.k=301"], ["clusters.k", "301", "300"]),
        (["--examples.files=nowhere"], ["examples.files", "nowhere"]),
        (["--evaluation.files=[]"], ["evaluation.files"]),
        (["--until", "subsets"], ["--until", "subsets", "subset"]),
        (["--dryrun"], ["--dryrun"]),
    ],
    ids=lambda value: value[-1] if value and value[-1].startswith("--") else "",
)
def test_what_can_be_known_is_refused_before_any_work(
    tmp_path: Path, refused: Refused, arguments: list[str], words: list[str]
) -> None:
    message = refused(broken(tmp_path), *arguments)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("text", ["a: [", "[1, 2]", ""], ids=["no YAML", "a list", "nothing"])
def test_a_broken_job_file_is_named(tmp_path: Path, refused: Refused, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert str(path) in refused(path)


def test_a_broken_line_stops_the_run_with_its_place(tmp_path: Path, runs: Runs) -> None:
    job = broken(tmp_path, count=100)
    path = tmp_path / "raw" / "b.jsonl"
    lines = path.read_text().splitlines()
    lines[41] = '{"instruction": "cut off'
    path.write_text("\n".join(lines) + "\n")
    ended = runs(job, "--until", "examples")
    assert ended.status == 1
    errors = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "b.jsonl, line 42" in errors[0]
    assert "Traceback" not in ended.err


def test_a_request_that_leaves_no_cpu_for_reading_is_refused(tmp_path: Path, runs: Runs) -> None:
    ended = runs(broken(tmp_path, count=100), "--scaling.proxy.cpus=2", "--scaling.local_cpus=2")
    assert ended.status == 1
    errors = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "scaling.proxy.cpus" in errors[0]
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("damaged", "change"),
    [
        ("examples/*/data/part-00003-*.parquet", "--proxy.seed=9"),
        (
            "proxy/*/member-0/checkpoint/step-000000/model.safetensors",
            "--trajectories.tokens_per_batch=99",
        ),
        ("trajectories/*/data/part-00003-*.parquet", "--clusters.seed=9"),
        ("clusters/*/data/part-00003-*.parquet", "--subset.seed=9"),
    ],
    ids=["read by training", "read by scorers", "read by shards", "read by tasks"],
)
def test_a_damaged_file_is_noticed_and_named(
    finished: Finished, tmp_path: Path, runs: Runs, damaged: str, change: str
) -> None:
    """One changed byte, wherever the file is read: one error with its name, and no waiting for
    attempts that cannot help.
    """
    storage = tmp_path / "storage"
    shutil.copytree(finished.folder / "storage", storage)
    for path in storage.glob(damaged):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    ended = runs(finished.job, f"--run.storage={storage}", change, "--until=subset")
    assert ended.status == 1
    errors = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, ended.err
    assert Path(damaged).name.split("*")[0] in errors[0]
    assert "SHA-256" in errors[0]
    assert "Traceback" not in ended.err


# ------------------------------------------------------------------------------ workers and proxies


def test_an_ensemble_of_two_families_on_two_workers_each(
    finished: Finished, runs: Runs, tmp_path: Path
) -> None:
    """Proxies of different family, size, tokenizer and number of checkpoints stand side by side;
    two workers see the same global batches, so member 0 equals the shared run's proxy."""
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer")
    other = {"model": {"config": tiny.GPT_NEOX}, "tokenizer": str(tokenizer), "checkpoints": 2}
    overrides = (
        f"--proxy.members={json.dumps([{}, other])}",
        "--scaling.proxy.workers=2",
        "--run.name=ensemble",
        "--subset.rule=high_learnability",
        "--until=subset",
    )
    ended = runs(finished.job, *overrides)
    assert ended.status == 0, ended.err
    record = json.loads(
        (finished.folder / "storage" / "runs" / "ensemble" / "run.json").read_text()
    )
    name = record["artifacts"]["trajectories"]["fingerprint"]
    both, alone = losses_of(finished, name), losses_of(finished)
    columns = alone.shape[1]
    assert both.shape == (alone.shape[0], columns + 3)
    np.testing.assert_allclose(both[:, :columns], alone, atol=1e-4)
    unlike = abs(both[:, columns].mean() - np.log(tiny.GPT_NEOX["vocab_size"]))
    assert unlike < 0.5, "a new model knows nothing of its own vocabulary"
