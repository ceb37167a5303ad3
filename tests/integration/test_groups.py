"""A worker group does one training after another, ends where none remains, and is replaced where it
was lost."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest
import ray
from ray.train.v2.api.exceptions import TrainingFailedError

from s2l_ray.contract.stage import Request
from s2l_ray.edge import placement, worker_pool
from s2l_ray.edge.waiting import Patience
from s2l_ray.errors import UserError

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]


PATIENCE = Patience("target test", "", lambda: None)


def say_who(rank: int, world_size: int, folder: Path) -> None:
    """Leave one's process id under one's rank."""
    (folder / f"{rank} of {world_size}").write_text(str(os.getpid()))


def fail(rank: int, world_size: int) -> None:
    raise ValueError("a task that fails")


def done_by(shape: worker_pool.Shape, folder: Path, remaining: int) -> list[int]:
    """Process ids of those who did a task, by rank."""
    for path in folder.glob("* of *"):
        path.unlink()
    task = functools.partial(say_who, folder=folder)
    worker_pool.run(shape, "target test", task, lambda: remaining, PATIENCE)
    return [
        int((folder / f"{rank} of {shape.workers}").read_text()) for rank in range(shape.workers)
    ]


def wait_until_free() -> None:
    """All CPUs are given back soon."""
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < until, "a group still holds its CPUs"
        time.sleep(0.1)


@pytest.fixture
def shape(tmp_path: Path) -> worker_pool.Shape:
    return worker_pool.Shape(workers=2, cpus=0.5, gpus=0.0, labels=(), storage=str(tmp_path))


def test_what_remains_is_done_by_the_same_workers(shape: worker_pool.Shape, tmp_path: Path) -> None:
    first = done_by(shape, tmp_path, remaining=1)
    assert done_by(shape, tmp_path, remaining=0) == first
    wait_until_free()
    assert not set(done_by(shape, tmp_path, remaining=0)) & set(first)
    worker_pool.end_idle()
    assert not list((tmp_path / "scratch").glob("*"))


def test_another_shape_gets_other_workers_and_a_group_that_stays_idle_ends(
    shape: worker_pool.Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "IDLE_SECONDS", 1.0)
    first = done_by(shape, tmp_path, remaining=1)
    # Has room when the first group is gone.
    alone = worker_pool.Shape(workers=1, cpus=1.5, gpus=0.0, labels=(), storage=shape.storage)
    assert done_by(alone, tmp_path, remaining=1)[0] not in first
    wait_until_free()


def test_a_failure_ends_the_group_and_says_why(shape: worker_pool.Shape, tmp_path: Path) -> None:
    first = done_by(shape, tmp_path, remaining=1)
    with pytest.raises(TrainingFailedError, match="a task that fails"):
        worker_pool.run(shape, "target test", fail, lambda: 1, PATIENCE)
    wait_until_free()
    assert not set(done_by(shape, tmp_path, remaining=0)) & set(first)


def test_a_group_that_was_lost_while_idle_is_replaced(
    shape: worker_pool.Shape, tmp_path: Path
) -> None:
    first = done_by(shape, tmp_path, remaining=1)
    (group,) = worker_pool._pool._idle
    os.kill(first[1], signal.SIGKILL)
    group._thread.join(60)
    assert not group.is_alive
    assert not set(done_by(shape, tmp_path, remaining=0)) & set(first)


def test_a_group_stays_idle_only_where_others_have_room_beside_it(
    shape: worker_pool.Shape, tmp_path: Path
) -> None:
    """Of two CPUs an idle group holds one: actors share what is left, unless they ask for more; a
    task always has room."""
    done_by(shape, tmp_path, remaining=1)
    actors = Request("actors", 2)
    for request in (Request("tasks"), actors):
        placement.make_room(request)
    assert worker_pool.held() == {"CPU": 1.0, "GPU": 0.0}
    assert placement.actor_cpus(actors) == 0.45
    placement.make_room(Request("actors", 2, cpus=0.6))
    assert worker_pool.held()["CPU"] == 0
    assert placement.actor_cpus(actors) == 0.9
    wait_until_free()


def test_an_error_elsewhere_ends_idle_groups(shape: worker_pool.Shape, tmp_path: Path) -> None:
    done_by(shape, tmp_path, remaining=1)
    assert worker_pool.held()["CPU"] == 1
    with pytest.raises(UserError, match="elsewhere"), worker_pool.ended():
        raise UserError("an error elsewhere")
    assert worker_pool.held()["CPU"] == 0
    assert not list((tmp_path / "scratch").glob("*"))
