"""`clusters`: k-means of the loss trajectories."""

import math
from typing import Any

from s2l_ray.config import Config
from s2l_ray.contract.stage import Cost, Facts, Request, Stage
from s2l_ray.core.kmeans.features import bytes_of_row
from s2l_ray.core.model.schedule import stored_steps
from s2l_ray.core.selection.rules import by_cluster
from s2l_ray.core.storage.artifact import Artifact, artifact_at
from s2l_ray.errors import UserError


def identity(config: Config, assume: bool) -> dict[str, Any]:
    return config.clusters.model_dump(mode="json", exclude={"use"})


def inputs(config: Config) -> dict[str, str | Artifact]:
    uri = config.clusters.use
    base = {} if uri is None else {"base": artifact_at(uri, "clusters", "clusters.use")}
    return {"trajectories": "trajectories", **base}


def check(config: Config, facts: Facts) -> None:
    section = config.clusters
    if section.within == "all" and section.k > facts.scored:
        raise UserError(
            f"planning clusters: clusters.k = {section.k}, but only {facts.scored} of "
            f"{facts.rows} rows are scored. Lower clusters.k, or raise trajectories.sample."
        )
    named = section.steps if isinstance(section.steps, list) else []
    for steps in stored_steps(config, facts.rows):
        missing = [step for step in named if step not in steps]
        if missing:
            raise UserError(
                f"planning clusters: clusters.steps names {', '.join(map(str, missing))}, but "
                f"the steps that will be stored are {', '.join(map(str, steps))}. Change "
                "clusters.steps."
            )


def request(config: Config) -> Request:
    scaling = config.scaling.clusters
    return Request("actors", scaling.workers, scaling.cpus, all_at_once=True, stage="clusters")


def cost(config: Config, facts: Facts) -> Cost:
    """3 FLOPs for each row, centroid, feature and round; sources are taken as one."""
    section, scaling, rows = config.clusters, config.scaling.clusters, facts.scored
    num_features = section.num_features([proxy.checkpoints for proxy in config.proxy.each()])
    points = rows
    if section.points_per_centroid is not None:
        points = min(rows, section.points_per_centroid * section.k)
    flops = 3.0 * points * num_features * section.k * section.max_rounds
    held = rows * bytes_of_row(num_features) / scaling.workers
    return Cost(rows, flops=flops, memory=min(held, scaling.memory or math.inf))


CLUSTERS = Stage(
    name="clusters",
    version=4,
    make="s2l_ray.stages.clusters.make",
    identity=identity,
    inputs=inputs,
    wanted=lambda config: by_cluster(config.subset),
    check=check,
    request=request,
    cost=cost,
)
