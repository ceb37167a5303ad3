"""One training in a group of Ray Train workers, around the one training loop of core.

Ray Train places the workers, sets up their process group and starts them again after a loss. Each
worker feeds itself by its own Ray Data pipeline over window descriptors, so global batches do not
depend on the number of workers.
"""

import contextlib
import functools
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray.train.torch
import torch
from ray.train.v2.api.exceptions import TrainingFailedError

from s2l_ray.config import Training, TrainingWorkers
from s2l_ray.contract.work import Work
from s2l_ray.core.model import order
from s2l_ray.core.model.loading import build, load_config, load_encoder, tensor_reader
from s2l_ray.core.model.state import checkpoint_files
from s2l_ray.core.model.training import TrainingPlan, train
from s2l_ray.core.storage.manifest import FileEntry
from s2l_ray.core.text.encoding import check_some_learned
from s2l_ray.edge import worker_pool
from s2l_ray.edge.placement import worker_cpus
from s2l_ray.edge.user_errors import find_user_error
from s2l_ray.progress import track
from s2l_ray.stages.training.feed import Feed, Rows
from s2l_ray.stages.training.metrics import (
    SECONDS_BETWEEN_WRITES,
    MetricsWriter,
    latest_metrics,
    read_metrics,
    totals,
)
from s2l_ray.stages.training.place import Place

log = logging.getLogger("s2l_ray")
ROWS_TRIED = 256


@dataclass(frozen=True)
class OneTraining:
    """What one training follows, reads and makes, and on how many workers it runs."""

    section: Training
    rows: Rows
    stream: order.Stream
    checkpoint_steps: tuple[int, ...]
    place: Place
    scaling: TrainingWorkers

    def complete(self) -> bool:
        """Whether every checkpoint is there."""
        return all(checkpoint_files(self.place, step) is not None for step in self.checkpoint_steps)

    def files(self) -> list[FileEntry]:
        """The files of all checkpoints."""
        return [entry for step in self.checkpoint_steps for entry in self.place.checkpoint(step)]

    def summary(self, work: Work) -> dict[str, Any]:
        """What the manifest says of this training; also reports when its first step began."""
        metrics = read_metrics(self.place)
        for entry in metrics:
            work.rows_began(entry.get("began", 0.0))
        sizes = {"total_steps": self.stream.steps, "examples": self.stream.positions}
        return {**sizes, **totals(metrics)}


def check_first_rows(rows: Rows, sections: Iterable[Training], stage: str) -> None:
    """Encode the first rows as each model will, before any training.

    Raises:
        UserError: a prompt or template leaves nothing to learn of any of them.
    """
    table = rows.read(next(part for part in rows.parts if part.rows)).slice(0, ROWS_TRIED)
    for section in sections:
        check_some_learned(load_encoder(section).examples(table), stage)


def run(work: Work, training: OneTraining, remaining: int) -> None:
    """Train until every checkpoint is there; a lost worker or node starts a new attempt from the last state.

    Args:
        remaining: how many trainings of this artifact follow directly.

    Raises:
        UserError: a batch that does not divide, a loss that is not finite, a request that does not
            fit in the cluster.
        TrainingFailedError: workers failed more than scaling.max_failures times.
    """
    if training.complete():
        log.info("%s: all checkpoints are there from an earlier run", work.label)
        return
    scaling, max_failures = training.scaling, work.config.scaling.max_failures
    cpus = worker_cpus(work.request, work.at_once)
    uri = work.artifact.store.uri
    shape = worker_pool.Shape(work.request.count, cpus, work.request.gpus, uri)
    job = _Job(
        feed=Feed(training.section, training.rows, training.stream, scaling.readers),
        plan=_plan(training),
        place=training.place,
        threads=scaling.threads,
    )

    def all_remaining() -> int:
        # DeepSpeed holds on to a model of ZeRO-3 in two tables of its modules, which only the end of
        # the process frees: such workers do no second training.
        return 0 if training.section.zero_stage == 3 else remaining + work.remaining()

    for attempt in itertools.count():
        try:
            with _progress(job, work.label):
                task = functools.partial(_train, job=job)
                worker_pool.run(shape, work.label, task, all_remaining)
            return
        except TrainingFailedError as error:
            found = find_user_error(error)
            if found is not None:
                raise found from None
            if attempt == max_failures:
                raise
            log.warning(
                "%s: attempt %d of %d failed; going on from the last state: %s",
                work.label,
                attempt + 1,
                max_failures + 1,
                error,
            )


@dataclass(frozen=True)
class _Job:
    """All that a worker needs; it travels by pickle."""

    feed: Feed
    plan: TrainingPlan
    place: Place
    threads: int


def _plan(training: OneTraining) -> TrainingPlan:
    section = training.section
    return TrainingPlan(
        total_steps=training.stream.steps,
        checkpoint_steps=training.checkpoint_steps,
        global_batch=section.global_batch,
        micro_batch=training.scaling.micro_batch,
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        warmup_ratio=section.warmup_ratio,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_epsilon,
        gradient_clipping=section.gradient_clipping,
        dtype=section.dtype,
        zero_stage=section.zero_stage,
        state_every=section.state_every,
        seed=section.seed,
    )


def _train(rank: int, world_size: int, job: _Job) -> None:
    """What each worker does."""
    torch.set_num_threads(job.threads)
    config = load_config(job.feed.section.model)
    with MetricsWriter(job.place, job.plan.state_every) as metrics:
        train(
            lambda: build(config),
            tensor_reader(job.feed.section.model),
            job.plan,
            lambda first_step: job.feed.batches(rank, world_size, first_step),
            job.place,
            rank,
            world_size,
            ray.train.torch.get_device(),
            metrics.step,
        )


@contextlib.contextmanager
def _progress(job: _Job, label: str) -> Iterator[None]:
    """Show the progress of a training that runs elsewhere, from the metrics that it stores."""
    ended = threading.Event()

    def watch() -> None:
        latest = latest_metrics(job.place)
        with track(label, job.plan.total_steps, "steps", int(latest["step"])) as tracker:
            while not ended.wait(SECONDS_BETWEEN_WRITES):
                latest = latest_metrics(job.place)
                if latest["step"]:
                    tracker.advance(
                        int(latest["step"]) - tracker.done, f"loss {latest['loss']:.4f}"
                    )

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
