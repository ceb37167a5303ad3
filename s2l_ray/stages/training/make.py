"""`proxy` from examples and `target` from a subset: Ray Train workers around the one training loop of core.

Ray Train places the workers, sets up their process group and starts them again after a loss; each worker feeds itself by its
own Ray Data pipeline over window descriptors, so global batches do not depend on the number of workers.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.exceptions import TrainingFailedError

from s2l_ray.config import Training
from s2l_ray.contract.work import Outcome, Work, part_dict
from s2l_ray.core.model import order
from s2l_ray.core.model.loading import (
    build,
    load_config,
    load_encoder,
    load_tokenizer,
    tensor_reader,
)
from s2l_ray.core.model.state import checkpoint_files, checkpoint_folder
from s2l_ray.core.model.training import TrainingPlan, checkpoint_steps, train
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import FileEntry
from s2l_ray.core.text.encoding import check_some_learned
from s2l_ray.edge import worker_pool as groups
from s2l_ray.edge.placement import worker_cpus
from s2l_ray.edge.user_errors import find_user_error
from s2l_ray.errors import UserError
from s2l_ray.progress import track
from s2l_ray.stages.training.feed import Feed, read_rows

log = logging.getLogger("s2l_ray")
# What each stage trains on, and in which of a part's files the conversations stand.
DATA = {"proxy": "examples", "target": "subset"}
ROLES = {"examples": "data", "subset": "messages"}
ROWS_TRIED = 256
SECONDS_BETWEEN_METRICS = 5.0
STEPS_PER_FILE = 1_000
CURVE_POINTS = 2_000


def make(work: Work) -> Outcome:
    """Train the proxies one after the other, or the target.

    Raises:
        UserError: fewer steps than checkpoints, a batch that does not divide, a loss that is not finite, a request that does not fit,
            first rows of which nothing is learned.
    """
    _try_rows(work)
    if work.artifact.stage == "target":
        return _make_target(work)
    files: list[FileEntry] = []
    members = []
    sections = list(work.config.proxy.each())
    for number, section in enumerate(sections):
        plan = _stream(work, "examples", section)
        steps = (0, *checkpoint_steps(plan.steps, section.checkpoints))
        place = _Place(work.artifact, f"member-{number}/")
        _run(work, section, plan, steps, place, more=len(sections) - 1 - number)
        folders = [f"{place.prefix}{checkpoint_folder(step)}" for step in steps]
        files += [entry for step in steps for entry in place.checkpoint(step)]
        members.append(
            {"steps": list(steps), "folders": folders, **_told(work, place, section, plan)}
        )
    flops = [member["flops"] for member in members]
    return Outcome(
        files=files, info={"members": members, "flops": sum(flops) if all(flops) else None}
    )


def _try_rows(work: Work) -> None:
    """Encode the first rows as each model will, so that a prompt or template that fits none of them is told before any training."""
    stage = work.artifact.stage
    data = DATA[stage]
    parts = [part for part in work.manifests[data].parts if part.rows]
    rows = read_rows(work.inputs[data], parts[0], ROLES[data]).slice(0, ROWS_TRIED)
    targets = [work.config.target] if work.config.target is not None else []
    for section in work.config.proxy.each() if stage == "proxy" else targets:
        check_some_learned(load_encoder(section).examples(rows), stage)


def _make_target(work: Work) -> Outcome:
    section = work.config.target
    assert section is not None
    plan = _stream(work, "subset", section)
    place = _Place(work.artifact, "")
    _run(work, section, plan, (plan.steps,), place)
    folder = checkpoint_folder(plan.steps)
    files = [*place.checkpoint(plan.steps), *_save_tokenizer(work.artifact, folder, section)]
    return Outcome(files=files, info={"model": folder, **_told(work, place, section, plan)})


def _stream(work: Work, data: str, section: Training) -> order.Stream:
    rows = [part.rows for part in work.manifests[data].parts]
    return order.stream(
        rows,
        section.shuffle_window,
        section.seed,
        section.global_batch,
        section.epochs,
        section.steps,
    )


def _save_tokenizer(artifact: Artifact, folder: str, section: Training) -> list[FileEntry]:
    entries = []
    with tempfile.TemporaryDirectory() as scratch:
        load_tokenizer(section).save_pretrained(scratch)
        for name in sorted(os.listdir(scratch)):
            with open(os.path.join(scratch, name), "rb") as file:
                entries.append(artifact.write_named(f"{folder}/{name}", file.read()))
    return entries


@dataclass(frozen=True)
class _Place:
    """Where one training writes inside its artifact: the core's files, and the metrics of each life of the run."""

    artifact: Artifact
    prefix: str

    def _path(self, path: str) -> str:
        return f"state/{self.prefix}{path}" if path.startswith("state") else f"{self.prefix}{path}"

    def write(self, path: str, data: bytes) -> None:
        self.artifact.write(self._path(path), data)

    def read(self, path: str) -> bytes:
        return self.artifact.read(self._path(path))

    def list(self, folder: str) -> Sequence[str]:
        """Names of the files and folders in a folder."""
        return sorted({name.split("/")[0] for name in self.artifact.list(self._path(folder))})

    def delete(self, folder: str) -> None:
        self.artifact.delete(self._path(folder))

    def checkpoint(self, step: int) -> Sequence[FileEntry]:
        """The files of a finished checkpoint."""
        found = checkpoint_files(self, step)
        if found is None:
            raise UserError(
                f"training: the checkpoint of step {step} is not complete in {self.artifact.uri}. Run the same command again."
            )
        folder = f"{self.prefix}{checkpoint_folder(step)}"
        return [
            FileEntry(f"{folder}/{entry['name']}", entry["bytes"], entry["sha256"])
            for entry in found
        ]

    def metrics(self) -> Sequence[dict[str, float]]:
        """One entry a step; where two lives of the run did a step, the later one counts."""
        by_step: dict[int, dict[str, float]] = {}
        for name in self.list("metrics"):
            by_step.update(
                {int(entry["step"]): entry for entry in json.loads(self.read(f"metrics/{name}"))}
            )
        return [by_step[step] for step in sorted(by_step)]

    def latest(self) -> dict[str, float]:
        """The last step that was told of, step 0 before any."""
        names = self.list("metrics")
        return json.loads(self.read(f"metrics/{names[-1]}"))[-1] if names else {"step": 0}


