"""What a job would cost, for --dry-run, and whether the machines can hold it. Estimates only."""

import glob
import os

from rich.table import Table

from s2l_ray.config import Scaling
from s2l_ray.contract.stage import Cost
from s2l_ray.display import Console, say
from s2l_ray.edge import placement
from s2l_ray.edge.packing import Host
from s2l_ray.errors import UserError
from s2l_ray.pipeline.execution import check_models, share
from s2l_ray.pipeline.planning import Node, Plan

COLUMNS = (
    "stage", "variants", "plan", "rows", "tokens", "FLOPs", "memory a worker", "workers",
)  # fmt: skip


def cost(node: Node, plan: Plan) -> Cost:
    """The estimate for one artifact."""
    return node.stage.cost(node.config, plan.facts[node.variants[0]])


def dry_run(plan: Plan) -> None:
    """Print the plan, and refuse what is known to fail, as far as models and machines are at hand.

    Data that are not here are planned for other machines: what does not fit here is only said.

    Raises:
        UserError: a model cannot be used, or workers do not fit on the machines.
    """
    check_models(missing(plan), assume=True)
    refused = print_plan(plan)
    # The raw files are read by the first.
    if refused is not None and plan.nodes[0].ranges:
        raise refused


def missing(plan: Plan) -> list[Node]:
    """What would be made."""
    return [node for node in plan.nodes if node.artifact.committed() is None]


def print_plan(plan: Plan) -> UserError | None:
    """The plan as a table, and whether the machines can hold it; returns why they cannot."""
    table = Table(title=f"plan of {plan.job.first.run.name} in {plan.store.uri}")
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < 3 else "right")
    to_make = missing(plan)
    labels = {node.label for node in to_make}
    for node in plan.nodes:
        everyone = len(node.variants) == len(plan.job.variants)
        table.add_row(
            node.stage.name,
            "all" if everyone else ", ".join(node.variants),
            "make" if node.label in labels else "reuse",
            *_cells(cost(node, plan)),
            str(node.request.count or ""),
        )
    Console(wide=True).print(table)
    if not to_make:
        say("everything is there already; nothing would be made.")
        return None
    where, hosts = _machines(plan.job.first.scaling)
    refused = _refusal(to_make, hosts)
    fits = "it fits." if refused is None else f"it does NOT fit: {refused}"
    say(f"needed at once: {_largest(to_make)}; {where}: {fits}")
    return refused


def _cells(estimate: Cost) -> list[str]:
    """Rows, tokens, FLOPs and memory; FLOPs and memory of 0 come of a model that is not at hand."""
    rows, tokens, flops, memory = estimate.rows, estimate.tokens, estimate.flops, estimate.memory
    return [
        "" if rows is None else f"{rows:,}",
        "" if tokens is None else f"{tokens:.3g}",
        "" if flops is None else f"{flops:.3g}" if flops else "unknown",
        "" if memory is None else f"{memory / 2**30:,.2f} GiB" if memory else "unknown",
    ]


def _largest(to_make: list[Node]) -> str:
    """What the largest request needs at once."""
    requests = [node.request for node in to_make]
    cpus = max(request.count * (request.cpus or 1.0) for request in requests)
    gpus = max(request.count * request.gpus for request in requests)
    return f"up to {cpus:g} CPUs and {gpus:g} GPUs"


def _refusal(to_make: list[Node], hosts: list[Host]) -> UserError | None:
    """Why hosts cannot hold what a stage needs at once; None: they can."""
    share(to_make)
    for node in to_make:
        try:
            placement.check_placement(node.request, node.at_once, hosts)
        except UserError as error:
            return error
    return None


def _machines(scaling: Scaling) -> tuple[str, list[Host]]:
    """Where the run would work, in words, and the hosts there (as far as they can autoscale)."""
    address = os.environ.get("RAY_ADDRESS")
    if address != "local":
        from s2l_ray.edge import session

        if session.join_running():
            hosts = placement.hosts()
            have = placement.capacity(hosts)
            return (
                f"the cluster has or can grow to {have['CPU']:g} CPUs and {have['GPU']:g} GPUs",
                hosts,
            )
    here = Host(float(scaling.local_cpus or os.cpu_count() or 1), float(num_gpus()))
    limit = " (scaling.local_cpus)" if scaling.local_cpus else ""
    return (
        f"there is no Ray cluster to ask (RAY_ADDRESS is {address or 'not set'}), this machine has "
        f"{here.cpus:g} CPUs{limit} and {here.gpus:g} GPUs",
        [here],
    )


def num_gpus() -> int:
    """NVIDIA GPUs of this machine."""
    return len(glob.glob("/dev/nvidia[0-9]*"))
