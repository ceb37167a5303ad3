"""What a job would cost, for --dry-run, and whether the machines can hold it. Estimates only."""

import os

from rich.table import Table

from s2l_ray.config import Job
from s2l_ray.contract.stage import Cost, Request
from s2l_ray.display import Console, say
from s2l_ray.pipeline.planning import Node, Plan

COLUMNS = (
    "stage", "variants", "plan", "rows", "tokens", "FLOPs", "memory a worker", "workers",
)  # fmt: skip


def cost(node: Node, plan: Plan) -> Cost:
    """The estimate for one artifact."""
    return node.stage.cost(node.config, plan.facts[node.variants[0]])


def print_plan(plan: Plan) -> None:
    """The plan as a table, and whether there are machines for it."""
    table = Table(title=f"plan of {plan.job.first.run.name} in {plan.store.uri}")
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number < 3 else "right")
    requests = []
    for node in plan.nodes:
        reused = node.artifact.committed() is not None
        requests += [] if reused else [node.request]
        everyone = len(node.variants) == len(plan.job.variants)
        table.add_row(
            node.stage.name,
            "all" if everyone else ", ".join(node.variants),
            "reuse" if reused else "make",
            *_cells(cost(node, plan)),
            str(node.request.count or ""),
        )
    Console(wide=True).print(table)
    say(machines(plan.job, requests))


def _cells(estimate: Cost) -> list[str]:
    """Rows, tokens, FLOPs and memory; FLOPs and memory of 0 come of a model that is not at hand."""
    rows, tokens, flops, memory = estimate.rows, estimate.tokens, estimate.flops, estimate.memory
    return [
        "" if rows is None else f"{rows:,}",
        "" if tokens is None else f"{tokens:.3g}",
        "" if flops is None else f"{flops:.3g}" if flops else "unknown",
        "" if memory is None else f"{memory / 2**30:,.2f} GiB" if memory else "unknown",
    ]


def machines(job: Job, requests: list[Request]) -> str:
    """What the largest request needs at once, beside what there is (as far as it can autoscale)."""
    if not requests:
        return "everything is there already; nothing would be made."
    cpus = max(request.count * (request.cpus or 1.0) for request in requests)
    gpus = max(request.count * request.gpus for request in requests)
    need = f"needed at once: up to {cpus:g} CPUs and {gpus:g} GPUs"
    address = os.environ.get("RAY_ADDRESS")
    if address in (None, "local"):
        return (
            f"{need}; there is no Ray cluster to ask (RAY_ADDRESS is {address or 'not set'}), this "
            f"machine has {os.cpu_count()} CPUs."
        )
    from s2l_ray.edge import placement, session

    session.connect(job.first.scaling)
    have = placement.capacity()
    fits = have["CPU"] >= cpus and have["GPU"] >= gpus
    remedy = "it does NOT fit: lower the workers in scaling, or add nodes"
    return (
        f"{need}; the cluster has or can grow to {have['CPU']:g} CPUs and {have['GPU']:g} GPUs: "
        f"{'it fits' if fits else remedy}."
    )
