"""Facility location for `subset`: greedy in blocks of each part, then merges of what they pass on (see core/facility.py).

What is clustered elsewhere is covered here: the stored trajectories as they are, all members side by side, without step 0. Candidates
travel from task to task through Ray's object store; the driver holds block sizes and references, and so do the tasks that write.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from s2l_ray.contract.work import Work, part_dict, part_from
from s2l_ray.core.selection.facility import Candidates, blocks, candidates, merge, tree
from s2l_ray.core.storage.schemas import vectors
from s2l_ray.edge.parts import PartContext, part_context
from s2l_ray.edge.placement import TASK_CPUS
from s2l_ray.edge.tasks import bounded
from s2l_ray.edge.user_errors import reraise_user_errors


@dataclass(frozen=True)
class Listed:
    """The chosen rows by id, in pieces that lie in the object store; first and last id of each, which ascend."""

    pieces: list[Any]
    ranges: list[tuple[int, int]]

    def chosen(self, ids: np.ndarray) -> np.ndarray:
        """Which rows are in the subset, bool [n] of ids int64 [n]; fetches the pieces whose range meets theirs."""
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


def find(work: Work, budget: int) -> tuple[Listed, list[int]]:
    """The chosen rows, and how many of each part they are."""
    trajectories, seed = work.manifests["trajectories"], work.config.subset.seed
    shared = ray.put((part_context(work), trajectories.info["steps"]))
    places = [
        (part_dict(part), start, stop)
        for part in trajectories.parts
        for start, stop in blocks(sum(part.stats["sources"].values()))
    ]
    options = {"num_cpus": TASK_CPUS, "scheduling_strategy": "SPREAD"}

    def first(number: int, count: int) -> Any:
        return _candidates.options(**options).remote(shared, *places[number], count)

    def join(handles: Any, count: int) -> Any:
        return _merged.options(**options).remote(seed, count, *handles)

    pieces = tree([stop - start for _, start, stop in places], budget, first, join)
    with reraise_user_errors():
        ranges = ray.get([_range.options(**options).remote(piece) for piece in pieces])
    listed = Listed(pieces, ranges)
    counts = dict(
        bounded(_count, [(shared, part_dict(part), listed) for part in trajectories.parts])
    )
    return listed, [counts[part.index] for part in trajectories.parts]


@ray.remote
def _candidates(
    shared: tuple[PartContext, list[list[int]]],
    raw: dict[str, Any],
    start: int,
    stop: int,
    count: int,
) -> Candidates:
    """The greedy choice in one block: rows `start` to `stop` of those of a part that were scored."""
    context, steps = shared
    artifact = context.inputs["trajectories"]
    table = artifact.read_part(part_from(raw), ["example_id", "losses"])
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
    shared: tuple[PartContext, list[list[int]]], raw: dict[str, Any], listed: Listed
) -> tuple[int, int]:
    ids = (
        shared[0]
        .inputs["trajectories"]
        .read_part(part_from(raw), ["example_id"])["example_id"]
        .to_numpy()
    )
    return raw["index"], int(listed.chosen(ids).sum())
