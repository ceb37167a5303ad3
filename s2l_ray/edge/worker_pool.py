"""Groups of Ray Train workers that do one training after another.

A group takes some ten seconds to come up: Ray Train's own processes, its placement, and the imports of torch, transformers and
DeepSpeed in every worker. So one whose training is done is kept where another training is to come, as the target's after the proxy's,
until somebody needs the room.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s2l_ray.core.model.allocation import give_back_freed_memory
from s2l_ray.core.storage.store import Store

log = logging.getLogger("s2l_ray")
# Ray Train's controller looks at its workers every 2 s, and notices that much later what has ended. Its watcher of preemptions is a
# process that takes a second to start and tells nothing we need: a training goes on from its last state however a node was lost.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# What lies between two trainings may take long, or wait for another job's lease; CPUs and GPUs, which other jobs may want, are not
# held idle for longer than this.
IDLE_SECONDS = 30.0

# Done by every worker, all at the same time, with its rank and the number of workers.
Task = Callable[[int, int], None]


@dataclass(frozen=True)
class Shape:
    """What a group holds, each worker `cpus` and `gpus`, and the URI of the storage where Ray Train keeps its notes meanwhile."""

    workers: int
    cpus: float
    gpus: float
    storage: str


def run(shape: Shape, name: str, task: Task, coming: Callable[[], int]) -> None:
    """Do a task in a group of this shape, one that is up or a new one.

    Args:
        name: of a new group.
        coming: asked in the end, how many trainings are still to begin; so many groups are kept for a while.

    Raises:
        TrainingFailedError: a worker failed or was lost, and the group with it.
    """
    group, is_new = _kept.take(shape, name)
    if not is_new:
        log.info("%s: in workers that are up already", name)
    group.run(task)
    _kept.keep(group, coming())


def held() -> dict[str, float]:
    """CPUs and GPUs of all groups of this process, those that have nothing to do included."""
    shapes = [group.shape for group in _kept.alive()]
    return {
        "CPU": sum(shape.workers * shape.cpus for shape in shapes),
        "GPU": sum(shape.workers * shape.gpus for shape in shapes),
    }


def give_up() -> None:
    """End all groups that have nothing to do, and wait until they have given back what they held."""
    _kept.give_up()


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """In the end no group is left idle, unless Ctrl-C ends all."""
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # Ray may be what failed
            give_up()
        raise
    give_up()


class _Group:
    """Workers of one Ray Train run, and the thread that waits for its end."""

    def __init__(self, shape: Shape, name: str) -> None:
        self.shape, self.closing = shape, False
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._desk = _Desk.options(scheduling_strategy=here).remote(shape.workers)  # type: ignore[attr-defined]
        self._numbers = itertools.count()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._train,
            args=(f"{name.replace(' ', '-')}-{uuid.uuid4().hex[:12]}",),
            name=name,
            daemon=True,
        )
        self._thread.start()

    @property
    def works(self) -> bool:
        return self._thread.is_alive()

    def run(self, task: Task) -> None:
        """Have it done by all workers."""
        number = next(self._numbers)
        try:
            ray.get(self._desk.put.remote(number, cloudpickle.dumps(task)))
            ray.get(self._desk.done.remote(number))
        except ray.exceptions.RayActorError as error:
            self._thread.join()
            raise self._failure or error from None

    def close(self) -> None:
        """Let the workers end."""
        self.closing = True
        self._desk.put.remote(next(self._numbers), None)

    def join(self) -> None:
        """Wait until they have, and what they held is given back."""
        self._thread.join()

    def _train(self, name: str) -> None:
        """Run the workers to their end; after it, whoever waits at the desk must not wait on."""
        import ray.train.torch  # imports torch, which the desk has no use for

        shape, store, resources = self.shape, Store(self.shape.storage), {"CPU": self.shape.cpus}
        if shape.gpus:
            resources["GPU"] = shape.gpus
        trainer = ray.train.torch.TorchTrainer(
            _work,
            train_loop_config={"desk": self._desk},
            scaling_config=ray.train.ScalingConfig(
                num_workers=shape.workers, use_gpu=shape.gpus > 0, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(name=name, storage_path=store.uri_of("scratch")),
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if shape.gpus else "gloo"),
        )
        try:
            trainer.fit()
        except BaseException as error:
            self._failure = error
        finally:
            ray.kill(self._desk)
            store.delete(f"scratch/{name}")


@ray.remote(num_cpus=0)
class _Desk:
    """Where a group's tasks are handed over, one at a time and pickled, so that it imports nothing of theirs; on the driver's node."""

    def __init__(self, workers: int) -> None:
        self._workers, self._number, self._left = workers, -1, 0
        self._task: bytes | None = None
        self._changed = asyncio.Condition()

    async def put(self, number: int, task: bytes | None) -> None:
        """The next task; None: there is none, and workers end."""
        async with self._changed:
            self._number, self._task, self._left = number, task, self._workers
            self._changed.notify_all()

    async def task(self, number: int) -> bytes | None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._number == number)
            return self._task

    async def end(self, number: int) -> None:
        """A worker has done a task."""
        async with self._changed:
            self._left -= 1
            self._changed.notify_all()

    async def done(self, number: int) -> None:
        """Wait until all workers have."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._number == number and not self._left)


def _work(settings: dict[str, Any]) -> None:
    """What each Ray Train worker does: all tasks of its group."""
    import ray.train
    import torch

    context, desk = ray.train.get_context(), settings["desk"]
    for number in itertools.count():
        task = ray.get(desk.task.remote(number))
        if task is None:
            return
        cloudpickle.loads(task)(context.get_world_rank(), context.get_world_size())
        gc.collect()  # the parts of an engine hold one another
        give_back_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        ray.get(desk.end.remote(number))


class _Kept:
    """The groups of this process; those that are up and have nothing to do, each with the timer that gives it up."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._timers: dict[_Group, threading.Timer] = {}
        self._lock = threading.Lock()

    def take(self, shape: Shape, name: str) -> tuple[_Group, bool]:
        """A group of this shape, and whether it is a new one, which takes the place of those that are idle."""
        with self._lock:
            found = next(
                (group for group in self._timers if group.shape == shape and group.works), None
            )
            if found is not None:
                self._timers.pop(found).cancel()
                return found, False
        self._drop_all()
        group = _Group(shape, name)
        with self._lock:
            self._groups.append(group)
        return group, True

    def alive(self) -> list[_Group]:
        with self._lock:
            self._groups = [group for group in self._groups if group.works]
            return list(self._groups)

    def keep(self, group: _Group, coming: int) -> None:
        """Keep it if fewer are kept than trainings are coming, for IDLE_SECONDS at most; else close it."""
        with self._lock:
            if len(self._timers) >= coming:
                group.close()
                return
            timer = self._timers[group] = threading.Timer(IDLE_SECONDS, self._drop, (group,))
            timer.daemon = True
            timer.start()

    def give_up(self) -> None:
        self._drop_all()
        for group in self.alive():
            if group.closing:
                group.join()

    def _drop_all(self) -> None:
        with self._lock:
            idle = list(self._timers)
        for group in idle:
            self._drop(group)

    def _drop(self, group: _Group) -> None:
        with self._lock:
            timer = self._timers.pop(group, None)  # None: it was taken in this moment
            if timer is not None:
                timer.cancel()
                group.close()


_kept = _Kept()
