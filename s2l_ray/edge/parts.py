"""Parts through Ray Data: descriptors stream through tasks or actors, which write the parts.

A descriptor is a small JSON object. What comes back is what a receipt says of a part, not its rows.
"""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import ray
import ray.data

from s2l_ray.config import Config
from s2l_ray.contract.work import Work
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.records import from_bytes, to_bytes
from s2l_ray.edge.failures import of_system
from s2l_ray.edge.placement import TASK_CPUS, actor_cpus, free
from s2l_ray.edge.session import node_name
from s2l_ray.edge.tasks import bounded
from s2l_ray.edge.user_errors import reraise_user_errors
from s2l_ray.errors import UserError
from s2l_ray.progress import track

log = logging.getLogger("s2l_ray")
# A task through Ray Data takes 7 ms of the driver (tests/bench/bench_nodes.py). More tasks than
# these would keep the workers waiting, so neighbours share one.
MOST_TASKS = 16_384


@dataclass(frozen=True)
class PartContext:
    """What making parts needs besides descriptors; small, because it travels with every task."""

    config: Config
    artifact: Artifact
    inputs: dict[str, Artifact]
    run: str

    def write(
        self, index: int, rows: int, files: dict[str, tuple[str, bytes]], stats: dict[str, Any]
    ) -> Part:
        """Write a finished part; see `Artifact.write_part`."""
        return self.artifact.write_part(index, rows, files, node_name(), self.run, stats)


def part_context(work: Work) -> PartContext:
    return PartContext(work.config, work.artifact, work.inputs, work.run)


Descriptor = dict[str, Any]
# Makes the parts of one task, in the order of their descriptors.
MakeParts = Callable[[PartContext, list[Descriptor]], Iterable[Part]]
MakePart = Callable[[Descriptor], Part]
# Loads what is expensive, once an actor, and returns the function that makes one part with it.
Load = Callable[[PartContext], MakePart]
# From rows, one a task, and their number to answers.
Stream = Callable[[ray.data.Dataset, int], ray.data.Dataset]


def one_by_one(make: Callable[[PartContext, Descriptor], Part]) -> MakeParts:
    """For `parts_by_tasks`, from a function that makes one part."""
    return functools.partial(_each, make)


def _each(
    make: Callable[[PartContext, Descriptor], Part],
    context: PartContext,
    descriptors: list[Descriptor],
) -> Iterator[Part]:
    return (make(context, descriptor) for descriptor in descriptors)


def parts_by_tasks(
    work: Work,
    descriptors: Mapping[int, Descriptor],
    make: MakeParts,
    tasks: Mapping[int, str] | None = None,
) -> list[Part]:
    """Make the parts that no earlier run finished, in Ray Data tasks.

    Args:
        descriptors: by part number.
        make: gets each descriptor with its part number as `index`.
        tasks: part number -> name of the task that makes it; without it each part has its own.

    Returns:
        All parts by number, whoever made them.

    Raises:
        UserError: what `make` raised, or parts are missing at the end.
    """
    context = part_context(work)

    def stream(rows: ray.data.Dataset, num_tasks: int) -> ray.data.Dataset:
        task: Any = _make_in_task
        return rows.flat_map(task, fn_args=(make, context), num_cpus=TASK_CPUS)

    return _streamed(work, descriptors, stream, tasks)


