"""k-means inside groups of rows: all rows are one group, or each source is one. Groups share nothing but the shards that hold them.

A shard of one process holds its parts' rows by group, so a block of k-means is the rows of one part and one group, and every
group's fit is a plain fit of kmeans.py over the shards of that group. A group may be fitted on a sample of its rows.

Shapes: n rows of a part, F features, K clusters of a group.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from s2l_ray.config import Clusters
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.kmeans.lloyd import (
    FitResult,
    FitState,
    Shards,
    assigned,
    fit,
    hash_limit,
    summary_of,
)
from s2l_ray.core.kmeans.shard import Labelled, Shard, merged

Rows = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # ids int64 [n], features float32 [n, F], group numbers int [n]

NOTHING = Shard([])


@dataclass(frozen=True)
class View:
    """Which rows a call is about: those of a group, and with a limit only those whose keyed hash is at most that."""

    group: int
    seed: int = 0
    limit: int | None = None


Call = Callable[[View, str, tuple[Any, ...]], Iterable[Any]]  # calls a method of every shard's view


class GroupedShard:
    """The parts of one process, their rows by group: a Shard for every view."""

    def __init__(self, parts: Iterable[Rows]) -> None:
        """Take (example ids int64 [n], features float32 [n, F], group numbers int [n]) of each part.

        Raises:
            UserError: see Shard.
        """
        parts_of: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        # of a part: its number of rows, and (group, its number there, its rows: an index takes 8 bytes a row, so none where all are)
        self._places: list[tuple[int, list[tuple[int, int, np.ndarray | slice]]]] = []
        for ids, rows, groups in parts:
            place: list[tuple[int, int, np.ndarray | slice]] = []
            for group, where in _by_group(groups):
                mine = parts_of.setdefault(group, [])
                whole = len(where) == len(ids)
                place.append((group, len(mine), slice(None) if whole else where))
                mine.append((ids, rows) if whole else (ids[where], rows[where]))
            self._places.append((len(ids), place))
        self._shards = {group: Shard(_consumed(parts_of.pop(group))) for group in list(parts_of)}
        self._sample: tuple[View, Shard] | None = None

    def call(self, view: View, method: str, args: tuple[Any, ...]) -> Any:
        """A method of the Shard of a view."""
        return getattr(self._shard(view), method)(*args)

    def labels(self, part: int, centroids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Cluster int32 [n] and distance float32 [n] of a part's rows; clusters are numbered through all groups' centroids."""
        first = np.cumsum([0, *(len(own) for own in centroids)])
        num_rows, places = self._places[part]
        labels, distances = np.empty(num_rows, np.int32), np.empty(num_rows, np.float32)
        for group, number, where in places:
            own, distances[where] = self._shards[group].labels(number, centroids[group])
            labels[where] = own + first[group]
        return labels, distances

    def _shard(self, view: View) -> Shard:
        whole = self._shards.get(view.group, NOTHING)
        if view.limit is None:
            return whole
        if self._sample is None or self._sample[0] != view:
            self._sample = view, whole.sampled(view.seed, view.limit)
        return self._sample[1]


