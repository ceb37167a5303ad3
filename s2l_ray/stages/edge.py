"""The Ray edge that all stages share: joining a cluster, checking that every node sees the storage, leases, parts through Ray Data."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import ray
import ray.data
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s2l_ray.config import Config
from s2l_ray.core.storage.store import Artifact, Part, Store
from s2l_ray.errors import UserError
from s2l_ray.progress import track
from s2l_ray.stages import groups
from s2l_ray.stages.work import Work

log = logging.getLogger("s2l_ray")
NAMESPACE = "s2l_ray"  # of the names of all jobs; without it each job would have one of its own
SECONDS_BETWEEN_CLAIMS = 0.5
# A little less than one, so that a task that makes a part fits beside the trial of a sweep.
TASK_CPUS = 0.9
# A task through Ray Data takes 7 ms of the driver (tests/bench/bench_nodes.py), so that more of them would keep others waiting.
MOST_TASKS = 16_384
# Of one task that reads and tokenises; small, so that readers always find room beside the workers.
READER_CPUS = 0.25


def connect(config: Config) -> None:
    """Join the Ray cluster this process belongs to, or start one on this machine. Says which."""
    if not ray.is_initialized():
        _join(config)
    elif ray.get_runtime_context().namespace != NAMESPACE:
        log.warning(
            "Ray was joined under another namespace than %s: other jobs do not see which artifacts this one makes",
            NAMESPACE,
        )
    # Ray's libraries show progress of their own; ours stands in its place.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails comes here as an exception


def _join(config: Config) -> None:
    # Workers' own lines stay in Ray's log folder: what matters comes back as results, progress or errors.
    options: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if os.environ.get("RAY_ADDRESS") != "local":
        try:
            ray.init(address="auto", **options)
        except ConnectionError as error:
            if "RAY_ADDRESS" in os.environ:
                raise UserError(
                    f"joining the Ray cluster at RAY_ADDRESS = {os.environ['RAY_ADDRESS']}: {error}. Is it running, and is "
                    "RAY_AUTH_TOKEN its token? Unset RAY_ADDRESS to work on this machine alone."
                ) from None
            log.info("no Ray cluster to join here (%s)", str(error).splitlines()[0].rstrip("."))
        else:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            log.info(
                "joined the Ray cluster at %s: %d node(s), %s",
                ray.get_runtime_context().gcs_address,
                len(nodes),
                _resources(),
            )
    if not ray.is_initialized():
        cpus = config.scaling.local_cpus or os.cpu_count()
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=config.scaling.local_object_store,
            include_dashboard=False,
            **options,
        )
        log.info("started Ray on this machine: %s", _resources())


def _resources() -> str:
    have = ray.cluster_resources()
    return ", ".join(f"{have.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))


def capacity() -> dict[str, float]:
    """CPUs and GPUs of the cluster, as far as it can autoscale where that is known."""
    from ray._private.state import state

    have = ray.cluster_resources()
    could = state.get_max_resources_from_cluster_config() or {}
    return {kind: max(have.get(kind, 0.0), float(could.get(kind, 0))) for kind in ("CPU", "GPU")}


def free() -> dict[str, float]:
    """Of the capacity, what this job's groups of training workers do not hold."""
    held = groups.held()
    return {kind: amount - held[kind] for kind, amount in capacity().items()}


def make_room(config: Config, stage: str) -> None:
    """Have groups of training workers that have nothing to do end where a stage wants what they hold."""
    scaling, left = config.scaling, free()
    actors = scaling.scorers if stage in ("trajectories", "evaluation") else 0
    cpus = max(TASK_CPUS, actors * (scaling.cpus_per_worker or 0.0))
    if left["CPU"] < cpus or left["GPU"] < actors * scaling.gpus_per_worker:
        groups.give_up()


