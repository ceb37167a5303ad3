"""`clusters` from trajectories: sharded k-means on their features; actors spread over the nodes hold the parts, the driver K x F.

A round broadcasts the centroids and adds up the members, both along a tree of the actors. After each round the state is stored,
so a dead run loses one round at most; a shard that dies is restarted, reads its parts again and gives the same answers. With
clusters.within = source, one source after the other is fitted so; with clusters.use, centroids come from another artifact, the base.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from s2l_ray.config import Clusters
from s2l_ray.contract.work import Outcome, Work, part_dict, part_from
from s2l_ray.core.kmeans.features import bytes_of_row, check_finite, feature_steps, features
from s2l_ray.core.kmeans.grouped import GroupedShard, StreamedShard, View, fit_group, moved
from s2l_ray.core.kmeans.lloyd import FitResult, FitState
from s2l_ray.core.kmeans.shard import merged
from s2l_ray.core.storage.manifest import Manifest, Part, fingerprint
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.schemas import CLUSTERS, vectors
from s2l_ray.edge.parts import PartContext, part_context
from s2l_ray.edge.placement import actor_cpus
from s2l_ray.edge.user_errors import reraise_user_errors
from s2l_ray.errors import UserError
from s2l_ray.progress import Tracker, track

log = logging.getLogger("s2l_ray")
# Answers that one process waits for and adds up; where there are more shards, actors stand between it and the others. A message with
# its answer takes 0.6 to 1.5 ms of who asks, adding up hardly any of it, a further level 3 ms (tests/bench/bench_nodes.py): 16 is within
# a fifth of the best, leaves up to 16 shards as they are, and has 272 within two levels, 25 ms a round where one process takes 160.
FAN_IN = 16
Source = str | None  # whose rows are clustered together; None: all rows, of any source
MUST_MATCH = (
    "k",
    "within",
    "features",
    "steps",
    "initial",
    "weights",
)  # for another artifact's centroids to mean anything


def make(work: Work) -> Outcome:
    """Find the centroids, then write every part's assignments.

    Raises:
        UserError: k is larger than the number of scored rows or of distinct trajectories, features that cannot be made of the
            trajectories, a base that is made in another way.
    """
    section, trajectories = work.config.clusters, work.manifests["trajectories"]
    labels = feature_steps(trajectories.info["steps"], section)
    base = _base(work, labels)
    if section.within == "all" and not base and section.k > trajectories.info["scored"]:
        raise UserError(
            f"making clusters: clusters.k = {section.k}, but only {trajectories.info['scored']} rows have a trajectory. Lower k."
        )
    groups = _groups(section, trajectories, base)
    saved = _saved_states(work, groups)
    with _Shards(work, groups) as shards, reraise_user_errors():
        shards.wait_until_up()
        work.rows_began(time.time())
        done = sum(state.round for state in saved.values())
        with track(work.label, section.max_rounds * len(groups), "rounds", done) as tracker:
            found = [
                fit_group(
                    shards.call,
                    number,
                    section,
                    base=base.get(source),
                    resume=saved.get(source),
                    on_round=_on_round(work, source, tracker),
                )
                for number, source in enumerate(groups)
            ]
        spread = [_spread(shards, number, own) for number, own in enumerate(found)]
        changes = _moved(work, shards, groups, base, found) if base else None
        parts = shards.write([own.centroids for own in found], work.artifact.finished_parts())
    new_sources = [source for source in groups if source is not None and source not in base]
    fewer = {source: len(found[groups.index(source)].sizes) for source in new_sources}
    fewer = {source: count for source, count in fewer.items() if count < section.k}
    _tell(work, found, fewer)
    info = {
        "k": sum(len(own.centroids) for own in found),
        "cluster_sources": [
            source for source, own in zip(groups, found, strict=True) for _ in own.sizes
        ],
        "fewer": fewer,
        "centroids": _joined(own.centroids for own in found),
        "spread": _joined(spread),
        "sizes": _joined(own.sizes for own in found),
        "objective": sum(own.objective for own in found),
        **_history(found),
        "converged": all(own.converged for own in found),
        "features": section.features,
        "steps": labels,
    }
    if changes is not None:
        info["moved"] = {**changes, "new_sources": new_sources}
    return Outcome(parts, info=info)


def state_name(source: Source) -> str:
    """Where the state of a source's fit is kept until the artifact is committed; names of sources are hashed, being any text."""
    return "rounds/latest.json" if source is None else f"rounds/{fingerprint(source)}.json"


