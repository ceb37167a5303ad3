"""The choice of facility location: greedy in blocks of each part, then merges of their candidates.

Every row is to have a chosen one near it, where rows are the stored trajectories as they are: all
members of an ensemble side by side, without step 0. Candidates travel from task to task through
Ray's object store. There are about 2 x budget of them (or a sixteenth of all rows, where the budget
is small), so they are merged in tasks; the driver holds block sizes and references.
"""

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from s2l_ray.contract.work import Work
from s2l_ray.core.selection.facility import Candidates, candidates, merge
from s2l_ray.core.selection.merge_tree import blocks, run_tree
from s2l_ray.core.storage.info import TrajectoriesInfo
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.schemas import vectors
from s2l_ray.edge.parts import PartContext, part_context
from s2l_ray.edge.placement import TASK_CPUS
from s2l_ray.edge.tasks import bounded
from s2l_ray.edge.user_errors import reraise_user_errors
from s2l_ray.stages.subset.rows import Choice, Rows

# Named, because a trial of a sweep would otherwise hand down its own placement, without room for
# tasks.
ANYWHERE = {"num_cpus": TASK_CPUS, "scheduling_strategy": "SPREAD"}


@dataclass(frozen=True)
class ChosenIds:
    """The chosen rows by id, in pieces that lie in the object store.

    Attributes:
        pieces: references to `Candidates`.
        ranges: first and last id of each piece; they ascend from piece to piece.
    """

    pieces: list[Any]
    ranges: list[tuple[int, int]]

    def among(self, ids: np.ndarray) -> np.ndarray:
        """Which of some rows are chosen, bool [n]; fetches the pieces whose range meets theirs.

        Args:
            ids: int64 [n].
        """
        if not len(ids):
            return np.zeros(0, bool)
        low, high = int(ids.min()), int(ids.max())
        near = [
            piece
            for piece, (first, last) in zip(self.pieces, self.ranges, strict=True)
            if first <= high and last >= low
        ]
        found: list[Candidates] = ray.get(near)
        return np.isin(ids, np.concatenate([piece.ids for piece in found]) if found else ids[:0])


def find(work: Work, budget: int) -> Choice:
    """The rows that facility location chooses, `budget` in all."""
    work.rows_began(time.time())
    trajectories, seed = work.manifests["trajectories"], work.config.subset.seed
    info = work.info("trajectories", TrajectoriesInfo)
    shared = ray.put((part_context(work), info.steps))
    places = [
        (part.for_reading, start, stop)
        for part in trajectories.parts
        for start, stop in blocks(sum(part.stats["sources"].values()))
    ]

    def choose(number: int, count: int) -> Any:
        return _candidates.options(**ANYWHERE).remote(shared, *places[number], count)

    def join(handles: Any, count: int) -> Any:
        return _merged.options(**ANYWHERE).remote(seed, count, *handles)

    pieces = run_tree([stop - start for _, start, stop in places], budget, choose, join)
    with reraise_user_errors():
        ranges = ray.get([_range.options(**ANYWHERE).remote(piece) for piece in pieces])
    ids = ChosenIds(pieces, ranges)
    counts = dict(bounded(_count, [(shared, p.for_reading, ids) for p in trajectories.parts]))
    return Choice(
        sizes=np.array([info.scored]),
        quotas=np.array([budget]),
        chosen=functools.partial(_chosen, ids),
        rows_of_part=[counts[part.index] for part in trajectories.parts],
    )


def _chosen(ids: ChosenIds, rows: Rows) -> np.ndarray:
    return ids.among(rows.ids)


@ray.remote
def _candidates(
    shared: tuple[PartContext, list[list[int]]],
    part: Part,
    start: int,
    stop: int,
    count: int,
) -> Candidates:
    """The greedy choice in one block: rows `start` to `stop` of the scored rows of a part."""
    context, steps = shared
    artifact = context.inputs["trajectories"]
    table = artifact.read_part(part, ["example_id", "losses"])
    valid, losses = vectors(table["losses"], artifact.uri)
    ids = table["example_id"].to_numpy()[valid]
    trained = [column for column, (_, step) in enumerate(steps) if step > 0]
    return candidates(
        ids[start:stop], losses[start:stop, trained], count, context.config.subset.seed
    )


@ray.remote
def _merged(seed: int, count: int, *several: Candidates) -> Candidates:
    return merge(several, count, seed)


@ray.remote
def _range(piece: Candidates) -> tuple[int, int]:
    return int(piece.ids[0]), int(piece.ids[-1])


@ray.remote
def _count(
    shared: tuple[PartContext, list[list[int]]], part: Part, chosen: ChosenIds
) -> tuple[int, int]:
    """The number of a part, and how many of its rows are chosen."""
    context, _ = shared
    table = context.inputs["trajectories"].read_part(part, ["example_id"])
    return part.index, int(chosen.among(table["example_id"].to_numpy()).sum())
