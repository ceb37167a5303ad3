"""What the cluster holds, and what a stage's request may take of it."""

import ray

from s2l_ray.contract.stage import Request
from s2l_ray.edge import worker_pool
from s2l_ray.errors import UserError

# A little less than one, so that a task that makes a part fits beside the trial of a sweep.
TASK_CPUS = 0.9
# Of one task that reads and tokenises; small, so that readers find room beside training workers.
READER_CPUS = 0.25


def capacity() -> dict[str, float]:
    """CPUs and GPUs of the cluster, as far as it can autoscale where that is known."""
    from ray._private.state import state

    have = ray.cluster_resources()
    could = state.get_max_resources_from_cluster_config() or {}
    return {kind: max(have.get(kind, 0.0), float(could.get(kind, 0))) for kind in ("CPU", "GPU")}


def free() -> dict[str, float]:
    """Of the capacity, what this job's training workers do not hold."""
    held = worker_pool.held()
    return {kind: amount - held[kind] for kind, amount in capacity().items()}


def make_room(request: Request) -> None:
    """End idle training workers where they hold what a request for actors or tasks needs."""
    if request.kind not in ("actors", "tasks"):
        return
    left = free()
    cpus = max(TASK_CPUS, request.count * (request.cpus or 0.0))
    if left["CPU"] < cpus or left["GPU"] < request.count * request.gpus:
        worker_pool.end_idle()


def check_placement(request: Request, at_once: int) -> None:
    """Refuse a request that the cluster cannot hold before the first stage starts, not hours later.

    Args:
        at_once: see `worker_cpus`.

    Raises:
        UserError: it cannot be held.
    """
    if request.kind == "workers":
        worker_cpus(request, at_once)
    elif request.kind == "actors":
        actor_cpus(request)


def worker_cpus(request: Request, at_once: int) -> float:
    """CPUs of one training worker. The tasks that feed it need some too, or it would wait for ever.

    Args:
        at_once: how many trainings may go on at the same time; each takes at most such a share.

    Raises:
        UserError: the request cannot be held beside its readers.
    """
    have, stage, count = capacity(), request.stage, request.count
    workers = count * at_once
    who = f"{count} workers"
    remedy = f"Lower scaling.{stage}.workers"
    if at_once > 1:
        who = f"{at_once} trainings side by side of {count} workers each"
        remedy += " or scaling.side_by_side"
    if request.gpus * workers > have["GPU"]:
        raise UserError(
            f"placing {stage}: {who} with scaling.{stage}.gpus = {request.gpus} need more than the "
            f"{have['GPU']:g} GPUs of the cluster. {remedy}, or add nodes."
        )
    readers = 2 * READER_CPUS * at_once
    share = int(100 * (have["CPU"] - readers) / workers) / 100
    if request.cpus is None and share > 0:
        return min(1.0, share)
    if request.cpus is None or request.cpus * workers > have["CPU"] - readers:
        raise UserError(
            f"placing {stage}: {who} take {(request.cpus or 0.01) * workers:g} of {have['CPU']:g} "
            f"CPUs and leave fewer than {readers:g} for reading data. {remedy} or "
            f"scaling.{stage}.cpus, or leave the latter out."
        )
    return request.cpus


def actor_cpus(request: Request) -> float:
    """CPUs of one actor: as asked for, or else those of a task where all fit, and an equal share of
    nine tenths of what is free where they do not.

    The last tenth is left for whoever waits for the actors, such as the trial of a sweep.

    Raises:
        UserError: not even one actor fits (not all, where all are needed), so that its stage would
            wait for ever.
    """
    have, stage = capacity(), request.stage
    least, most = (0.01, 1.0) if request.all_at_once else (0.1, TASK_CPUS)
    share = int(90 * free()["CPU"] / request.count) / 100
    cpus = request.cpus or max(least, min(most, share))
    together = request.count if request.all_at_once else 1
    if cpus * together > have["CPU"] or request.gpus * together > have["GPU"]:
        raise UserError(
            f"placing {stage}: {together} actor(s) need {cpus * together:g} CPUs and "
            f"{request.gpus * together:g} GPUs, but the cluster has {have['CPU']:g} and "
            f"{have['GPU']:g}. Lower scaling.{stage}, or add nodes."
        )
    return cpus