def _saved_states(work: Work, groups: list[Source]) -> dict[Source, FitState]:
    """What an earlier run, that did not end, has found of each group."""
    there = {f"rounds/{name}" for name in work.artifact.list("rounds")}
    saved = {
        source: FitState.from_dict(json.loads(work.artifact.read(state_name(source))))
        for source in groups
        if state_name(source) in there
    }
    for source, state in saved.items():
        log.info(
            "%s%s: going on after round %d of an earlier run", work.label, _of(source), state.round
        )
    return saved


def _of(source: Source) -> str:
    return "" if source is None else f" of {source}"


def _on_round(work: Work, source: Source, tracker: Tracker) -> Callable[[FitState], None]:
    def store(state: FitState) -> None:
        text = json.dumps({"source": source, **state.to_dict()})
        work.artifact.write(state_name(source), text.encode())
        last = state.history[-1]
        tracker.advance(1, f"objective{_of(source)} {last.objective:.6g}, {last.moves:,} moved")

    return store


def _base(work: Work, labels: list[list[int]]) -> dict[Source, np.ndarray]:
    """The centroids of clusters.use by source, as that artifact numbers them; empty where there is none.

    Raises:
        UserError: naming every field in which the two differ.
    """
    section = work.config.clusters
    if section.use is None:
        return {}
    manifest, mine = work.manifests["base"], section.model_dump(mode="json")
    differ = [
        f"{name} is {manifest.section.get(name)} there and {mine[name]} here"
        for name in MUST_MATCH
        if manifest.section.get(name) != mine[name]
    ]
    if not differ and manifest.info["steps"] != labels:
        differ = [f"the steps [proxy, step] are {manifest.info['steps']} there and {labels} here"]
    if differ:
        raise UserError(
            f"making clusters from those of {section.use}: expected the same features of the same trajectories, but {'; '.join(differ)}. "
            "Set these fields of clusters as they are there, or leave clusters.use out."
        )
    sources = manifest.info["cluster_sources"]
    centroids = np.array(manifest.info["centroids"], dtype=np.float32)
    return {
        source: centroids[[number for number, own in enumerate(sources) if own == source]]
        for source in dict.fromkeys(sources)
    }


def _groups(
    section: Clusters, trajectories: Manifest, base: dict[Source, np.ndarray]
) -> list[Source]:
    """Whose rows are clustered together, in the order of the cluster numbers: those of the base, then the new ones, sorted."""
    if section.within == "all":
        return [None]
    counts = trajectories.info["sources"]
    return [*base, *sorted(source for source in counts if counts[source] and source not in base)]


def _moved(
    work: Work,
    shards: "_Shards",
    groups: list[Source],
    base: dict[Source, np.ndarray],
    found: list[FitResult],
) -> dict[str, Any]:
    """How the base's clusters changed: their sizes there, those of the present rows under the base's centroids (`before`), how many
    rows refining moved to another cluster and how far each centroid went, and by how many there are more rows now."""
    all_moved = [
        moved(shards.call, number, base[source], found[number].centroids)
        for number, source in enumerate(groups)
        if source in base
    ]
    sizes = work.manifests["base"].info["sizes"]
    return {
        "base_sizes": sizes,
        "before": _joined(own.before for own in all_moved),
        "changed": sum(own.changed for own in all_moved),
        "shifts": _joined(own.shifts for own in all_moved),
        "new_rows": sum(int(own.sizes.sum()) for own in found) - sum(sizes),
    }


def _joined(arrays: Iterable[np.ndarray]) -> list[Any]:
    return [value for array in arrays for value in array.tolist()]


