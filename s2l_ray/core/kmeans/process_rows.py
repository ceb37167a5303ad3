"""The rows of one process by source, held in memory or read anew for every query.

Rows are clustered together by the number of their source; where all rows are clustered together, it
is 0 for all. Both classes answer with the same bits.

Shapes: n rows of a part, F features, K clusters of a source.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import numpy as np

from s2l_ray.core.hashing import KMEANS_SAMPLE, keyed_hash
from s2l_ray.core.kmeans.shard import Labelled, Shard
from s2l_ray.core.query import Ask, Query

Answer = TypeVar("Answer")
# Ids int64 [n], features float32 [n, F] and source numbers int [n] of a part.
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class View:
    """Which rows a query is about: those of a source, perhaps only keyed hashes up to a limit."""

    source: int
    seed: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class InView(Generic[Answer]):
    """A query to the rows of a view."""

    view: View
    query: Query[Shard, Answer]

    def of(self, shard: "ProcessRows") -> Answer:
        """See `Query`."""
        return shard.answer(self.view, self.query)

    def merge(self, answers: Iterable[Answer]) -> Answer:
        """See `Query`."""
        return self.query.merge(answers)


def in_view(ask: "Ask[ProcessRows]", view: View) -> Ask[Shard]:
    """Asks the shards of a view."""

    def ask_view(query: Query[Shard, Answer]) -> Answer:
        return ask(InView(view, query))

    return ask_view


class HeldRows:
    """Parts in memory: a Shard for every source, and one for the last sample of a source."""

    def __init__(self, parts: Iterable[Rows]) -> None:
        """Take ids, features and source numbers of each part.

        Raises:
            UserError: see Shard.
        """
        parts_of: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        # Of each part: its number of rows; of each of its sources (number, number of this part
        # among the parts of the source, its rows). An index takes 8 bytes a row, so none where it
        # is all.
        self._places: list[tuple[int, list[tuple[int, int, np.ndarray | slice]]]] = []
        for ids, rows, sources in parts:
            place: list[tuple[int, int, np.ndarray | slice]] = []
            for source, where in _by_source(sources):
                mine = parts_of.setdefault(source, [])
                whole = len(where) == len(ids)
                place.append((source, len(mine), slice(None) if whole else where))
                mine.append((ids, rows) if whole else (ids[where], rows[where]))
            self._places.append((len(ids), place))
        self._shards = {source: Shard(_consumed(parts_of.pop(source))) for source in list(parts_of)}
        self._sample: tuple[View, Shard] | None = None

    def answer(self, view: View, query: Query[Shard, Answer]) -> Answer:
        """What the rows of a view answer."""
        return query.of(self._shard(view))

    def labels(self, part: int, centroids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Cluster int32 [n] and distance float32 [n] of a part's rows.

        Args:
            centroids: float32 [K, F] of every source; clusters are numbered through all of them.
        """
        first = np.cumsum([0, *(len(own) for own in centroids)])
        num_rows, places = self._places[part]
        labels, distances = np.empty(num_rows, np.int32), np.empty(num_rows, np.float32)
        for source, number, where in places:
            own, distances[where] = self._shards[source].labels(number, centroids[source])
            labels[where] = own + first[source]
        return labels, distances

    def _shard(self, view: View) -> Shard:
        whole = self._shards.get(view.source) or Shard([])
        if view.limit is None:
            return whole
        if self._sample is None or self._sample[0] != view:
            self._sample = view, whole.sampled(view.seed, view.limit)
        return self._sample[1]


class StreamedRows:
    """Parts that are read anew for every query, one after the other and one ahead.

    What is held are at most two parts, the rows of the last sample, and of the last source labels
    and totals by part (2 bytes a row, 8 K F a part). These save finding the labels of the previous
    centroids again.
    """

    def __init__(self, count: int, read: Callable[[int], Rows]) -> None:
        """Parts 0 to count - 1, which `read` reads in a thread."""
        self._count, self._read = count, read
        # One thread for all queries: every new one takes memory of its own and does not give it
        # back.
        self._reader = ThreadPoolExecutor(1)
        # Sources of the parts read so far.
        self._sources: dict[int, set[int]] = {}
        self._source = 0
        # Labels and totals by part, of this source.
        self._last: dict[int, Labelled | None] = {}
        self._sample: tuple[View, Shard] | None = None

    def answer(self, view: View, query: Query[Shard, Answer]) -> Answer:
        """See `HeldRows.answer`."""
        if view.limit is not None:
            return query.of(self._sampled(view, view.limit))
        answers = (query.of(shard) for shard in self._shards(view.source))
        return query.merge(chain([query.of(Shard([]))], answers))

    def labels(self, part: int, centroids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """See `HeldRows.labels`."""
        return HeldRows([self._read(part)]).labels(0, centroids)

    def _sampled(self, view: View, limit: int) -> Shard:
        if self._sample is None or self._sample[0] != view:
            chosen = (
                (keyed_hash(KMEANS_SAMPLE, view.seed, ids) <= np.uint64(limit), ids, rows)
                for _, ids, rows in self._of_source(view.source)
            )
            self._sample = view, Shard((ids[keep], rows[keep]) for keep, ids, rows in chosen)
        return self._sample[1]

    def _shards(self, source: int) -> Iterator[Shard]:
        """A Shard for every part that has rows of the source."""
        if source != self._source:
            self._source, self._last = source, {}
        for number, ids, rows in self._of_source(source):
            shard = Shard([(ids, rows)], sort=False, last=self._last.pop(number, None))
            yield shard
            self._last[number] = shard.last

    def _of_source(self, source: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(part, ids, rows) of the source, of every part that has some."""
        wanted = [
            part for part in range(self._count) if source in self._sources.get(part, {source})
        ]
        ahead = [self._reader.submit(self._read, part) for part in wanted[:1]]
        for place, part in enumerate(wanted):
            ids, rows, sources = ahead.pop().result()
            ahead += [
                self._reader.submit(self._read, following)
                for following in wanted[place + 1 : place + 2]
            ]
            self._sources[part] = set(np.unique(sources).tolist())
            mine = sources == source
            if mine.any():
                yield (part, ids, rows) if mine.all() else (part, ids[mine], rows[mine])


ProcessRows = HeldRows | StreamedRows


def _consumed(
    parts: list[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The parts, forgotten one after the other, as the shard that takes them copies them."""
    parts.reverse()
    while parts:
        yield parts.pop()


def _by_source(sources: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """(source, its rows in their order) of every source that has rows."""
    order = np.argsort(sources, kind="stable")
    ends = np.flatnonzero(np.diff(sources[order], append=-1)) + 1
    return ((int(sources[where[0]]), where) for where in np.split(order, ends)[:-1])
