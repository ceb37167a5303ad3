"""`clusters` from trajectories: sharded k-means; actors spread over the nodes hold the parts, the driver holds K x T.

A round broadcasts the centroids and adds up the members. After each round the state is stored, so a dead run loses one
round at most; a shard that dies is restarted, reads its parts again and gives the same answers.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from s2l_ray.core.kmeans import FitState, Shard, fit
from s2l_ray.core.store import Artifact, Part
from s2l_ray.core.tables import CLUSTERS, parquet_bytes, vectors
from s2l_ray.errors import UserError
from s2l_ray.progress import track
from s2l_ray.stages.edge import PartContext, capacity, part_context, reraise_user_errors
from s2l_ray.stages.work import Outcome, Work, part_dict, part_from

log = logging.getLogger("s2l_ray")
STATE = "rounds/latest.json"


def make(work: Work) -> Outcome:
    """Find the centroids, then write every part's assignments.

    Raises:
        UserError: k is larger than the number of scored rows or of distinct trajectories.
    """
    section, trajectories = work.config.clusters, work.manifests["trajectories"]
    if section.k > trajectories.info["scored"]:
        raise UserError(
            f"making clusters: clusters.k = {section.k}, but only {trajectories.info['scored']} rows have a trajectory. Lower k."
        )
    with _Shards(work) as shards, reraise_user_errors():
        with track("clusters", section.max_rounds, "rounds", _rounds_done(work)) as tracker:

            def on_round(state: FitState) -> None:
                work.artifact.write(STATE, json.dumps(state.to_dict()).encode())
                tracker.advance(
                    1, f"objective {state.history[-1].objective:.6g}, {state.history[-1].moves:,} moved"
                )

            found = fit(
                shards.call,
                k=section.k,
                seed=section.seed,
                max_rounds=section.max_rounds,
                tolerance=section.tolerance,
                resume=_saved_state(work),
                on_round=on_round,
            )
        spread = _spread(shards, found.centroids, found.sizes)
        parts = shards.write(found.centroids, work.artifact.finished_parts())
    if not found.converged:
        log.warning(
            "clusters: stopped after clusters.max_rounds = %d rounds, before the centroids came to rest",
            section.max_rounds,
        )
    info = {
        "k": section.k,
        "centroids": found.centroids.tolist(),
        "spread": spread.tolist(),
        "sizes": found.sizes.tolist(),
        "objective": found.objective,
        "objectives": [entry.objective for entry in found.history],
        "moves": [entry.moves for entry in found.history],
        "reseeded": sum(entry.reseeded for entry in found.history),
        "converged": found.converged,
        "steps": trajectories.info["steps"],
    }
    return Outcome(parts, info=info)


def _saved_state(work: Work) -> FitState | None:
    try:
        return FitState.from_dict(json.loads(work.artifact.read(STATE)))
    except FileNotFoundError:
        return None


def _rounds_done(work: Work) -> int:
    state = _saved_state(work)
    if state is not None:
        log.info("clusters: going on after round %d of an earlier run", state.round)
    return state.round if state is not None else 0


def _spread(shards: "_Shards", centroids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Standard deviation of each cluster's members around its centroid at every step, [K, T]; for pictures."""
    squares = sum(shards.call("spread", (centroids,)))
    return np.round(np.sqrt(squares / np.maximum(sizes, 1)[:, None]), 6)


@ray.remote
class ShardActor:
    """Holds the trajectories of some parts; reads them when first asked, and again after a restart."""

    def __init__(self, context: PartContext, parts: list[dict[str, Any]]) -> None:
        self.context, self.parts = context, parts
        self.shard: Shard | None = None

    def _loaded(self) -> Shard:
        if self.shard is None:
            self.shard = Shard(_read(self.context.inputs["trajectories"], raw)[1:] for raw in self.parts)
        return self.shard

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._loaded(), method)(*args)

    def write(self, number: int, centroids: np.ndarray) -> Part:
        """Write the assignments of one of this shard's parts; rows without a trajectory get nulls."""
        raw = self.parts[number]
        table, ids, _ = _read(self.context.inputs["trajectories"], raw)
        labels, distances = self._loaded().labels(number, centroids)
        missing = ~table["losses"].is_valid().to_numpy()
        clusters, distance = np.zeros(len(missing), np.int32), np.zeros(len(missing), np.float32)
        clusters[~missing], distance[~missing] = labels, distances
        columns = [table["example_id"], pa.array(clusters, mask=missing), pa.array(distance, mask=missing)]
        data = parquet_bytes(pa.table(dict(zip(CLUSTERS.names, columns, strict=True)), schema=CLUSTERS))
        part = part_from(raw)
        return self.context.write(
            part.index, table.num_rows, {"data": (".parquet", data)}, {"clustered": len(ids)}
        )


def _read(artifact: Artifact, raw: dict[str, Any]) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    table = artifact.read_part(part_from(raw), ["example_id", "losses"])
    valid_N, values = vectors(table["losses"], artifact.uri)
    return table, table["example_id"].to_numpy()[valid_N], values


class _Shards:
    """The shard actors, called all at once; answers come as they arrive."""

    def __init__(self, work: Work) -> None:
        parts = [part_dict(part) for part in work.manifests["trajectories"].parts]
        count = min(work.config.scaling.shards, len(parts))
        self.parts = [parts[number::count] for number in range(count)]
        # All shards or none: two jobs that each held half of their actors would wait for each other for ever. A tenth of the
        # CPUs stays free for whoever called this, such as a trial of a sweep.
        cpus = max(0.01, min(1.0, int(90 * capacity()["CPU"] / count) / 100))
        self.place = placement_group([{"CPU": cpus}] * count, strategy="SPREAD")
        ray.get(self.place.ready())
        losses = work.config.scaling.max_failures
        context = part_context(work)
        self.actors = [
            ShardActor.options(  # type: ignore[attr-defined]
                num_cpus=cpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.place, placement_group_bundle_index=number
                ),
                max_restarts=losses,
                max_task_retries=losses,
            ).remote(context, mine)
            for number, mine in enumerate(self.parts)
        ]

    def call(self, method: str, args: tuple[Any, ...]) -> Iterator[Any]:
        shared = ray.put(args)
        yield from _as_they_come([actor.call.remote(method, shared) for actor in self.actors])

    def write(self, centroids: np.ndarray, finished: dict[int, Part]) -> list[Part]:
        shared = ray.put(centroids)
        calls = [
            actor.write.remote(number, shared)
            for actor, mine in zip(self.actors, self.parts, strict=True)
            for number, raw in enumerate(mine)
            if raw["index"] not in finished
        ]
        made = {part.index: part for part in _as_they_come(calls)} | finished
        return [made[index] for index in sorted(made)]

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.place)


def _as_they_come(calls: list[Any]) -> Iterator[Any]:
    while calls:
        ready, calls = ray.wait(calls)
        yield from ray.get(ready)