def parts_by_actors(work: Work, descriptors: Mapping[int, Descriptor], load: Load) -> list[Part]:
    """The same in a pool of as many actors as `work.request` asks for and the cluster holds."""
    context, request = part_context(work), work.request

    def stream(rows: ray.data.Dataset, num_tasks: int) -> ray.data.Dataset:
        cpus = actor_cpus(request)
        fits = max(1, int(free()["CPU"] // cpus))
        most = min(request.count, fits, num_tasks)
        return rows.flat_map(
            _ActorPart,
            fn_constructor_args=(load, context),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
            num_cpus=cpus,
            num_gpus=request.gpus or None,
            label_selector=dict(request.labels) or None,
        )

    return _streamed(work, descriptors, stream, None)


def _streamed(
    work: Work,
    descriptors: Mapping[int, Descriptor],
    stream: Stream,
    tasks: Mapping[int, str] | None,
) -> list[Part]:
    finished = work.artifact.finished_parts()
    done = {index: part for index, part in finished.items() if index in descriptors}
    if done:
        found, all_parts = len(done), len(descriptors)
        log.info("%s: %d of %d parts are there from an earlier run", work.label, found, all_parts)
    missing = {index: each for index, each in descriptors.items() if index not in done}
    todo = _rows(missing, tasks)
    if todo:
        answers = stream(ray.data.from_items(todo, override_num_blocks=len(todo)), len(todo))
        with track(work.label, len(descriptors), "parts", len(done)) as tracker:
            for part, began in _parts_of(answers):
                done[part.index] = part
                work.rows_began(began)
                tracker.advance()
    if len(done) != len(descriptors):
        raise UserError(
            f"making {work.label}: expected {len(descriptors)} parts, got {len(done)}. Run the "
            "same command again."
        )
    return [done[index] for index in descriptors]


def _rows(
    descriptors: Mapping[int, Descriptor], tasks: Mapping[int, str] | None
) -> list[dict[str, str]]:
    """One row a task: lists of descriptors as JSON, several where there would be too many tasks."""
    by_task: dict[str | int, list[Descriptor]] = {}
    for index, descriptor in descriptors.items():
        task = tasks[index] if tasks else index
        by_task.setdefault(task, []).append({"index": index, **descriptor})
    several = list(by_task.values())
    size = max(1, math.ceil(len(several) / MOST_TASKS))
    starts = range(0, len(several), size)
    return [{"descriptors": json.dumps(several[start : start + size])} for start in starts]


def _parts_of(answers: ray.data.Dataset) -> Iterator[tuple[Part, float]]:
    with reraise_user_errors():
        for row in answers.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield from_bytes(Part, row["part"]), row["began"]


def _make_in_task(
    row: dict[str, str], make: MakeParts, context: PartContext
) -> Iterator[dict[str, Any]]:
    several = json.loads(row["descriptors"])
    return _answers(lambda: chain.from_iterable(make(context, each) for each in several))


class _ActorPart:
    """Makes parts in a Ray Data actor that keeps what is expensive to load."""

    def __init__(self, load: Load, context: PartContext) -> None:
        self.load, self.context = load, context
        self.make: MakePart | None = None

    def __call__(self, row: dict[str, str]) -> Iterator[dict[str, Any]]:
        several = json.loads(row["descriptors"])
        return _answers(lambda: map(self._loaded(), chain.from_iterable(several)))

    def _loaded(self) -> MakePart:
        if self.make is None:
            self.make = self.load(self.context)
        return self.make


def _answers(make: Callable[[], Iterable[Part]]) -> Iterator[dict[str, Any]]:
    """Parts as they are made, or the words of a UserError or of an error of the system.

    Ray Data wraps exceptions, and their cause is lost when they are pickled. `began` is when all
    that must be loaded was there.
    """
    try:
        parts = make()
        began = time.time()
        for part in parts:
            yield {"part": to_bytes(part), "error": "", "began": began}
    except UserError as error:
        yield {"part": b"", "error": str(error), "began": 0.0}
    except OSError as error:
        known = of_system(error)
        if known is None:
            raise
        yield {"part": b"", "error": f"on {node_name()}: {known}", "began": 0.0}


@ray.remote
def _adopt(artifact: Artifact, index: int, other: Artifact, part: Part) -> int:
    return artifact.adopt(index, other, part).rows


def adopt_parts(work: Work, found: dict[int, tuple[Artifact, Part]]) -> None:
    """Take parts of other artifacts as finished parts of this one; only the others are made."""
    there = work.artifact.finished_parts()
    calls = [
        (work.artifact, index, other, part)
        for index, (other, part) in found.items()
        if index not in there
    ]
    rows = sum(bounded(_adopt, calls))
    if calls:
        log.info(
            "%s: %d parts (%s rows) taken from earlier artifacts",
            work.label,
            len(calls),
            f"{rows:,}",
        )
