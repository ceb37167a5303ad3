"""A pool of Ray Train worker groups that do one training after another.

A worker group takes some ten seconds to start: Ray Train's own processes, its placement, and
the imports of torch, transformers and DeepSpeed in every worker. So a group whose training is
done stays idle in the pool while the run has trainings that remain, such as the target after the
proxy, until another stage needs its CPUs or GPUs.
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

from s2l_ray.core.memory import give_back_freed_memory
from s2l_ray.core.storage.store import Store
from s2l_ray.edge.waiting import SECONDS, Patience

log = logging.getLogger("s2l_ray")
# Ray Train's controller polls its workers every 2 s, and notices that much later what has ended.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_watcher_is_set = WATCHER in os.environ
# What lies between two trainings may take long, or wait for another job's lease. CPUs and GPUs,
# which other jobs may want, are not held idle for longer than this.
IDLE_SECONDS = 30.0

# Called by every worker of a group at the same time, with its rank and the number of workers.
Task = Callable[[int, int], None]


@dataclass(frozen=True)
class Shape:
    """What a worker group holds; groups of equal shapes can stand in for one another.

    Attributes:
        workers: how many workers.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.
        labels: of Ray, which the hosts must have.
        storage: URI of the storage where Ray Train keeps its own files while the group lives.
    """

    workers: int
    cpus: float
    gpus: float
    labels: tuple[tuple[str, str], ...]
    storage: str


def run(
    shape: Shape, name: str, task: Task, remaining: Callable[[], int], patience: Patience
) -> None:
    """Run a task in a worker group of this shape, an idle one or a new one.

    Args:
        name: of a new group.
        remaining: called after the task; how many trainings have not begun. At most so many groups
            stay idle.
        patience: while not all workers of the group are placed.

    Raises:
        UserError: the cluster has no room for the workers.
        TrainingFailedError: a worker failed or was lost, and the group with it.
    """
    group, is_new = _pool.take(shape, name)
    if not is_new:
        log.info("%s: in workers that are up already", name)
    group.run(task, patience)
    _pool.put_back(group, remaining())


def held() -> dict[str, float]:
    """CPUs and GPUs that all groups of this process hold, idle ones included."""
    shapes = [group.shape for group in _pool.alive()]
    return {
        "CPU": sum(shape.workers * shape.cpus for shape in shapes),
        "GPU": sum(shape.workers * shape.gpus for shape in shapes),
    }


def end_idle() -> None:
    """End all idle groups, and wait until they have released their CPUs and GPUs."""
    _pool.end_idle()


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """End all idle groups after the block, unless Ctrl-C ends everything."""
    try:
        yield
    except Exception:
        # Ray may be what failed.
        with contextlib.suppress(Exception):
            end_idle()
        raise
    end_idle()


class _WorkerGroup:
    """Workers of one Ray Train run, and the thread that waits for its end."""

    def __init__(self, shape: Shape, name: str) -> None:
        self.shape, self.closing = shape, False
        if not _watcher_is_set:
            # A process that takes a second to start, of use where a host can go and others stay.
            os.environ[WATCHER] = str(int(len(ray.nodes()) > 1))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = _TaskMailbox.options(scheduling_strategy=here).remote(shape.workers)  # type: ignore[attr-defined]
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
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, task: Task, patience: Patience) -> None:
        """Have all workers do a task, and wait until they have."""
        number = next(self._numbers)
        try:
            ray.get(self._mailbox.put.remote(number, cloudpickle.dumps(task)))
            done = self._mailbox.all_done.remote(number)
            while not ray.wait([done], timeout=SECONDS)[0]:
                if ray.get(self._mailbox.taken.remote()) < self.shape.workers:
                    patience.tick()
            ray.get(done)
        except ray.exceptions.RayActorError as error:
            self._thread.join()
            raise self._failure or error from None

    def close(self) -> None:
        """Let the workers end."""
        self.closing = True
        self._mailbox.put.remote(next(self._numbers), None)

    def join(self) -> None:
        """Wait until they have ended and released what they held."""
        self._thread.join()

    def _train(self, name: str) -> None:
        """Run the workers to their end, then kill the mailbox, so that nobody waits at it."""
        # Imports torch, which the mailbox, made in this module too, has no use for.
        import ray.train.torch

        shape, store, resources = self.shape, Store(self.shape.storage), {"CPU": self.shape.cpus}
        if shape.gpus:
            resources["GPU"] = shape.gpus
        trainer = ray.train.torch.TorchTrainer(
            _work,
            train_loop_config={"mailbox": self._mailbox},
            scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
                num_workers=shape.workers,
                use_gpu=shape.gpus > 0,
                resources_per_worker=resources,
                label_selector=dict(shape.labels) or None,
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=store.uri_of("scratch"),
                # Whoever gave the task goes on from its last state, in a new group.
                failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                    max_preemption_failures=0
                ),
            ),
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if shape.gpus else "gloo"),
        )
        try:
            trainer.fit()
        except BaseException as error:
            self._failure = error
        finally:
            ray.kill(self._mailbox)
            store.delete(f"scratch/{name}")


@ray.remote(num_cpus=0)
class _TaskMailbox:
    """Hands one task after another to the workers of a group; an actor on the driver's node.

    Tasks stay pickled here, so that the actor imports nothing of theirs.
    """

    def __init__(self, workers: int) -> None:
        self._workers, self._number, self._left, self._taken = workers, -1, 0, 0
        self._task: bytes | None = None
        self._changed = asyncio.Condition()

    async def put(self, number: int, task: bytes | None) -> None:
        """Set the next task; None ends the workers."""
        async with self._changed:
            self._number, self._task, self._left, self._taken = number, task, self._workers, 0
            self._changed.notify_all()

    async def get(self, number: int) -> bytes | None:
        """Wait for a task."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._number == number)
            self._taken += 1
            return self._task

    async def taken(self) -> int:
        """How many workers have the task."""
        return self._taken

    async def worker_done(self) -> None:
        """One more worker has done the task."""
        async with self._changed:
            self._left -= 1
            self._changed.notify_all()

    async def all_done(self, number: int) -> None:
        """Wait until all workers have done a task."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._number == number and not self._left)


def _work(settings: dict[str, Any]) -> None:
    """What each Ray Train worker does: all tasks of its group, one after another."""
    import ray.train
    import torch

    context, mailbox = ray.train.get_context(), settings["mailbox"]
    for number in itertools.count():
        task = ray.get(mailbox.get.remote(number))
        if task is None:
            return
        cloudpickle.loads(task)(context.get_world_rank(), context.get_world_size())
        # The parts of an engine refer to one another.
        gc.collect()
        give_back_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        ray.get(mailbox.worker_done.remote())


class _Pool:
    """The worker groups of this process, and a timer that ends it for each that is idle."""

    def __init__(self) -> None:
        self._groups: list[_WorkerGroup] = []
        self._idle: dict[_WorkerGroup, threading.Timer] = {}
        self._lock = threading.Lock()

    def take(self, shape: Shape, name: str) -> tuple[_WorkerGroup, bool]:
        """A group of this shape, and whether it is new; idle groups end before a new one starts."""
        with self._lock:
            found = next(
                (group for group in self._idle if group.shape == shape and group.is_alive), None
            )
            if found is not None:
                self._idle.pop(found).cancel()
                return found, False
        self._end_all()
        group = _WorkerGroup(shape, name)
        with self._lock:
            self._groups.append(group)
        return group, True

    def alive(self) -> list[_WorkerGroup]:
        with self._lock:
            self._groups = [group for group in self._groups if group.is_alive]
            return list(self._groups)

    def put_back(self, group: _WorkerGroup, remaining: int) -> None:
        """Keep a group idle for IDLE_SECONDS at most; close it if `remaining` are idle already."""
        with self._lock:
            if len(self._idle) >= remaining:
                group.close()
                return
            timer = self._idle[group] = threading.Timer(IDLE_SECONDS, self._end, (group,))
            timer.daemon = True
            timer.start()

    def end_idle(self) -> None:
        self._end_all()
        for group in self.alive():
            if group.closing:
                group.join()

    def _end_all(self) -> None:
        with self._lock:
            idle = list(self._idle)
        for group in idle:
            self._end(group)

    def _end(self, group: _WorkerGroup) -> None:
        with self._lock:
            # None: it was taken in this moment.
            timer = self._idle.pop(group, None)
            if timer is not None:
                timer.cancel()
                group.close()


_pool = _Pool()