@ray.remote(num_cpus=0)
def _read_token(store_uri: str, name: str) -> str:
    try:
        return Store(store_uri).read(name).decode()
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def check_storage(store: Store) -> None:
    """With more than one node, have every node read a token that the driver wrote.

    Raises:
        UserError: naming the nodes that cannot see it.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    token = uuid.uuid4().hex
    name = f"tokens/{token}/token"
    store.write(name, token.encode())
    answers = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": _read_token.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(store.uri, name)
        for node in nodes
    }
    seen = {node: ray.get(answer) for node, answer in answers.items()}
    store.delete(f"tokens/{token}")
    blind = {node: answer for node, answer in seen.items() if answer != token}
    if blind:
        node, answer = next(iter(blind.items()))
        raise UserError(
            f"checking the storage {store.uri}: {len(blind)} of {len(nodes)} nodes do not see what the driver wrote there, "
            f"{node} first ({answer}). Set run.storage to a place that all nodes share: an object store (s3://, gs://) or a "
            "network folder mounted at the same path everywhere."
        )


def worker_cpus(config: Config, workers: int, section: str, at_once: int) -> float:
    """CPUs of one training worker, leaving room for the tasks that feed it; without that room training would wait for ever.

    Args:
        at_once: how many trainings may go on at the same time; each takes at most such a share, so that all can be held.

    Raises:
        UserError: the request cannot be held beside its readers.
    """
    have, scaling = capacity(), config.scaling
    wanted, all_workers = scaling.cpus_per_worker, workers * at_once
    who = (
        f"{workers} workers"
        if at_once == 1
        else f"{at_once} trainings side by side of {workers} workers each"
    )
    remedy = f"Lower scaling.{section}_workers" + (
        " or scaling.side_by_side" if at_once > 1 else ""
    )
    if scaling.gpus_per_worker * all_workers > have["GPU"]:
        raise UserError(
            f"placing {section}: {who} with scaling.gpus_per_worker = {scaling.gpus_per_worker} need more than "
            f"the {have['GPU']:g} GPUs of the cluster. {remedy}, or add nodes."
        )
    readers = 2 * READER_CPUS * at_once
    share = int(100 * (have["CPU"] - readers) / all_workers) / 100
    if wanted is None and share > 0:
        return min(1.0, share)
    if wanted is None or wanted * all_workers > have["CPU"] - readers:
        raise UserError(
            f"placing {section}: {who} take {(wanted or 0.01) * all_workers:g} of {have['CPU']:g} CPUs and leave fewer than "
            f"{readers:g} for reading data. {remedy} or scaling.cpus_per_worker, or leave the latter out."
        )
    return wanted


@contextlib.contextmanager
def lease(artifact: Artifact) -> Iterator[None]:
    """Be the only job of this Ray cluster that makes `artifact` (design, invariant 9); waits for another that does.

    The lease is the name of a placement group, which Ray gives once, and takes back from a job that died. It needs no process, where
    a named actor takes 0.6 s to start, as often as an artifact is made.
    """
    place = hashlib.sha256(artifact.store.uri.encode()).hexdigest()[:12]
    name = f"{place}-{artifact.stage}-{artifact.fingerprint}"
    held = _claimed(name)
    if held is None:
        log.info("%s: another job makes it; waiting", artifact.label)
    while held is None:
        time.sleep(SECONDS_BETWEEN_CLAIMS)
        held = _claimed(name)
    try:
        yield
    finally:
        remove_placement_group(held)


def _claimed(name: str) -> PlacementGroup | None:
    """A placement group of this name, unless there is one."""
    try:
        return placement_group(
            [{"memory": 1}], name=name
        )  # it may wait for its byte: the name is taken at once
    except ray.exceptions.RaySystemError as error:
        if "already exists" not in str(error):
            raise
        return None


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


def node_name() -> str:
    """The node this process runs on, as people know it."""
    return f"{os.uname().nodename}/{ray.util.get_node_ip_address()}"


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
    actors: int = 1,
    tasks: Mapping[int, str] | None = None,
) -> list[Part]:
    """Make the parts that no earlier run finished, by streaming their descriptors through Ray Data tasks, or actors.

    Args:
        jobs: part number -> small JSON descriptor.
        make: makes a part in a task. `make_several`: makes all parts of a task, in the order of their numbers. `load`: prepares an actor
            and gives the function that makes parts in it. One of the three.
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
    scaling = work.config.scaling
    if load is None:
        several = make_several or functools.partial(_make_each, make=make)
        parts = rows.flat_map(_make_in_task, fn_args=(several, context), num_cpus=TASK_CPUS)  # type: ignore[arg-type]
    else:
        cpus = actor_cpus(work.config, actors)
        fits = max(1, int(free()["CPU"] // cpus))
        parts = rows.flat_map(
            _ActorPart,
            fn_constructor_args=(load, context),
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=max(1, min(actors, fits, len(todo)))
            ),
            num_cpus=cpus,
            num_gpus=scaling.gpus_per_worker or None,
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


def actor_cpus(config: Config, actors: int) -> float:
    """CPUs of one scoring actor: as asked for, or those of a task where they fit and an equal share of what is free where they do not.

    Raises:
        UserError: not even one actor fits, so that its stage would wait for ever.
    """
    have, scaling = capacity(), config.scaling
    cpus = scaling.cpus_per_worker or max(
        0.1, min(TASK_CPUS, int(90 * free()["CPU"] / actors) / 100)
    )
    if cpus > have["CPU"] or scaling.gpus_per_worker > have["GPU"]:
        raise UserError(
            f"placing scorers: one needs {cpus:g} CPUs and {scaling.gpus_per_worker:g} GPUs, but the cluster has {have['CPU']:g} and "
            f"{have['GPU']:g}. Lower scaling.cpus_per_worker or scaling.gpus_per_worker, or add nodes."
        )
    return cpus


def check_placement(config: Config, stage: str, at_once: int) -> None:
    """Refuse a request that the cluster cannot hold before the first stage starts, not hours later when its own stage does.

    Args:
        at_once: see `worker_cpus`.
    """
    if stage == "proxy":
        worker_cpus(config, config.scaling.proxy_workers, "proxy", at_once)
    elif stage == "target":
        worker_cpus(config, config.scaling.target_workers, "target", at_once)
    elif stage in ("trajectories", "evaluation"):
        actor_cpus(config, config.scaling.scorers)


@contextlib.contextmanager
def reraise_user_errors() -> Iterator[None]:
    """Turn whatever Ray wrapped around a UserError back into that UserError."""
    try:
        yield
    except Exception as error:
        found = find_user_error(error)
        if found is not None:
            raise found from None
        raise


def find_user_error(error: BaseException | None, depth: int = 0) -> UserError | None:
    """The UserError that caused an error, however Ray wrapped it."""
    if error is None or depth > 8:
        return None
    if type(error) is UserError:
        return UserError(
            str(error).split("\nFailed to apply UDF")[0]
        )  # Ray Data adds words of its own
    failures = getattr(error, "worker_failures", None)
    nested = list(failures.values()) if isinstance(failures, dict) else []
    for cause in (
        *nested,
        getattr(error, "cause", None),
        getattr(error, "_cause", None),
        error.__cause__,
        error.__context__,
    ):
        if isinstance(cause, BaseException) and cause is not error:
            found = find_user_error(cause, depth + 1)
            if found is not None:
                return found
    return None


def bounded(task: Any, calls: list[tuple[Any, ...]], in_flight: int = 64) -> Iterator[Any]:
    """Run a Ray task once per tuple of arguments, a bounded number at a time; answers in any order, errors unwrapped."""
    waiting = list(reversed(calls))
    running: list[Any] = []
    with reraise_user_errors():
        while waiting or running:
            while waiting and len(running) < in_flight:
                # Spread, because a trial's own placement has no room for tasks.
                running.append(
                    task.options(num_cpus=TASK_CPUS, scheduling_strategy="SPREAD").remote(
                        *waiting.pop()
                    )
                )
            ready, running = ray.wait(running)
            yield from ray.get(ready)
