"""Parts through Ray Data: each is made once, in tasks and in actors, also where several share a
task.
"""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from s2l_ray.config import Config
from s2l_ray.contract.stage import Request
from s2l_ray.contract.work import Work
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.store import Store
from s2l_ray.edge import lease, parts, placement
from s2l_ray.errors import UserError
from tests import tiny

pytestmark = pytest.mark.usefixtures("local_ray")


def work_for(folder: Path) -> Work:
    config = Config.model_validate(
        {
            "run": {"storage": str(folder)},
            "examples": {"files": ["none"]},
            "proxy": {"model": {"config": tiny.LLAMA}, "tokenizer": "bytes", "epochs": 1},
        }
    )
    artifact = Artifact(Store(str(folder)), "examples", "e")
    return Work(config, artifact, {}, {}, "run", request=Request("actors", 1))


def write(context: parts.PartContext, job: dict[str, Any]) -> Part:
    task = ray.get_runtime_context().get_task_id()
    return context.write(
        job["index"], job["rows"], {"data": (".bin", bytes(job["rows"]))}, {"task": task}
    )


def load(context: parts.PartContext) -> Callable[[dict[str, Any]], Part]:
    return lambda job: write(context, job)


def by_tasks(work: Work, descriptors: dict[int, dict[str, Any]]) -> list[Part]:
    return parts.parts_by_tasks(work, descriptors, parts.one_by_one(write))


def by_actors(work: Work, descriptors: dict[int, dict[str, Any]]) -> list[Part]:
    return parts.parts_by_actors(work, descriptors, load)


@pytest.mark.parametrize("how", [by_tasks, by_actors])
@pytest.mark.parametrize(("most", "tasks"), [(100, 10), (3, 3), (1, 1)])
def test_every_part_is_made_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[..., list[Part]],
    most: int,
    tasks: int,
) -> None:
    monkeypatch.setattr(parts, "MOST_TASKS", most)
    work = work_for(tmp_path)
    made = how(work, {number: {"rows": number + 1} for number in range(10)})
    assert [(part.index, part.rows) for part in made] == [
        (number, number + 1) for number in range(10)
    ]
    assert len({part.stats["task"] for part in made}) == tasks
    assert work.start_seconds is not None


def test_a_training_leaves_room_for_its_readers_and_for_those_beside_it() -> None:
    """On two CPUs: alone a worker gets one, of two trainings side by side half as much of what
    readers leave.
    """
    one, two = Request("workers", 1), Request("workers", 2)
    assert placement.worker_cpus(one, 1) == 1.0
    assert placement.worker_cpus(one, 2) == 0.5
    assert 2 * placement.worker_cpus(two, 2) * 2 <= 2 - 4 * placement.READER_CPUS


@pytest.mark.parametrize(
    ("asked", "at_once", "said"),
    [
        ({"cpus": 1.2}, 2, "2 trainings side by side of 1 workers each"),
        ({"cpus": 1.6}, 1, "1 workers take 1.6 of 2 CPUs"),
        ({"gpus": 1.0}, 1, "need more than the 0 GPUs"),
        ({}, 4, "or scaling.side_by_side"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused(
    asked: dict[str, Any], at_once: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        placement.worker_cpus(Request("workers", 1, **asked, stage="target"), at_once)


HOLDER = """
import sys
import ray
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from s2l_ray.edge import lease, parts, placement

address, namespace, storage = sys.argv[1:]
ray.init(address=address, namespace=namespace, log_to_driver=False)
with lease.lease(Artifact(Store(storage), "examples", "e")):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_job_makes_an_artifact_and_a_dead_one_gives_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = ray.get_runtime_context()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, here.gcs_address, here.namespace, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert any("held" in line for line in holder.stdout)
    wanted, other = (Artifact(Store(str(tmp_path)), "examples", name) for name in "ef")
    waits, got = threading.Event(), threading.Event()

    def wait() -> None:
        with lease.lease(wanted):
            got.set()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            waits.set()

    heard = Heard()
    lease.log.addHandler(heard)
    with caplog.at_level(logging.INFO, logger="s2l_ray"):
        with lease.lease(other):
            assert not waits.is_set()
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert waits.wait(60)
        assert not got.is_set()
        holder.kill()
        holder.wait()
        assert got.wait(60)
        thread.join()
        # was given back
        with lease.lease(wanted):
            pass
    lease.log.removeHandler(heard)
    assert caplog.text.count("another job makes it; waiting") == 1
