"""The sweep: Ray Tune trials over clusters.k that share every earlier artifact."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import Finished


def test_trials_share_what_they_do_not_touch(finished: Finished) -> None:
    command = [
        sys.executable,
        "-m",
        "s2l_ray.sweep",
        "--config",
        str(finished.job),
        "--until",
        "subset",
    ]
    storage = finished.folder / "storage"
    before = {
        stage: len(list((storage / stage).iterdir()))
        for stage in ("examples", "proxy", "trajectories")
    }
    relative = ["--run.storage=storage", "--examples.files=[raw]", "--evaluation.files=[heldout]"]
    done = subprocess.run(
        [*command, *relative, "--over", "clusters.k=[2, 4, 8]"],
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=finished.folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((storage / "runs" / "tiny-sweep" / "sweep.json").read_text())
    assert [row["clusters.k"] for row in rows] == [2, 4, 8]
    record = json.loads((storage / "runs" / "tiny-sweep" / "run.json").read_text())
    assert len({each["subset"]["fingerprint"] for each in record["variants"].values()}) == 3
    assert (storage / "runs" / "tiny" / "run.json").is_file()
    assert rows[0]["objective"] > rows[1]["objective"] > rows[2]["objective"] > 0
    assert {stage: len(list((storage / stage).iterdir())) for stage in before} == before
    assert all(f"{row['objective']:.6g}" in done.stdout for row in rows)
    assert done.stdout.rstrip().endswith("/runs/tiny-sweep/sweep.json")
    assert not list((storage / "scratch").glob("tiny-sweep-*"))


def test_a_wrong_field_is_refused_before_any_trial(finished: Finished) -> None:
    command = [
        sys.executable,
        "-m",
        "s2l_ray.sweep",
        "--config",
        str(finished.job),
        "--over",
        "clusters.kk=[2, 4]",
    ]
    env = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "clusters.kk: unknown key" in done.stderr
    assert "Ray" not in done.stderr


def test_a_dry_run_shows_every_trial_and_starts_nothing(finished: Finished) -> None:
    command = [sys.executable, "-m", "s2l_ray.sweep", "--config", str(finished.job), "--dry-run"]
    before = sorted((finished.folder / "storage").rglob("*"))
    done = subprocess.run(
        [*command, "--over", "clusters.k=[3, 6]"],
        env={**os.environ, "RAY_ADDRESS": "local", "COLUMNS": "200"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"clusters.k={k}" in done.stdout for k in (3, 6))
    assert "Ray" not in done.stderr
    assert sorted((finished.folder / "storage").rglob("*")) == before


def test_an_interrupted_sweep_says_so(finished: Finished) -> None:
    command = [
        sys.executable,
        "-m",
        "s2l_ray.sweep",
        "--config",
        str(finished.job),
        "--until",
        "subset",
    ]
    driver = subprocess.Popen(
        [*command, "--over", "clusters.k=[3, 5, 6, 7]"],
        env={**os.environ, "RAY_ADDRESS": "local"},
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stderr is not None
    said = ""
    # Ray is up, and the shared artifacts are there: the trials come next
    while "examples" not in said:
        line = driver.stderr.readline()
        assert line, said
        said += line
    scratch = finished.folder / "storage" / "scratch"
    while not list(scratch.glob("tiny-sweep-*")):
        assert driver.poll() is None, "the sweep ended before its trials began"
    driver.send_signal(signal.SIGINT)
    said += driver.communicate(timeout=100)[1]
    assert driver.returncode == 130, said
    assert "interrupted; the same command goes on" in said
    assert "Traceback" not in said
