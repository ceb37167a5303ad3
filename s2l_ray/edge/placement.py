"""What the cluster holds, and what a stage's request may take of it.

Ray is imported only where the cluster is asked, so that a plan can ask the same of hosts it knows.
"""

from collections import Counter
from collections.abc import Sequence

from s2l_ray.contract.stage import Request
from s2l_ray.edge import packing
from s2l_ray.edge.packing import Host
from s2l_ray.errors import UserError

Labels = Sequence[tuple[str, str]]
# A little less than one, so that a task that makes a part fits beside the trial of a sweep.
TASK_CPUS = 0.9
# Of one task that reads and tokenises; small, so that readers find room beside training workers.
READER_CPUS = 0.25
READERS_PER_TRAINING = 2


def hosts() -> list[Host]:
    """The hosts of the cluster; what it can grow by, where that is known, stands as one more."""
    import ray
    from ray._private.state import state

    alive = [(node["Resources"], node.get("Labels")) for node in ray.nodes() if node["Alive"]]
    found = [Host(have.get("CPU", 0.0), have.get("GPU", 0.0), labels) for have, labels in alive]
    could = state.get_max_resources_from_cluster_config() or {}
    more = Host(
        max(0.0, float(could.get("CPU", 0)) - sum(host.cpus for host in found)),
        max(0.0, float(could.get("GPU", 0)) - sum(host.gpus for host in found)),
    )
    return [*found, more]


def capacity(found: Sequence[Host]) -> dict[str, float]:
    """CPUs and GPUs of all hosts."""
    return {"CPU": sum(host.cpus for host in found), "GPU": sum(host.gpus for host in found)}


def free() -> dict[str, float]:
    """Of the cluster's capacity, what this job's training workers do not hold."""
    from s2l_ray.edge import worker_pool

    held = worker_pool.held()
    return {kind: amount - held[kind] for kind, amount in capacity(hosts()).items()}


def make_room(request: Request) -> None:
    """End idle training workers where they hold what a request for actors or tasks needs."""
    if request.kind not in ("actors", "tasks"):
        return
    from s2l_ray.edge import worker_pool

    left = free()
    cpus = max(TASK_CPUS, request.count * (request.cpus or 0.0))
    if left["CPU"] < cpus or left["GPU"] < request.count * request.gpus:
        worker_pool.end_idle()


def check_placement(request: Request, at_once: int, found: Sequence[Host]) -> None:
    """Refuse a request that hosts cannot hold before the first stage starts, not hours later.

    Args:
        at_once: see `worker_cpus`.

    Raises:
        UserError: it cannot be held.
    """
    if request.kind == "workers":
        worker_cpus(request, at_once, found)
    elif request.kind == "actors":
        actor_cpus(request, found)


def worker_cpus(request: Request, at_once: int, found: Sequence[Host] = ()) -> float:
    """CPUs of one training worker. The tasks that feed it need some too, or it would wait for ever.

    Both are counted host by host: what is left on several hosts is of no use to one reader.

    Args:
        at_once: how many trainings may go on at the same time; each takes at most such a share.
        found: the hosts; default: those of the cluster.

    Raises:
        UserError: the request cannot be held beside its readers.
    """
    everywhere = found or hosts()
    found = [host for host in everywhere if host.has(request.labels)]
    elsewhere = [host for host in everywhere if host not in found]
    have, stage, count = capacity(found), request.stage, request.count
    workers = count * at_once
    who = f"{count} workers{_with_labels(request)}"
    remedy = f"Lower scaling.{stage}.workers"
    if at_once > 1:
        who = f"{at_once} trainings side by side of {count} workers each{_with_labels(request)}"
        remedy += " or scaling.side_by_side"
    if request.gpus * workers > have["GPU"]:
        raise UserError(
            f"placing {stage}: {who} with scaling.{stage}.gpus = {request.gpus} need more than the "
            f"{have['GPU']:g} GPUs that there are. {remedy}, or add nodes."
        )
    room = packing.holds(elsewhere, READER_CPUS)
    readers = max(0, READERS_PER_TRAINING * at_once - room)
    if request.cpus is None:
        share = packing.worker_share(found, workers, request.gpus, READER_CPUS, readers)
    else:
        left = packing.readers_left(found, workers, request.cpus, request.gpus, READER_CPUS)
        share = request.cpus if left is not None and left >= readers else None
    if share is None:
        cpus = request.cpus or packing.SHARES[-1]
        raise UserError(
            f"placing {stage}: {who} take {cpus * workers:g} of {have['CPU']:g} CPUs "
            f"({_listed(found)}), at most {packing.holds(found, cpus, request.gpus)} of {workers} "
            f"fit, and {readers} tasks of {READER_CPUS} CPUs that read data must find room beside "
            f"them on single hosts. {remedy} or scaling.{stage}.cpus, or leave the latter out."
        )
    return share


def _with_labels(request: Request) -> str:
    labels = ", ".join(f"{name}={value}" for name, value in request.labels)
    return f" on hosts with {labels}" if labels else ""


def _listed(found: Sequence[Host]) -> str:
    """The CPUs of hosts, such as `2 x 4 + 1 x 8`."""
    counts = Counter(host.cpus for host in found if host.cpus)
    return " + ".join(f"{count} x {cpus:g}" for cpus, count in counts.items()) or "no host"


def shortage(
    stage: str, count: int, cpus: float, gpus: float = 0.0, labels: Labels = ()
) -> str | None:
    """What the cluster lacks to hold processes that are needed all at once; None: nothing."""
    found = [host for host in hosts() if host.has(labels)]
    fit = packing.holds(found, cpus, gpus)
    if fit >= count:
        return None
    with_gpus = f" and {gpus:g} GPUs" if gpus else ""
    return (
        f"placing {stage}: {count} processes of {cpus:g} CPUs{with_gpus} are needed at once, and "
        f"{fit} fit on the hosts that are left ({_listed(found)} CPUs). Add nodes, or lower "
        f"scaling.{stage}, and run the same command again."
    )


def actor_cpus(request: Request, found: Sequence[Host] = ()) -> float:
    """CPUs of one actor: as asked for, or else those of a task where all fit, and an equal share of
    nine tenths of what is free where they do not.

    The last tenth is left for whoever waits for the actors, such as the trial of a sweep.

    Args:
        found: the hosts, all of them free; default: those of the cluster.

    Raises:
        UserError: not even one actor fits (not all, where all are needed), so that its stage would
            wait for ever.
    """
    left = capacity(found) if found else free()
    found = [host for host in found or hosts() if host.has(request.labels)]
    have, stage = capacity(found), request.stage
    least, most = (0.01, 1.0) if request.all_at_once else (0.1, TASK_CPUS)
    share = int(90 * left["CPU"] / request.count) / 100
    cpus = request.cpus or max(least, min(most, share))
    together = request.count if request.all_at_once else 1
    if request.all_at_once and request.cpus is None:
        cpus = packing.actor_share(found, together, cpus) or cpus
    if packing.holds(found, cpus, request.gpus) < together:
        raise UserError(
            f"placing {stage}: {together} actor(s){_with_labels(request)} need "
            f"{cpus * together:g} CPUs and {request.gpus * together:g} GPUs, but there are "
            f"{have['CPU']:g} and {have['GPU']:g}. Lower scaling.{stage}, or add nodes."
        )
    return cpus
