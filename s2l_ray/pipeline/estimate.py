"""What a job would cost, for --dry-run: rows, tokens, FLOPs and memory of each stage, and whether the machines can hold it.

Estimates only: 6 FLOPs a parameter and token for training, 2 for a forward pass (paper facts, section 2.3); memory counts
weights, gradients and optimiser state as ZeRO shards them, not activations.
"""

import math
import os
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from s2l_ray.config import Config, Training
from s2l_ray.core.kmeans.features import bytes_of_row
from s2l_ray.core.model import scoring
from s2l_ray.core.model.loading import output_shape, parameters
from s2l_ray.core.text.byte_tokenizer import BYTES
from s2l_ray.pipeline.planning import Node, Plan

BYTES_PER_TOKEN = 4.0  # of English text, for tokenizers that are not byte-level
DTYPE_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Cost:
    """Of one stage: rows, tokens and FLOPs (None: not known), bytes a worker, and what it needs at once."""

    rows: int | None = None
    tokens: float | None = None
    flops: float | None = None
    memory: float | None = None
    workers: int = 0


def cost(node: Node, made_plan: Plan) -> Cost:
    """The estimate for one artifact."""
    config, variant = node.config, node.variants[0]
    rows = made_plan.rows[variant]
    per_row = _tokens_per_row(made_plan, variant)
    scaling = config.scaling
    budget = (
        config.subset.budget
        if isinstance(config.subset.budget, int)
        else int(config.subset.budget * rows * config.trajectories.sample)
    )
    if node.stage.name == "proxy":
        members = [(section, parameters(section.model)) for section in config.proxy.each()]
        tokens = sum(
            _trained(section, rows) * min(per_row, section.max_length) for section, _ in members
        )
        flops = [
            6.0 * (size or 0) * _trained(s, rows) * min(per_row, s.max_length)
            for s, size in members
        ]
        memory = max(_training_bytes(s, size, scaling.proxy_workers) for s, size in members)
        return Cost(rows, tokens, sum(flops), memory, scaling.proxy_workers)
    if node.stage.name == "trajectories":
        return _scoring(config, rows * config.trajectories.sample, per_row)
    if node.stage.name == "clusters":
        columns = config.clusters.num_features(
            [section.checkpoints for section in config.proxy.each()]
        )
        return Cost(
            rows,
            None,
            3.0
            * _clustered(config, rows)
            * columns
            * config.clusters.k
            * config.clusters.max_rounds,
            min(rows * bytes_of_row(columns) / scaling.shards, scaling.shard_memory or math.inf),
            scaling.shards,
        )
    if node.stage.name == "target" and config.target is not None:
        size = parameters(config.target.model)
        tokens = _trained(config.target, budget) * min(per_row, config.target.max_length)
        return Cost(
            budget,
            tokens,
            6.0 * (size or 0) * tokens,
            _training_bytes(config.target, size, scaling.target_workers),
            scaling.target_workers,
        )
    return Cost(
        budget if node.stage.name == "subset" else rows if node.stage.name == "examples" else None
    )


def _scoring(config: Config, rows: float, per_row: float) -> Cost:
    """Of the rows at every checkpoint of every proxy, step 0 included; half of a row's tokens are taken as learned."""
    section, total, held = config.trajectories, 0.0, 0
    for proxy in config.proxy.each():
        size, length = parameters(proxy.model) or 0, min(per_row, proxy.max_length)
        one_row = scoring.flops(
            size, output_shape(proxy.model), [length], [length / 2], section.statistics
        )
        total += rows * (proxy.checkpoints + 1) * one_row
        held += size * (proxy.checkpoints + 1)
    memory = held * DTYPE_BYTES[section.dtype]
    return Cost(int(rows), rows * per_row, total, memory, config.scaling.scorers)


def _clustered(config: Config, rows: int) -> int:
    """Rows on which a round of k-means looks, sources taken as one."""
    points = config.clusters.points_per_centroid
    return rows if points is None else min(rows, points * config.clusters.k)


