"""Whole runs as users start them: a process of its own with a Ray of its own, and one finished tiny
run that the tests share.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.store import Store
from tests import tiny

ROOT = Path(__file__).parents[2]
# an environment variable that every process started by a run inherits
MARK = "S2L_RAY_TEST"
# rows of the tiny run whose prompt alone is longer than max_length
TOO_LONG = 3


@dataclass
class Ended:
    """A run that ended."""

    status: int
    out: str
    err: str
    seconds: float


class Runs:
    """Starts the command line on job files, and leaves no process behind."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def start(
        self, job: Path, *arguments: str, python: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a run; it writes to `<job>.out` and `<job>.err`, as a full pipe would block it."""
        environment = {
            **os.environ,
            "RAY_ADDRESS": "local",
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        }
        command = [sys.executable, *python, "-m", "s2l_ray.run", "--config", str(job), *arguments]
        with open(f"{job}.out", "wb") as out, open(f"{job}.err", "wb") as err:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)

    def __call__(self, job: Path, *arguments: str, python: tuple[str, ...] = ()) -> Ended:
        began = time.monotonic()
        process = self.start(job, *arguments, python=python)
        status = process.wait(timeout=400)
        seconds = time.monotonic() - began
        return Ended(
            status, Path(f"{job}.out").read_text(), Path(f"{job}.err").read_text(), seconds
        )

    def processes(self) -> list[int]:
        """Ids of all processes that a run of this object started and that still live."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                try:
                    living = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                except OSError:
                    continue
                found += [int(folder.name)] if living else []
        return found

    def wait_until_idle(self, seconds: float = 60.0) -> None:
        """Ray ends the workers of a dead driver within seconds.

        Its agents, which write nothing, would live on for a minute.
        """
        until = time.monotonic() + seconds
        while working := [process for process in self.processes() if is_worker(process)]:
            assert time.monotonic() < until, f"workers outlive their driver: {working}"
            time.sleep(0.1)
        self.end()

    def end(self) -> None:
        """End what is left, by process id."""
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def is_worker(process: int) -> bool:
    """Whether Ray runs tasks or actors in a process: it gives these processes titles such as
    ray::IDLE.
    """
    try:
        title = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return title.startswith(b"ray::") and b"Agent" not in title


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs in this process, for the tests of one module."""
    import ray

    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    from s2l_ray.edge import worker_pool

    # Workers that are ending would ask for a Ray that is gone, and start another.
    worker_pool.end_idle()
    ray.shutdown()


@pytest.fixture(autouse=True)
def no_ray_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that starts Ray in this process without `local_ray` would give it to all tests after
    it.
    """
    yield
    import ray

    if "local_ray" not in request.fixturenames:
        assert not ray.is_initialized()


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    made = Runs()
    yield made
    made.end()


def shared_job(folder: Path) -> dict[str, Any]:
    """The tiny job with more and smaller parts, and with rows too long to be scored: the same
    wherever it is written.
    """
    job = tiny.job(
        folder,
        count=420,
        examples={"rows_per_part": 24},
        proxy={"max_length": 40, "epochs": 2},
        clusters={"k": 8, "tolerance": 0.0, "max_rounds": 60},
        subset={"rows_per_file": 7},
        target={"steps": 40},
        evaluation={"rows_per_part": 4},
    )
    long = [{**row, "instruction": "repeat " + 60 * "x"} for row in tiny.rows(TOO_LONG, seed=2)]
    tiny.write_jsonl(folder / "raw" / "c.jsonl", long)
    return job


def write_job(folder: Path, job: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@dataclass
class Finished:
    """A job that ran to its end: its files, what it printed, and its artifacts by stage."""

    folder: Path
    job: Path
    ended: Ended

    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "storage" / "runs" / "tiny" / "run.json").read_text())

    def artifact(self, stage: str) -> Artifact:
        store = Store(str(self.folder / "storage"))
        return Artifact(store, stage, self.record()["artifacts"][stage]["fingerprint"])

    def manifest(self, stage: str) -> Manifest:
        return self.artifact(stage).manifest()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, runs: Runs) -> Finished:
    """The shared job, run once and never disturbed.

    Tests may add artifacts to its storage, but change none.
    """
    folder = tmp_path_factory.mktemp("finished")
    job = write_job(folder, shared_job(folder))
    ended = runs(job)
    assert ended.status == 0, ended.err
    return Finished(folder, job, ended)
