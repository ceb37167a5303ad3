"""Parts through Ray Data: descriptors stream through tasks or actors, which write the parts."""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import ray
import ray.data

from s2l_ray.config import Config
from s2l_ray.contract.work import Work
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Part
from s2l_ray.edge.placement import TASK_CPUS, actor_cpus, free
from s2l_ray.edge.session import node_name
from s2l_ray.edge.tasks import bounded
from s2l_ray.edge.user_errors import reraise_user_errors
from s2l_ray.errors import UserError
from s2l_ray.progress import track

log = logging.getLogger("s2l_ray")


# A task through Ray Data takes 7 ms of the driver (tests/bench/bench_nodes.py), so that more of them would keep others waiting.
MOST_TASKS = 16_384


@dataclass(frozen=True)
class PartContext:
    """What a task that makes parts needs besides its job; small, because it travels with every task."""

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


MakePart = Callable[[PartContext, dict[str, Any]], Part]


MakeParts = Callable[[PartContext, list[dict[str, Any]]], Iterable[Part]]


def _make_in_task(
    row: dict[str, str], make: MakeParts, context: PartContext
) -> Iterator[dict[str, Any]]:
    return _answers(
        lambda: chain.from_iterable(make(context, jobs) for jobs in json.loads(row["jobs"]))
    )


def _make_each(
    context: PartContext, jobs: list[dict[str, Any]], make: MakePart | None
) -> Iterator[Part]:
    assert make is not None
    return (make(context, job) for job in jobs)


class _ActorPart:
    """Makes parts in a Ray Data actor that keeps what is expensive to load."""

    def __init__(
        self, load: Callable[[PartContext], Callable[[dict[str, Any]], Part]], context: PartContext
    ) -> None:
        self.load, self.context = load, context
        self.make: Callable[[dict[str, Any]], Part] | None = None

    def __call__(self, row: dict[str, str]) -> Iterator[dict[str, Any]]:
        return _answers(lambda: map(self._loaded(), chain.from_iterable(json.loads(row["jobs"]))))

    def _loaded(self) -> Callable[[dict[str, Any]], Part]:
        if self.make is None:
            self.make = self.load(self.context)
        return self.make


def _answers(make: Callable[[], Iterable[Part]]) -> Iterator[dict[str, Any]]:
    """Parts as they are made, or the words of a UserError: Ray Data wraps exceptions, and the cause is lost when they are pickled.

    `began` is when all that must be loaded was there.
    """
    try:
        parts = make()
        began = time.time()
        for part in parts:
            yield {"part": json.dumps(asdict(part)), "error": "", "began": began}
    except UserError as error:
        yield {"part": "", "error": str(error), "began": 0.0}


def make_parts(
    work: Work,
    jobs: dict[int, dict[str, Any]],
    make: MakePart | None = None,
    make_several: MakeParts | None = None,
    load: Callable[[PartContext], Callable[[dict[str, Any]], Part]] | None = None,
    tasks: Mapping[int, str] | None = None,
) -> list[Part]:
    """Make the parts that no earlier run finished, by streaming their descriptors through Ray Data tasks, or actors.

    Args:
        jobs: part number -> small JSON descriptor.
        make: makes a part in a task. `make_several`: makes all parts of a task, in the order of their numbers. `load`: prepares an actor
            and gives the function that makes parts in it; there are as many actors as `work.request` allows. One of the three.
        tasks: part number -> name of the task that makes it; without it, each part has its own. Neighbours share one where there
            would be more than MOST_TASKS.

    Returns:
        All parts by number, whoever made them.
    """
    done = {index: part for index, part in work.artifact.finished_parts().items() if index in jobs}
    if done:
        log.info(
            "%s: %d of %d parts are there from an earlier run", work.label, len(done), len(jobs)
        )
    by_task: dict[str | int, list[dict[str, Any]]] = {}
    for index, job in jobs.items():
        if index not in done:
            by_task.setdefault(tasks[index] if tasks else index, []).append({"index": index, **job})
    groups = list(by_task.values())
    size = max(1, math.ceil(len(groups) / MOST_TASKS))
    todo = [
        {"jobs": json.dumps(groups[first : first + size])} for first in range(0, len(groups), size)
    ]
    if not todo:
        return [done[index] for index in jobs]
    rows = ray.data.from_items(todo, override_num_blocks=len(todo))
    context = part_context(work)
    if load is None:
        several = make_several or functools.partial(_make_each, make=make)
        parts = rows.flat_map(_make_in_task, fn_args=(several, context), num_cpus=TASK_CPUS)  # type: ignore[arg-type]
    else:
        cpus = actor_cpus(work.request)
        fits = max(1, int(free()["CPU"] // cpus))
        parts = rows.flat_map(
            _ActorPart,
            fn_constructor_args=(load, context),
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=max(1, min(work.request.count, fits, len(todo)))
            ),
            num_cpus=cpus,
            num_gpus=work.request.gpus or None,
        )
    with track(work.label, len(jobs), "parts", len(done)) as tracker, reraise_user_errors():
        for row in parts.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            part = Part.from_dict(json.loads(row["part"]))
            done[part.index] = part
            work.rows_began(row["began"])
            tracker.advance()
    if len(done) != len(jobs):
        raise UserError(
            f"making {work.label}: expected {len(jobs)} parts, got {len(done)}. Run the same command again."
        )
    return [done[index] for index in jobs]


@ray.remote
def _adopt(artifact: Artifact, index: int, other: Artifact, part: dict[str, Any]) -> int:
    return artifact.adopt(index, other, Part.from_dict(part)).rows


def adopt_parts(work: Work, found: dict[int, tuple[Artifact, Part]]) -> None:
    """Take parts of other artifacts as finished parts of this one; `make_parts` then makes the others only."""
    there = work.artifact.finished_parts()
    calls = [
        (work.artifact, index, other, asdict(part))
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
