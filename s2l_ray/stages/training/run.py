"""One training in a group of Ray Train workers, around the one training loop of core.

Ray Train places the workers, sets up their process group and starts them again after a loss. Each
worker feeds itself by its own Ray Data pipeline over window descriptors, so global batches do not
depend on the number of workers.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import ray.train.torch
import torch
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError

from s2l_ray.config import Training
from s2l_ray.contract.work import Work
from s2l_ray.core.model.architecture import build, load_config
from s2l_ray.core.model.checkpoint import checkpoint_files
from s2l_ray.core.model.loading import load_encoder, tensor_reader
from s2l_ray.core.model.order import Order
from s2l_ray.core.model.schedule import TrainingSetup
from s2l_ray.core.model.training import kept_steps, train
from s2l_ray.core.model.validation import history, last_step
from s2l_ray.core.model.workers import Worker, check_gpu
from s2l_ray.core.model.zero import zero_stage
from s2l_ray.core.storage.info import TrainingInfo
from s2l_ray.core.storage.manifest import FileEntry
from s2l_ray.core.text.encoding import check_some_learned, some_end
from s2l_ray.edge import worker_pool
from s2l_ray.edge.failures import described, lasting
from s2l_ray.edge.placement import READER_CPUS, shortage, worker_cpus
from s2l_ray.edge.user_errors import find_user_error
from s2l_ray.edge.waiting import SECONDS, Patience, patiently
from s2l_ray.errors import UserError
from s2l_ray.progress import track
from s2l_ray.stages.training.feed import Feed, Rows
from s2l_ray.stages.training.metrics import (
    SECONDS_BETWEEN_WRITES,
    MetricsWriter,
    latest_metrics,
    read_metrics,
    training_info,
)
from s2l_ray.stages.training.place import Place

log = logging.getLogger("s2l_ray")
ROWS_TRIED = 256


@dataclass(frozen=True)
class OneTraining:
    """What one training follows, the rows it reads and in which order, and where its files go.

    It travels to every worker.
    """

    setup: TrainingSetup
    rows: Rows
    order: Order
    place: Place

    def complete(self) -> bool:
        """Whether every checkpoint is there."""
        steps = kept_steps(self.setup, self.place)
        return all(checkpoint_files(self.place, step) is not None for step in steps)

    def files(self) -> list[FileEntry]:
        """The files of all checkpoints."""
        steps = kept_steps(self.setup, self.place)
        return [entry for step in steps for entry in self.place.checkpoint(step)]

    def summary(self, work: Work) -> TrainingInfo:
        """What the manifest says of this training; also reports when its first step began."""
        metrics = read_metrics(self.place)
        for entry in metrics:
            work.rows_began(entry.get("began", 0.0))
        steps = self.setup.total_steps
        if self.setup.validation is not None:
            steps = last_step(history(self.place), self.setup)
        examples = min(self.order.positions, steps * self.setup.section.global_batch)
        return training_info(metrics, steps, examples)


def check_first_rows(rows: Rows, sections: Iterable[Training], stage: str) -> None:
    """Encode the first rows as each model will, before any training.

    Raises:
        UserError: a prompt or template leaves nothing to learn of any of them.
    """
    table = rows.read(next(part for part in rows.parts if part.rows)).slice(0, ROWS_TRIED)
    for section in sections:
        encoder = load_encoder(section)
        encoded = encoder.examples(table)
        check_some_learned(encoded, stage)
        if not some_end(encoded, encoder):
            log.warning(
                "%s: no answer of the first %d rows learns an end token, so the model is not "
                "taught to stop. Give a template that ends answers within its generation marks",
                stage,
                len(encoded),
            )


def run(work: Work, training: OneTraining, remaining: int) -> None:
    """Train until every checkpoint is there.

    A lost worker or node starts a new attempt from the last state.

    Args:
        remaining: how many trainings of this artifact follow directly.

    Raises:
        UserError: a batch that does not divide, a loss that is not finite, a request that does not
            fit in the cluster.
        UserError: workers failed more than scaling.max_failures times.
    """
    if training.complete():
        log.info("%s: all checkpoints are there from an earlier run", work.label)
        return
    request, uri = work.request, work.artifact.store.uri

    def all_remaining() -> int:
        # DeepSpeed holds on to a model of ZeRO-3 in two tables of its modules, which only the end
        # of the process frees: such workers do no second training.
        return 0 if zero_stage(training.setup.section) == 3 else remaining + work.remaining()

    failures = 0
    while True:
        # Counted anew: a host may be gone.
        cpus = patiently(work.label, lambda: worker_cpus(request, work.at_once))
        shape = worker_pool.Shape(request.count, cpus, request.gpus, request.labels, uri)
        patience = _placed(work, shape)
        try:
            with _progress(training, work.label):
                task = functools.partial(_train, training=training)
                worker_pool.run(shape, work.label, task, all_remaining, patience)
            return
        except TrainingFailedError as error:
            found = find_user_error(error) or lasting(error)
            if found is not None:
                raise found from None
            # A host that was announced to go, and went, is nobody's failure.
            failures += not isinstance(error, PreemptionError)
            why = described(error)
            if failures > work.config.scaling.max_failures:
                raise UserError(f"making {work.label}: {why}") from None
            log.warning(
                "%s: failed %d times; going on from the last state: %s", work.label, failures, why
            )


def _placed(work: Work, shape: worker_pool.Shape) -> Patience:
    """While the workers of a group wait for room."""
    each = f"{shape.cpus:g} CPUs" + (f" and {shape.gpus:g} GPUs" if shape.gpus else "")
    return Patience(
        work.label,
        f"{shape.workers} workers of {each} to be placed and to start",
        lambda: shortage(work.request.stage, shape.workers, shape.cpus, shape.gpus, shape.labels),
    )


def _train(rank: int, world_size: int, training: OneTraining) -> None:
    """What each worker does."""
    section, scaling = training.setup.section, training.setup.scaling
    check_gpu(scaling.gpus)
    torch.set_num_threads(scaling.threads)
    config = load_config(section.model)
    feed = Feed(section, training.rows, training.order, scaling.readers)
    with MetricsWriter(training.place) as metrics:
        train(
            lambda: build(config, attention=scaling.attention, dropout=section.dropout),
            tensor_reader(section.model),
            training.setup,
            lambda first_step: feed.batches(rank, world_size, first_step),
            training.place,
            Worker(rank, world_size, ray.train.torch.get_device()),
            metrics.step,
            lambda: ray.train.get_preemption_info() is not None,
        )


@contextlib.contextmanager
def _progress(training: OneTraining, label: str) -> Iterator[None]:
    """Show the progress of a training that runs elsewhere, from the metrics that it stores."""
    ended = threading.Event()

    def watch() -> None:
        latest = latest_metrics(training.place)
        began, before, said = time.monotonic(), int(latest["step"]), False
        with track(label, training.setup.total_steps, "steps", before) as tracker:
            while not ended.wait(SECONDS_BETWEEN_WRITES):
                latest = latest_metrics(training.place)
                if not said and time.monotonic() - began > SECONDS:
                    said = True
                    if int(latest["step"]) == before:
                        log.info(
                            "%s: no step after %g s: workers start and load the model, or wait for "
                            "their first rows, which a task of %g CPUs reads",
                            label,
                            SECONDS,
                            READER_CPUS,
                        )
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