def _told(work: Work, place: _Place, section: Training, plan: order.Stream) -> dict[str, Any]:
    metrics = place.metrics()
    for entry in metrics:
        work.rows_began(entry.get("began", 0.0))
    thin = metrics[:: max(1, len(metrics) // CURVE_POINTS)]
    size = int(metrics[-1].get("parameters", 0)) if metrics else 0
    tokens = sum(int(entry["tokens"]) for entry in metrics)
    return {
        "total_steps": plan.steps,
        "examples": plan.positions,
        "tokens": tokens,
        "parameters": size or None,
        "flops": 6.0 * size * tokens if size else None,
        "train_seconds": round(sum(entry["seconds"] for entry in metrics), 3),
        "wait_seconds": round(sum(entry["wait_seconds"] for entry in metrics), 3),
        "curve": {
            name: [round(entry[name], 6) for entry in thin]
            for name in ("step", "loss", "learning_rate")
        },
    }


@dataclass(frozen=True)
class _Job:
    """All that a worker needs; travels by pickle."""

    feed: Feed
    plan: TrainingPlan
    place: _Place
    threads: int


def _run(
    work: Work,
    section: Training,
    stream: order.Stream,
    steps: tuple[int, ...],
    place: _Place,
    more: int = 0,
) -> None:
    """Train until every checkpoint is there; a lost worker or node starts a new attempt from the last state.

    `more` trainings follow this one directly.
    """
    if all(checkpoint_files(place, step) is not None for step in steps):
        log.info("%s: all checkpoints are there from an earlier run", work.label)
        return
    scaling, stage = work.config.scaling, work.artifact.stage
    data = DATA[stage]
    workers, micro = (
        (scaling.proxy_workers, scaling.proxy_micro_batch)
        if stage == "proxy"
        else (scaling.target_workers, scaling.target_micro_batch)
    )
    cpus = worker_cpus(work.config, workers, stage, work.at_once)
    shape = groups.Shape(workers, cpus, scaling.gpus_per_worker, work.artifact.store.uri)
    job = _Job(
        feed=Feed(
            section=section,
            data=work.inputs[data],
            parts=[part_dict(part) for part in work.manifests[data].parts],
            role=ROLES[data],
            stream=stream,
            readers=scaling.readers,
        ),
        plan=_plan(section, stream, steps, micro),
        place=place,
        threads=scaling.threads,
    )

    def coming() -> int:
        # DeepSpeed holds on to a model of ZeRO-3 (two tables of its modules), and only the end of the process frees it
        return 0 if section.zero_stage == 3 else more + work.trainings_left()

    for attempt in itertools.count():
        try:
            with _watched(job, work.label):
                groups.run(shape, work.label, functools.partial(_train, job=job), coming)
            return
        except TrainingFailedError as error:
            found = find_user_error(error)
            if found is not None:
                raise found from None
            if attempt == scaling.max_failures:
                raise
            log.warning(
                "%s: attempt %d of %d failed; going on from the last state: %s",
                work.label,
                attempt + 1,
                scaling.max_failures + 1,
                error,
            )


def _plan(
    section: Training, stream: order.Stream, steps: tuple[int, ...], micro_batch: int
) -> TrainingPlan:
    return TrainingPlan(
        total_steps=stream.steps,
        checkpoint_steps=steps,
        global_batch=section.global_batch,
        micro_batch=micro_batch,
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
    """What each Ray Train worker does."""
    torch.set_num_threads(job.threads)
    config = load_config(job.feed.section.model)
    with _Metrics(job.place, job.plan.state_every) as metrics:
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


class _Metrics:
    """Collects what the loop says of each step and stores it every few seconds; only rank 0 is told of steps.

    It is stored before each training state too, so that a training that goes on from a state knows of every step before it.
    """

    def __init__(self, place: _Place, state_every: int) -> None:
        self.place, self.state_every = place, state_every
        self.entries: list[dict[str, float]] = []
        self.stored = time.monotonic()

    def __enter__(self) -> "_Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self._store()

    def step(self, entry: dict[str, float]) -> None:
        self.entries.append({**entry, "began": time.time() - entry["seconds"]})
        late = time.monotonic() - self.stored > SECONDS_BETWEEN_METRICS
        if late or entry["step"] % self.state_every == 0:
            self._store()

    def _store(self) -> None:
        if self.entries:
            self.stored = time.monotonic()
            self.place.write(
                f"metrics/from-{int(self.entries[0]['step']):08d}.json",
                json.dumps(self.entries).encode(),
            )
        if (
            len(self.entries) >= STEPS_PER_FILE
        ):  # what is written every few seconds must not grow with the training
            self.entries = []


@contextlib.contextmanager
def _watched(job: _Job, label: str) -> Iterator[None]:
    """Show the progress of a training that runs elsewhere, from the metrics it stores."""
    ended = threading.Event()

    def watch() -> None:
        latest = job.place.latest()
        with track(label, job.plan.total_steps, "steps", int(latest["step"])) as tracker:
            while not ended.wait(SECONDS_BETWEEN_METRICS):
                latest = job.place.latest()
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