class StreamedShard:
    """A GroupedShard that does not hold its parts but reads them anew for every call, one after the other and one ahead.

    It answers with the same bits. What it holds are at most two parts, the rows of a sampled view, and of the last group labels
    and totals per part (2 bytes a row, 8 K F a part), which save finding the labels of the previous centroids again.
    """

    def __init__(self, count: int, read: Callable[[int], Rows]) -> None:
        """Parts 0 to count - 1, which `read` reads in a thread: ids, features and group numbers as GroupedShard takes them."""
        self._count, self._read = count, read
        self._reader = ThreadPoolExecutor(
            1
        )  # one for all calls: every new thread takes memory of its own and does not give it back
        self._groups: dict[int, set[int]] = {}  # of the parts read so far
        self._group = 0
        self._last: dict[int, Labelled | None] = {}  # by part, for this group
        self._sample: tuple[View, Shard] | None = None

    def call(self, view: View, method: str, args: tuple[Any, ...]) -> Any:
        """A method of the Shard of a view."""
        if view.limit is not None:
            return getattr(self._sampled(view), method)(*args)
        answers = (getattr(shard, method)(*args) for shard in self._shards(view.group))
        return merged(method, args, chain([getattr(NOTHING, method)(*args)], answers))

    def labels(self, part: int, centroids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """See GroupedShard.labels."""
        return GroupedShard([self._read(part)]).labels(0, centroids)

    def _sampled(self, view: View) -> Shard:
        if self._sample is None or self._sample[0] != view:
            seed, limit = view.seed, np.uint64(view.limit or 0)
            chosen = (
                (keyed_hash(seed, ids) <= limit, ids, rows)
                for _, ids, rows in self._of_group(view.group)
            )
            self._sample = view, Shard((ids[keep], rows[keep]) for keep, ids, rows in chosen)
        return self._sample[1]

    def _shards(self, group: int) -> Iterator[Shard]:
        """A Shard for every part that has rows of the group."""
        if group != self._group:
            self._group, self._last = group, {}
        for number, ids, rows in self._of_group(group):
            shard = Shard([(ids, rows)], sort=False, last=self._last.pop(number, None))
            yield shard
            self._last[number] = shard.last

    def _of_group(self, group: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(part, ids, rows) of the group, of every part that has some."""
        wanted = [part for part in range(self._count) if group in self._groups.get(part, {group})]
        coming = [self._reader.submit(self._read, part) for part in wanted[:1]]
        for place, part in enumerate(wanted):
            ids, rows, groups = coming.pop().result()
            coming += [
                self._reader.submit(self._read, following)
                for following in wanted[place + 1 : place + 2]
            ]
            self._groups[part] = set(np.unique(groups).tolist())
            mine = groups == group
            if mine.any():
                yield (part, ids, rows) if mine.all() else (part, ids[mine], rows[mine])


def _consumed(
    parts: list[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The parts, forgotten one after the other, as the shard that takes them copies them."""
    parts.reverse()
    while parts:
        yield parts.pop()


def _by_group(groups: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """(group, its rows in their order) of every group that has rows."""
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order], append=-1)) + 1
    return ((int(groups[where[0]]), where) for where in np.split(order, ends)[:-1])


def shards_of(call: Call, view: View) -> Shards:
    """The shards of one view, as kmeans.py wants them."""
    return lambda method, args: call(view, method, args)


def fit_group(
    call: Call,
    group: int,
    section: Clusters,
    *,
    base: np.ndarray | None = None,
    resume: FitState | None = None,
    on_round: Callable[[FitState], None] | None = None,
) -> FitResult:
    """The clusters of one group.

    With section.points_per_centroid, the centroids are found on the rows with the smallest keyed hashes, k times so many, and
    all rows are assigned to them. Within sources, a source with fewer distinct rows than k (among those that the centroids are
    found on) gets as many clusters as there are.

    Args:
        base: float32 [K, F] centroids of another run: kept as they are, or with section.refine the start. Their numbers stay,
            and a cluster that no row can fill any more stays where it was, with no rows.
        resume, on_round: see kmeans.fit.

    Raises:
        UserError: see kmeans.fit.
    """
    everyone = shards_of(call, View(group))
    num_rows = summary_of(everyone).num_rows
    if base is not None and (not section.refine or not num_rows):
        last = assigned(everyone, base)
        return FitResult(base, last.sizes, last.objective, history=(), converged=True)
    return fit(
        shards_of(call, _view(everyone, group, section, num_rows)),
        k=section.k if base is None else len(base),
        seed=section.seed,
        max_rounds=section.max_rounds,
        tolerance=section.tolerance,
        start=base,
        fewer=base is not None or section.within == "source",
        everyone=everyone,
        resume=resume,
        on_round=on_round,
    )


def _view(everyone: Shards, group: int, section: Clusters, num_rows: int) -> View:
    """The rows that a group's centroids are found on."""
    points = (
        num_rows if section.points_per_centroid is None else section.k * section.points_per_centroid
    )
    if points >= num_rows:
        return View(group)
    return View(group, section.seed, hash_limit(everyone, section.seed, points))


@dataclass(frozen=True)
class Moved:
    """What refining did to a group: sizes int64 [K] of all rows under the base's centroids, how many rows have another cluster
    now, and how far each centroid went (Euclidean, in feature space), float64 [K]."""

    before: np.ndarray
    changed: int
    shifts: np.ndarray


def moved(call: Call, group: int, base: np.ndarray, centroids: np.ndarray) -> Moved:
    """Compare two sets of centroids [K, F] with the same numbers on all rows of a group."""
    everyone = shards_of(call, View(group))
    before = assigned(everyone, base).sizes
    changed = assigned(everyone, centroids, previous=base).moves
    shifts = np.linalg.norm(centroids.astype(np.float64) - base.astype(np.float64), axis=1)
    return Moved(before, changed, shifts)