def _history(found: list[FitResult]) -> dict[str, Any]:
    """Objective and moves by round, added up over the groups; a group that has come to rest keeps its last objective."""
    histories = [own.history for own in found if own.history]
    rounds = range(max((len(history) for history in histories), default=0))
    return {
        "objectives": [
            sum(h[min(number, len(h) - 1)].objective for h in histories) for number in rounds
        ],
        "moves": [sum(h[number].moves for h in histories if number < len(h)) for number in rounds],
        "reseeded": sum(entry.reseeded for history in histories for entry in history),
    }


def _tell(work: Work, found: list[FitResult], fewer: dict[str, int]) -> None:
    section = work.config.clusters
    if fewer:
        log.warning(
            "%s: %d source(s) have fewer distinct trajectories than clusters.k = %d and get one cluster for each: %s",
            work.label,
            len(fewer),
            section.k,
            ", ".join(f"{source} ({count})" for source, count in list(fewer.items())[:10]),
        )
    moving = sum(not own.converged for own in found)
    if moving:
        log.warning(
            "%s: stopped after clusters.max_rounds = %d rounds, before the centroids%s came to rest",
            work.label,
            section.max_rounds,
            f" of {moving} source(s)" if section.within == "source" else "",
        )


def _spread(shards: "_Shards", number: int, found: FitResult) -> np.ndarray:
    """Standard deviation of each cluster's members around its centroid at every step, [K, F]; for pictures."""
    squares = sum(shards.call(View(number), "spread", (found.centroids,)))
    return np.round(np.sqrt(squares / np.maximum(found.sizes, 1)[:, None]), 6)