def _trained(section: Training, rows: int) -> int:
    return (
        rows * section.epochs
        if section.epochs is not None
        else section.global_batch * int(section.steps or 0)
    )


def _tokens_per_row(made_plan: Plan, variant: str) -> float:
    config = made_plan.job.variants[variant]
    if config.examples.expected_tokens_per_row is not None:
        return config.examples.expected_tokens_per_row
    per_token = 1.0 if config.proxy.tokenizer == BYTES else BYTES_PER_TOKEN
    return made_plan.text_bytes[variant] / max(1, made_plan.rows[variant]) / per_token


def _training_bytes(section: Training, size: int | None, workers: int) -> float:
    """ZeRO's table: 1 shards the optimiser (12 bytes a parameter), 2 also the fp32 gradients (4), 3 also the weights."""
    weights, gradients, optimiser = DTYPE_BYTES[section.dtype], 4, 12
    shared = {1: optimiser, 2: optimiser + gradients, 3: optimiser + gradients + weights}[
        section.zero_stage
    ]
    return (size or 0) * (weights + gradients + optimiser - shared + shared / workers)


def print_plan(made_plan: Plan) -> None:
    """The plan as a table, and whether there are machines for it."""
    table = Table(title=f"plan of {made_plan.job.first.run.name} in {made_plan.store.uri}")
    for name in (
        "stage",
        "variants",
        "plan",
        "rows",
        "tokens",
        "FLOPs",
        "memory a worker",
        "workers",
    ):
        table.add_column(name, justify="left" if name in ("stage", "variants", "plan") else "right")
    costs = []
    for node in made_plan.nodes:
        needs = cost(node, made_plan)
        reused = node.artifact.committed() is not None
        costs += [] if reused else [(node.config, node.stage.name, needs)]
        everyone = len(node.variants) == len(made_plan.job.variants)
        table.add_row(
            node.stage.name,
            "all" if everyone else ", ".join(node.variants),
            "reuse" if reused else "make",
            "" if needs.rows is None else f"{needs.rows:,}",
            "" if needs.tokens is None else f"{needs.tokens:.3g}",
            "unknown" if needs.flops == 0 else "" if needs.flops is None else f"{needs.flops:.3g}",
            ""
            if needs.memory is None
            else "unknown"
            if not needs.memory
            else f"{needs.memory / 2**30:,.2f} GiB",
            str(needs.workers or ""),
        )
    Console(width=max(118, Console().width)).print(table)
    print(machines(costs))


def machines(costs: list[tuple[Config, str, Cost]]) -> str:
    """What the largest stage needs at once, beside what there is (as far as the cluster can autoscale)."""
    gpus = max(
        [
            needs.workers * config.scaling.gpus_per_worker
            for config, name, needs in costs
            if name != "clusters"
        ],
        default=0.0,
    )
    cpus = max(
        [needs.workers * (config.scaling.cpus_per_worker or 1.0) for config, _, needs in costs],
        default=0.0,
    )
    need = f"needed at once: up to {cpus:g} CPUs and {gpus:g} GPUs"
    if not costs:
        return "everything is there already; nothing would be made."
    if "RAY_ADDRESS" not in os.environ or os.environ["RAY_ADDRESS"] == "local":
        return f"{need}; there is no Ray cluster to ask (RAY_ADDRESS is not set), this machine has {os.cpu_count()} CPUs."
    from s2l_ray.edge import placement, session

    session.connect(costs[0][0])
    have = placement.capacity()
    verdict = (
        "it fits"
        if have["CPU"] >= cpus and have["GPU"] >= gpus
        else "it does NOT fit: lower the workers in scaling, or add nodes"
    )
    return f"{need}; the cluster has or can grow to {have['CPU']:g} CPUs and {have['GPU']:g} GPUs: {verdict}."
