"""Actors that hold the rows to cluster, spread over the nodes, and the driver's handle on them.

Every actor answers a query itself; the answers are merged along a tree of tasks. An actor that dies
is restarted, reads its parts again and gives the same answers.
"""

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from s2l_ray.contract.work import Work
from s2l_ray.core.kmeans.features import bytes_of_row, check_finite, feature_steps, features
from s2l_ray.core.kmeans.process_rows import HeldRows, ProcessRows, Rows, StreamedRows
from s2l_ray.core.query import Query
from s2l_ray.core.storage.info import TrajectoriesInfo
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.schemas import CLUSTERS, vectors
from s2l_ray.edge.parts import PartContext, part_context
from s2l_ray.edge.placement import actor_cpus, shortage
from s2l_ray.edge.reduction import reduced
from s2l_ray.edge.waiting import Patience, wait_for
from s2l_ray.errors import UserError

Answer = TypeVar("Answer")
# Whose rows are clustered together. None: all rows, of any source.
Source = str | None


@ray.remote
class ShardActor:
    """Has the features of some parts.

    It reads them when first asked, and again after a restart; where they take more memory than
    scaling.clusters.memory, for every query.
    """

    def __init__(
        self,
        context: PartContext,
        parts: list[Part],
        sources: list[Source],
        steps: list[list[int]],
    ) -> None:
        """With these parts; a restarted actor is made from the same arguments.

        Args:
            sources: whose rows are clustered together, in the order of their numbers.
            steps: [proxy, step] of every stored loss.
        """
        self.context, self.parts, self.sources, self.steps = context, parts, sources, steps
        self.rows: ProcessRows | None = None

    def answer(self, query: Query[ProcessRows, Answer]) -> Answer:
        """What the rows of these parts answer."""
        return query.of(self._loaded())

    def write(self, numbers: list[int], centroids: list[np.ndarray]) -> list[Part]:
        """Write the assignments of some of these parts; rows without a trajectory get nulls."""
        return [self._write(number, centroids) for number in numbers]

    def _loaded(self) -> ProcessRows:
        if self.rows is None:
            limit = self.context.config.scaling.clusters.memory
            num_rows = sum(part.rows for part in self.parts)
            columns = len(feature_steps(self.steps, self.context.config.clusters))
            if limit is not None and num_rows * bytes_of_row(columns) > limit:
                self.rows = StreamedRows(
                    len(self.parts), lambda number: self._read(self.parts[number])
                )
            else:
                self.rows = HeldRows(self._read(part) for part in self.parts)
        return self.rows

    def _read(self, part: Part) -> Rows:
        """Ids, features and source numbers of a part's scored rows."""
        artifact, section = self.context.inputs["trajectories"], self.context.config.clusters
        by_source = section.within == "source"
        columns = ["example_id", *(["source"] if by_source else []), "losses"]
        table = artifact.read_part(part, columns)
        valid_N, losses = vectors(table["losses"], artifact.uri)
        ids = table["example_id"].to_numpy()[valid_N]
        check_finite(ids, losses, self.steps)
        sources = np.zeros(len(ids), np.int64)
        if by_source:
            numbers = pc.index_in(table["source"], value_set=pa.array(self.sources))
            sources = numbers.fill_null(-1).to_numpy()[valid_N].astype(np.int64)
        if len(sources) and sources.min() < 0:
            raise UserError(
                f"reading {artifact.uri}: part {part.index} has rows of a source that the "
                "manifest does not list. Remove the artifact's folder and run again."
            )
        return ids, features(losses, self.steps, section), sources

    def _write(self, number: int, centroids: list[np.ndarray]) -> Part:
        part = self.parts[number]
        table = self.context.inputs["trajectories"].read_part(part, ["example_id", "reason"])
        labels, distances = self._loaded().labels(number, centroids)
        # A row that has no trajectory has a reason.
        missing = table["reason"].is_valid().to_numpy()
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


class ShardActors:
    """The shard actors, while the stage runs; all work at once."""

    def __init__(self, work: Work, sources: list[Source]) -> None:
        steps = work.info("trajectories", TrajectoriesInfo).steps
        parts = [part.for_reading for part in work.manifests["trajectories"].parts]
        request = replace(work.request, count=min(work.request.count, len(parts)))
        count = request.count
        self.parts = [parts[number::count] for number in range(count)]
        # All actors or none: two jobs that each held half of theirs would wait for ever.
        # A tenth of the free CPUs stays free for whoever called this, such as a trial of a sweep.
        cpus = actor_cpus(request)
        self.place = placement_group([{"CPU": cpus}] * count, strategy="SPREAD")
        # As long as the actors live: a host that holds some may be lost, and none be left for them.
        self.patience = Patience(
            work.label,
            f"{count} shards of {cpus:g} CPUs to be placed at once; others hold these CPUs",
            lambda: shortage("clusters", count, cpus),
        )
        try:
            wait_for([self.place.ready()], self.patience)
        except BaseException:
            remove_placement_group(self.place)
            raise
        self.patience.what = ""
        failures, context = work.config.scaling.max_failures, part_context(work)
        self.actors: list[Any] = [
            ShardActor.options(  # type: ignore[attr-defined]
                num_cpus=cpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.place, placement_group_bundle_index=number
                ),
                max_restarts=failures,
                max_task_retries=failures,
            ).remote(context, mine, sources, steps)
            for number, mine in enumerate(self.parts)
        ]

    def wait_until_up(self) -> None:
        """Wait for the actors' processes; they read their parts when first asked."""
        ready = [actor.__ray_ready__.remote() for actor in self.actors]
        wait_for(ready, self.patience)
        ray.get(ready)

    def ask(self, query: Query[ProcessRows, Answer]) -> Answer:
        """What the rows of all actors answer.

        Raises:
            UserError: one that an actor raised.
        """
        shared = ray.put(query)
        answers = [actor.answer.remote(shared) for actor in self.actors]
        return reduced(query, answers, self.patience)

    def write(self, centroids: list[np.ndarray], finished: dict[int, Part]) -> list[Part]:
        """Write the parts that are not finished; returns all parts in their order.

        Args:
            centroids: float32 [K, F] of every source.
            finished: by index, from an earlier run that did not end.
        """
        shared = ray.put(centroids)
        missing = [
            [number for number, part in enumerate(mine) if part.index not in finished]
            for mine in self.parts
        ]
        calls = [
            actor.write.remote(numbers, shared)
            for actor, numbers in zip(self.actors, missing, strict=True)
            if numbers
        ]
        wait_for(calls, self.patience)
        made = {part.index: part for parts in ray.get(calls) for part in parts} | finished
        return [made[index] for index in sorted(made)]

    def __enter__(self) -> "ShardActors":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.place)