@ray.remote
class ShardActor:
    """Has the features of some parts: reads them when first asked, and again after a restart; or every time, see scaling.clusters.memory."""

    def __init__(
        self,
        context: PartContext,
        parts: list[dict[str, Any]],
        groups: list[Source],
        steps: list[list[int]],
        below: list[Any],
    ) -> None:
        """Have these parts, and add what the actors `below` answer to every answer; what a restarted actor is made from."""
        self.context, self.parts, self.groups, self.steps = context, parts, groups, steps
        self.below = below
        self.shard: GroupedShard | StreamedShard | None = None

    def _loaded(self) -> GroupedShard | StreamedShard:
        if self.shard is None:
            limit, num_rows = (
                self.context.config.scaling.clusters.memory,
                sum(raw["rows"] for raw in self.parts),
            )
            columns = len(feature_steps(self.steps, self.context.config.clusters))
            if limit is not None and num_rows * bytes_of_row(columns) > limit:
                self.shard = StreamedShard(
                    len(self.parts), lambda number: self._read(self.parts[number])
                )
            else:
                self.shard = GroupedShard(self._read(raw) for raw in self.parts)
        return self.shard

    def _read(self, raw: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, features and group numbers of a part's scored rows."""
        artifact, section = self.context.inputs["trajectories"], self.context.config.clusters
        by_source = section.within == "source"
        table = artifact.read_part(
            part_from(raw), ["example_id", *(["source"] if by_source else []), "losses"]
        )
        valid_N, losses = vectors(table["losses"], artifact.uri)
        ids = table["example_id"].to_numpy()[valid_N]
        check_finite(ids, losses, self.steps)
        groups = np.zeros(len(ids), np.int64)
        if by_source:
            numbers = pc.index_in(table["source"], value_set=pa.array(self.groups))
            groups = numbers.fill_null(-1).to_numpy()[valid_N].astype(np.int64)
        if len(groups) and groups.min() < 0:
            raise UserError(
                f"reading {artifact.uri}: part {raw['index']} has rows of a source that the manifest does not list. Remove the "
                "artifact's folder and run again."
            )
        return ids, features(losses, self.steps, section), groups

    def call(self, view: View, method: str, args: tuple[Any, ...]) -> Any:
        """What a shard of all rows here and below would answer."""
        coming = _asked(self.below, view, method, args)  # these work while this one does
        own = self._loaded().call(view, method, args)
        return merged(method, args, itertools.chain([own], coming))

    def write(self, numbers: list[int], centroids: list[np.ndarray]) -> list[Part]:
        """Write the assignments of some of this shard's parts; rows without a trajectory get nulls."""
        return [self._write(number, centroids) for number in numbers]

    def _write(self, number: int, centroids: list[np.ndarray]) -> Part:
        part = part_from(self.parts[number])
        table = self.context.inputs["trajectories"].read_part(part, ["example_id", "reason"])
        labels, distances = self._loaded().labels(number, centroids)
        missing = table["reason"].is_valid().to_numpy()  # who has no trajectory has a reason
        clusters, distance = np.zeros(len(missing), np.int32), np.zeros(len(missing), np.float32)
        clusters[~missing], distance[~missing] = labels, distances
        columns = [
            table["example_id"],
            pa.array(clusters, mask=missing),
            pa.array(distance, mask=missing),
        ]
        data = parquet_bytes(
            pa.table(dict(zip(CLUSTERS.names, columns, strict=True)), schema=CLUSTERS)
        )
        return self.context.write(
            part.index, table.num_rows, {"data": (".parquet", data)}, {"clustered": len(labels)}
        )


class _Shards:
    """The shard actors in a tree, below this process; all work at once."""

    def __init__(self, work: Work, groups: list[Source]) -> None:
        steps = work.manifests["trajectories"].info["steps"]
        parts = [part_dict(part) for part in work.manifests["trajectories"].parts]
        request = replace(work.request, count=min(work.request.count, len(parts)))
        count = request.count
        self.parts = [parts[number::count] for number in range(count)]
        # All shards or none: two jobs that each held half of their actors would wait for each other for ever. A tenth of the
        # free CPUs stays so for whoever called this, such as a trial of a sweep.
        cpus = actor_cpus(request)
        self.place = placement_group([{"CPU": cpus}] * count, strategy="SPREAD")
        ray.get(self.place.ready())
        losses = work.config.scaling.max_failures
        context = part_context(work)
        self.actors: list[Any] = [None] * count
        for number in reversed(range(count)):  # whoever is below comes first
            self.actors[number] = ShardActor.options(  # type: ignore[attr-defined]
                num_cpus=cpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.place, placement_group_bundle_index=number
                ),
                max_restarts=losses,
                max_task_retries=losses,
            ).remote(context, self.parts[number], groups, steps, self._below(number))

    def _below(self, number: int) -> list[Any]:
        """The actors whose answers actor `number` adds to its own; -1 is this process."""
        return self.actors[FAN_IN * (number + 1) : FAN_IN * (number + 2)]

    def wait_until_up(self) -> None:
        """Wait for the actors' processes; they read their parts when first asked."""
        ray.get([actor.__ray_ready__.remote() for actor in self.actors])

    def call(self, view: View, method: str, args: tuple[Any, ...]) -> Iterator[Any]:
        return _asked(self._below(-1), view, method, args)

    def write(self, centroids: list[np.ndarray], finished: dict[int, Part]) -> list[Part]:
        shared = ray.put(centroids)
        missing = [
            [number for number, raw in enumerate(mine) if raw["index"] not in finished]
            for mine in self.parts
        ]
        calls = [
            actor.write.remote(numbers, shared)
            for actor, numbers in zip(self.actors, missing, strict=True)
            if numbers
        ]
        made = {part.index: part for parts in _as_they_come(calls) for part in parts} | finished
        return [made[index] for index in sorted(made)]

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.place)


def _asked(actors: list[Any], view: View, method: str, args: tuple[Any, ...]) -> Iterator[Any]:
    """Ask actors now, with the arguments once in the object store for all of them; the answers come as they are ready."""
    shared = ray.put(args) if actors else None
    return _as_they_come([actor.call.remote(view, method, shared) for actor in actors])


def _as_they_come(calls: list[Any]) -> Iterator[Any]:
    while calls:
        ready, calls = ray.wait(calls)
        yield from ray.get(ready)
