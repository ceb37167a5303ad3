"""A group of Ray Train workers does one training after another, is given up where none comes, and replaced where it was lost."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest
import ray
from ray.train.v2.api.exceptions import TrainingFailedError

from s2l_ray.contract.stage import Request
from s2l_ray.edge import placement
from s2l_ray.edge import worker_pool as groups
from s2l_ray.errors import UserError

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]


def say_who(rank: int, world_size: int, folder: Path) -> None:
    """Leave one's process id under one's rank."""
    (folder / f"{rank} of {world_size}").write_text(str(os.getpid()))


def fail(rank: int, world_size: int) -> None:
    raise ValueError("a task that fails")


def done_by(shape: groups.Shape, folder: Path, coming: int) -> list[int]:
    """Process ids of those who did a task, by rank."""
    for path in folder.glob("* of *"):
        path.unlink()
    groups.run(shape, "target test", functools.partial(say_who, folder=folder), lambda: coming)
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
def shape(tmp_path: Path) -> groups.Shape:
    return groups.Shape(workers=2, cpus=0.5, gpus=0.0, storage=str(tmp_path))


def test_what_is_coming_is_done_by_the_same_workers(shape: groups.Shape, tmp_path: Path) -> None:
    first = done_by(shape, tmp_path, coming=1)
    assert done_by(shape, tmp_path, coming=0) == first
    wait_until_free()
    assert not set(done_by(shape, tmp_path, coming=0)) & set(first)
    groups.give_up()
    assert not list((tmp_path / "scratch").glob("*"))


def test_another_shape_gets_other_workers_and_what_never_comes_is_given_up(
    shape: groups.Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "IDLE_SECONDS", 1.0)
    first = done_by(shape, tmp_path, coming=1)
    alone = groups.Shape(
        workers=1, cpus=1.5, gpus=0.0, storage=shape.storage
    )  # has room when the first group is gone
    assert done_by(alone, tmp_path, coming=1)[0] not in first
    wait_until_free()


def test_a_failure_ends_the_group_and_says_why(shape: groups.Shape, tmp_path: Path) -> None:
    first = done_by(shape, tmp_path, coming=1)
    with pytest.raises(TrainingFailedError, match="a task that fails"):
        groups.run(shape, "target test", fail, lambda: 1)
    wait_until_free()
    assert not set(done_by(shape, tmp_path, coming=0)) & set(first)


def test_a_group_that_was_lost_while_it_waited_is_replaced(
    shape: groups.Shape, tmp_path: Path
) -> None:
    first = done_by(shape, tmp_path, coming=1)
    (group,) = groups._kept._timers
    os.kill(first[1], signal.SIGKILL)
    group._thread.join(60)
    assert not group.works
    assert not set(done_by(shape, tmp_path, coming=0)) & set(first)


def test_a_group_waits_only_where_others_have_room_beside_it(
    shape: groups.Shape, tmp_path: Path
) -> None:
    """Of two CPUs it holds one: actors share what is left, unless they were promised more; a task always has room."""
    done_by(shape, tmp_path, coming=1)
    actors = Request("actors", 2)
    for request in (Request("tasks"), actors):
        placement.make_room(request)
    assert groups.held() == {"CPU": 1.0, "GPU": 0.0}
    assert placement.actor_cpus(actors) == 0.45
    placement.make_room(Request("actors", 2, cpus=0.6))
    assert groups.held()["CPU"] == 0
    assert placement.actor_cpus(actors) == 0.9
    wait_until_free()


def test_an_error_elsewhere_ends_what_waits(shape: groups.Shape, tmp_path: Path) -> None:
    done_by(shape, tmp_path, coming=1)
    assert groups.held()["CPU"] == 1
    with pytest.raises(UserError, match="elsewhere"), groups.ended():
        raise UserError("an error elsewhere")
    assert groups.held()["CPU"] == 0
    assert not list((tmp_path / "scratch").glob("*"))
