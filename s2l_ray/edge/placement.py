"""What the cluster holds, and what a stage may take of it."""

import ray

from s2l_ray.config import Config
from s2l_ray.edge import worker_pool as groups
from s2l_ray.errors import UserError

# A little less than one, so that a task that makes a part fits beside the trial of a sweep.
TASK_CPUS = 0.9


# Of one task that reads and tokenises; small, so that readers always find room beside the workers.
READER_CPUS = 0.25


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
