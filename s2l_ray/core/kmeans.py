"""Sharded k-means on loss trajectories: shards add up members exactly, a small driver loop moves the
centroids.

The same rows, cut into the same parts, give the same bits for any number of shards, any order of parts or
answers and any restart: a row's label depends on nothing but the row and the centroids (see `Nearest`), and members are added as
int64 fixed point. Integer sums are exact, so a round only takes the rows that changed their cluster out of one sum and
adds them to another, and the objective follows from the sums. Every method of a shard is a pure function of its parts
and arguments; what it keeps is only a cache.

Shapes: N rows (examples that could be scored), T columns (steps, or features made of them), K clusters.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from s2l_ray.core.allocation import give_back_freed_memory
from s2l_ray.core.fixed_point import Partial, Totals, fixed_point_exponent
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.nearest import BLOCK, FEW, Balls, Leads, Nearest
from s2l_ray.errors import UserError

START_ROWS = 65_536
_CALM = 0.1  # share of rows with another label up to which leads are begun
_LEADING = 16  # bits of a hash by which rows are counted
Shards = Callable[[str, tuple[Any, ...]], Iterable[Any]]


@dataclass(frozen=True)
class Summary:
    """What the fixed point needs to know of the rows; addable. `num_steps` is 0 where there are no rows."""

    num_rows: int
    max_abs: float
    num_steps: int

    def __add__(self, other: "Summary") -> "Summary":
        if self.num_steps and other.num_steps and self.num_steps != other.num_steps:
            raise UserError(
                "Clustering trajectories: expected the same number of steps T in every part, got "
                f"{self.num_steps} and {other.num_steps}. The parts come from different proxies; score them "
                "again with one proxy."
            )
        return Summary(
            num_rows=self.num_rows + other.num_rows,
            max_abs=max(self.max_abs, other.max_abs),
            num_steps=max(self.num_steps, other.num_steps),
        )


NO_ROWS = Summary(num_rows=0, max_abs=0.0, num_steps=0)


@dataclass(frozen=True)
class Ranked:
    """A few rows in ascending (key, id) order: keys [m], ids int64 [m], rows float32 [m, T]."""

    keys: np.ndarray
    ids: np.ndarray
    rows: np.ndarray

    def first(self, m: int) -> "Ranked":
        """The m smallest by (key, id)."""
        return self._take(np.lexsort((self.ids, self.keys))[:m])

    def among_first(self, m: int) -> "Ranked":
        """Those with the m smallest keys, all that share the last one of them included, in their order: nothing is sorted for it."""
        if len(self.keys) <= m:
            return self
        return self._take(np.flatnonzero(self.keys <= np.partition(self.keys, m - 1)[m - 1]))

    def first_distinct(self, m: int, skip: set[bytes]) -> "Ranked":
        """The m smallest by (key, id) that differ in value from each other and from all values in `skip`."""
        seen, kept = set(skip), []
        for i in np.lexsort((self.ids, self.keys)):
            value = _value(self.rows[i])
            if value not in seen:
                seen.add(value)
                kept.append(i)
            if len(kept) == m:
                break
        return self._take(np.array(kept, dtype=np.int64))

    def joined(self, other: "Ranked") -> "Ranked":
        """Both, unordered."""
        if not len(self.ids):  # without rows there is no T
            return other
        if not len(other.ids):
            return self
        return Ranked(
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.rows, other.rows]),
        )

    def _take(self, index: np.ndarray) -> "Ranked":
        return Ranked(self.keys[index], self.ids[index], self.rows[index])


def squared_distances(rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance of each row to the centroid of its label: float64 [n], summed in step order.

    Column by column there is no reduction whose order numpy could choose, and zero means equal values.
    """
    total = np.zeros(len(rows))
    for column, values in zip(rows.T, centroids.T.astype(np.float64), strict=True):
        difference = column - values[labels]
        total += np.multiply(difference, difference, out=difference)
    return total


@dataclass(frozen=True)
class Labelled:
    """The rows of a shard under some centroids (as bytes): labels of every part, and totals where they were asked for.

    ways float64 [K] are those that the leads of rows reckon with; see Nearest.
    """

    centroids: bytes
    labels: list[np.ndarray]
    totals: Totals | None
    ways: np.ndarray | None = None

    def renumbered(self, order: np.ndarray) -> "Labelled":
        """The same clusters under other numbers: cluster i is the one that was order[i], int [K]."""
        numbers = np.argsort(order)
        labels = [numbers.astype(own.dtype).take(own) for own in self.labels]
        totals = None if self.totals is None else self.totals[order]
        ways = None if self.ways is None else self.ways[order]
        return Labelled(self.centroids, labels, totals, ways)


class _Part:
    """Rows of a part, float32 [n, T]; once in order of their clusters, `places` has each row's place as given."""

    def __init__(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """With ids int64 [n]; of them is kept what is above the smallest, mostly 4 bytes or fewer."""
        self.rows = np.ascontiguousarray(rows, np.float32)
        self._first = np.int64(ids.min()) if len(ids) else np.int64(0)
        above = np.asarray(ids, np.int64).view(np.uint64) - self._first.view(np.uint64)
        self._above = above.astype(np.min_scalar_type(above.max(initial=0)))
        self.places: np.ndarray | None = None
        self.balls: Balls | None = None
        self.leads: Leads | None = None
        self.calm = False  # whether few rows had another label in the last round

    @property
    def ids(self) -> np.ndarray:
        """Of the rows as they are now, int64 [n]."""
        return (self._above.astype(np.uint64) + self._first.view(np.uint64)).view(np.int64)

    def put_in_order(self, keys: np.ndarray) -> np.ndarray:
        """Sort the rows by keys [n], and draw the balls; the order is returned, int64 [n]."""
        order = np.argsort(keys, kind="stable")  # by radix where keys have 16 bits
        self._above, self.rows = self._above.take(order), self.rows.take(order, axis=0)
        self.places, self.balls = order.astype(np.uint32), Balls.around(self.rows)
        return order

    def leads_for(self, num_clusters: int, known: bool) -> Leads | None:
        """The leads of the last labels, where they help; `known` says whether all ways since they were found are."""
        if not known or self.balls is None or num_clusters > FEW:
            self.leads = None
        elif self.leads is None and self.calm:
            self.leads = Leads(len(self.rows))
        return self.leads

    def as_given(self, values: np.ndarray) -> np.ndarray:
        """Values of the rows [n], in the order in which the rows were given."""
        if self.places is None:
            return values
        result = np.empty_like(values)
        result[self.places] = values
        return result


class Shard:
    """Some parts of the trajectories in memory: rows, ids, and the labels of the last centroids.

    After the first round the rows of a part are sorted by their cluster, so that those of a ball (see Nearest) lie close together.
    """

    def __init__(
        self, parts: Iterable[tuple[np.ndarray, np.ndarray]], sort: bool = True, last: Labelled | None = None
    ) -> None:
        """Take (example ids int64 [n], losses float32 [n, T]) of each part, only the rows that could be
        scored.

        With sort=False rows stay as they are, and `last` may be that of an earlier such Shard of the same parts.

        Raises UserError, naming the example, if a loss is not finite, or if T differs between parts.
        """
        self._parts: list[_Part] = []
        self._summary = NO_ROWS
        self._sort, self.last = sort, last
        for ids, rows in parts:
            part = _Part(ids, rows)
            self._parts.append(part)
            self._summary += _part_summary(ids, part.rows)

    def summary(self) -> Summary:
        """Number of rows, largest absolute value and T."""
        return self._summary

    def sample(self, seed: int, m: int) -> Ranked:
        """The m rows with the smallest keyed hash, or all of them if there are fewer."""
        best = self._nothing(np.uint64)
        for ids, rows in self._filled():
            hashes = keyed_hash(seed, ids)
            keep = hashes <= best.keys.max() if len(best.keys) >= m else np.ones(len(ids), dtype=bool)
            best = best.joined(Ranked(hashes[keep], ids[keep], rows[keep])).among_first(m)
        return best.first(m)

    def sampled(self, seed: int, limit: int) -> "Shard":
        """The same parts with only the rows whose keyed hash is at most `limit`."""
        keep = [keyed_hash(seed, part.ids) <= np.uint64(limit) for part in self._parts]
        return Shard((part.ids[k], part.rows[k]) for part, k in zip(self._parts, keep, strict=True))

    def hash_counts(self, seed: int) -> np.ndarray:
        """Rows by the leading 16 bits of their keyed hash, int64 [65536]."""
        counts = np.zeros(1 << _LEADING, dtype=np.int64)
        for part in self._parts:
            counts += np.bincount(_leading(keyed_hash(seed, part.ids)), minlength=len(counts))
        return counts

    def hashes(self, seed: int, leading: int) -> np.ndarray:
        """The keyed hashes with these leading 16 bits, uint64; one row in 65,536."""
        found = [keyed_hash(seed, part.ids) for part in self._parts]
        return np.concatenate([np.empty(0, np.uint64), *(h[_leading(h) == leading] for h in found)])

    def step(
        self,
        centroids: np.ndarray,
        exponent: int,
        previous: np.ndarray | None,
        order: np.ndarray | None = None,
    ) -> Partial:
        """Assign every row to its nearest centroid and add up the members; see Partial.

        `previous` are the centroids of the round before, None in the first. Their labels are normally still
        here; a shard that was restarted finds them again, so moves are exact whatever happened. Where clusters have been
        given other numbers since, order int [K] is the number that each of them had.
        """
        before = None if previous is None else self._labelled(previous)
        if previous is not None and before is not None and order is not None:
            previous, before = previous[order], before.renumbered(order)
        self.last = None  # its totals change from here on
        kept = before.totals if before else None
        if kept is None or kept.exponent != exponent or kept.sums.shape != centroids.shape:
            kept = None
        totals = kept or Totals(centroids.shape, exponent)
        known = before.ways if before and kept else None  # leads go with them
        ways = _ways(known, previous, centroids)
        search = Nearest(centroids, ways)
        labels = before.labels if before else self._no_labels(len(centroids))
        if previous is not None and len(previous) != len(centroids):  # numbers of both must fit
            labels = [own.astype(np.int32) for own in labels]
        moves = 0 if before else self._summary.num_rows
        for number, (part, own) in enumerate(zip(self._parts, labels, strict=True)):
            leads = part.leads_for(len(centroids), known is not None)
            moved, old = search.renew(part.rows, own, part.balls, leads)
            part.calm = before is not None and len(moved) <= _CALM * len(own)
            moves += len(moved) if before else 0
            if kept is not None:
                totals.move(part.rows.take(moved, axis=0), old, own.take(moved))
                continue
            if self._sort and part.balls is None:
                order = part.put_in_order(np.argsort(search.order).astype(own.dtype).take(own))
                labels[number] = own.take(order)
            totals.add(part.rows, labels[number])
        if kept is None and self._sort:
            give_back_freed_memory()  # sorting leaves holes of as much as a few parts
        self.last = Labelled(centroids.tobytes(), labels, totals, ways)
        return Partial(totals.sums.copy(), totals.counts.copy(), totals.squares, moves)

    def farthest(self, m: int, centroids: np.ndarray, taken: np.ndarray) -> Ranked:
        """The m rows farthest from their nearest centroid, by (-squared distance, id), the key being the
        former.

        They differ in value from each other and from every row of `taken` [any, T]; fewer where there are no
        more.
        """
        skip = {_value(row) for row in taken}
        best = self._nothing(np.float64)
        for part, labels in zip(self._parts, self._labelled(centroids).labels, strict=True):
            if not len(labels):
                continue
            ids, rows = part.ids, part.rows
            keys = -squared_distances(rows, centroids, labels)
            keep = keys <= best.keys[-1] if len(best.keys) == m else np.ones(len(ids), dtype=bool)
            best = best.joined(Ranked(keys[keep], ids[keep], rows[keep])).first_distinct(m, skip)
        return best

    def labels(self, part_index: int, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cluster int32 [n] and Euclidean distance float32 [n] of one part, in the order given."""
        part = self._parts[part_index]
        if self.last is not None and self.last.centroids == centroids.tobytes():
            labels = self.last.labels[part_index].astype(np.int32)
        else:
            labels = Nearest(centroids).labels(part.rows, part.balls)
        distances = np.sqrt(squared_distances(part.rows, centroids, labels)).astype(np.float32)
        return part.as_given(labels), part.as_given(distances)

    def spread(self, centroids: np.ndarray) -> np.ndarray:
        """Sums of squared deviations of each cluster's members at every step, float64 [K, T]; for pictures, not exact."""
        total = np.zeros(centroids.shape)
        for part, labels in zip(self._parts, self._labelled(centroids).labels, strict=True):
            for start in range(0, len(labels), BLOCK):
                own = labels[start : start + BLOCK]
                squares = (part.rows[start : start + BLOCK] - centroids.take(own, axis=0)) ** 2
                # the sums so far come first, so that all is added in the order of the rows
                places = np.concatenate([np.arange(len(total)), own])
                for column, values in zip(total.T, squares.T, strict=True):
                    column[:] = np.bincount(places, np.concatenate([column, values]))
        return total

    def _labelled(self, centroids: np.ndarray) -> Labelled:
        """All parts under these centroids; the last ones asked for are kept."""
        key = centroids.tobytes()
        if self.last is None or self.last.centroids != key:
            self.last = None  # never hold two sets while the second is made
            search = Nearest(centroids)
            labels = self._no_labels(len(centroids))
            for part, own in zip(self._parts, labels, strict=True):
                search.renew(part.rows, own, part.balls)
            self.last = Labelled(key, labels, None)
        return self.last

    def _no_labels(self, num_clusters: int) -> list[np.ndarray]:
        return [np.zeros(len(part.rows), np.min_scalar_type(num_clusters - 1)) for part in self._parts]

    def _filled(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        return ((part.ids, part.rows) for part in self._parts if len(part.rows))

    def _nothing(self, key_type: type) -> Ranked:
        steps = self._summary.num_steps
        return Ranked(np.empty(0, key_type), np.empty(0, np.int64), np.empty((0, steps), np.float32))


def _ways(before: np.ndarray | None, previous: np.ndarray | None, centroids: np.ndarray) -> np.ndarray:
    """The ways of centroids with that of this round, see Nearest: from where they are known; at most what float32 holds."""
    if before is None or previous is None:
        return np.zeros(len(centroids))
    way = np.linalg.norm(centroids - previous.astype(np.float64), axis=1)
    return np.minimum(before + way + way.max(), 1e30)


def _leading(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _LEADING)).astype(np.int64)


def merged(method: str, args: tuple[Any, ...], answers: Iterable[Any]) -> Any:
    """What a Shard of all rows would answer to a method, from the answers of those that have some of them, in any order."""
    match method:
        case "hashes":
            return np.concatenate(list(answers))
        case "sample":
            return functools.reduce(lambda a, b: a.joined(b).first(args[1]), answers)
        case "farthest":
            skip = {_value(row) for row in args[2]}
            return functools.reduce(lambda a, b: a.joined(b).first_distinct(args[0], skip), answers)
        case _:
            return functools.reduce(operator.add, answers)


def _ask(shards: Shards, method: str, *args: Any) -> Any:
    return merged(method, args, shards(method, args))


def hash_limit(shards: Shards, seed: int, num_rows: int) -> int:
    """The `num_rows`-th smallest keyed hash of all rows, of which there are at least so many."""
    ends = np.cumsum(_ask(shards, "hash_counts", seed))
    leading = int(np.searchsorted(ends, num_rows))
    before = int(ends[leading - 1]) if leading else 0
    hashes = np.sort(_ask(shards, "hashes", seed, leading))
    return int(hashes[num_rows - before - 1])


def _part_summary(ids: np.ndarray, rows: np.ndarray) -> Summary:
    if rows.ndim != 2 or len(ids) != len(rows):
        raise ValueError(f"a part needs ids [n] and losses [n, T], got {ids.shape} and {rows.shape}")
    if not len(rows):
        return NO_ROWS
    if not rows.shape[1]:
        raise UserError("Clustering trajectories: expected at least one step per trajectory, got none.")
    low, high = float(rows.min()), float(rows.max())  # NaN and infinities come through
    if not (math.isfinite(low) and math.isfinite(high)):
        row, step = np.argwhere(~np.isfinite(rows))[0]
        raise UserError(
            f"Clustering trajectories: expected finite losses, got {rows[row, step]} for example_id {ids[row]} "
            f"in column {step} (from 0) of the trajectory. Rows that cannot be scored must be left out; score this "
            "part again. Where its losses are finite, clusters.features or clusters.weights leave the range of float32."
        )
    return Summary(num_rows=len(rows), max_abs=max(high, -low), num_steps=rows.shape[1])


def _value(row: np.ndarray) -> bytes:
    return (row + np.float32(0)).tobytes()  # adding zero turns -0.0 into 0.0: equal values, equal bytes


@dataclass(frozen=True)
class Round:
    """What one round saw before it moved the centroids.

    objective: sum of squared distances; sizes: members per cluster; moves: see Partial; shift: largest
    distance that a centroid with members moved, as a fraction of the root mean square distance of rows to
    their centroid (0 where that is 0); reseeded: clusters that had no members and were given a new centroid.
    """

    objective: float
    sizes: tuple[int, ...]
    moves: int
    shift: float
    reseeded: int


@dataclass(frozen=True)
class FitState:
    """All that the driver keeps between rounds; resuming from it gives the same bits as never stopping."""

    centroids: np.ndarray
    previous: np.ndarray | None = None
    history: tuple[Round, ...] = ()

    @property
    def round(self) -> int:
        """Number of finished rounds."""
        return len(self.history)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; every float32 is exact in Python's float and its repr."""
        return {
            "centroids": self.centroids.tolist(),
            "previous": None if self.previous is None else self.previous.tolist(),
            "history": [asdict(entry) for entry in self.history],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "FitState":
        """Inverse of to_dict."""
        previous = value["previous"]
        return cls(
            centroids=np.array(value["centroids"], dtype=np.float32),
            previous=None if previous is None else np.array(previous, dtype=np.float32),
            history=tuple(Round(**{**entry, "sizes": tuple(entry["sizes"])}) for entry in value["history"]),
        )


@dataclass(frozen=True)
class FitResult:
    """Final centroids float32 [K, T], and what assigning all rows to them gives.

    sizes int64 [K] and objective are of these centroids (one more assignment after the last round), and agree
    with Shard.labels. The history is of the rows that the centroids were found on; its sizes use the final
    cluster numbers. `converged`: stopped by the tolerance.
    """

    centroids: np.ndarray
    sizes: np.ndarray
    objective: float
    history: tuple[Round, ...]
    converged: bool


def fit(
    shards: Shards,
    *,
    k: int,
    seed: int,
    max_rounds: int,
    tolerance: float,
    start_rows: int = START_ROWS,
    start: np.ndarray | None = None,
    fewer: bool = False,
    everyone: Shards | None = None,
    resume: FitState | None = None,
    on_round: Callable[[FitState], None] | None = None,
) -> FitResult:
    """Lloyd's k-means over shards; the driver holds K x T and at most two start samples.

    Args:
        shards: shards(method, args) calls a method of every Shard and yields the answers in any order.
        k: number of clusters. They are numbered by ascending mean of their centroid.
        seed: of the start; k-means++ in float64 on the rows with the smallest keyed hash.
        max_rounds: at most this many times are the centroids moved.
        tolerance: stop after a round without empty clusters whose shift (see Round) is at most this.
        start_rows: size of the start sample.
        start: float32 [K, T] centroids to begin from instead; clusters keep the numbers they have there.
        fewer: where there are fewer distinct rows than clusters, have one cluster for each of them (with a start:
            leave what cannot be filled where it is) instead of raising.
        everyone: the shards of all rows, where `shards` are those of a sample to find the centroids on.
        resume: state after some round of a fit with the same other arguments.
        on_round: called with the state after every round.

    A cluster without members gets the row farthest from its own centroid, by (-squared distance, id), whose
    value no other centroid has; several empty clusters take such rows in turn, the lowest cluster number
    first. A cluster can be empty in the result only if the very last assignment left it so.

    Raises:
        UserError: k is below 1, above the number of rows or of distinct rows; T differs between shards.
    """
    summary = summary_of(shards)
    if not (1 <= k <= summary.num_rows or (fewer and summary.num_rows)):
        raise UserError(
            "Clustering trajectories: expected clusters.k between 1 and the number of examples with a "
            f"trajectory, {summary.num_rows}, got {k}. Change clusters.k or add examples."
        )
    exponent = fixed_point_exponent(summary.num_rows, summary.max_abs)
    if resume is None:
        begin = _start(shards, k, seed, start_rows, fewer) if start is None else start
        resume = FitState(np.ascontiguousarray(begin, dtype=np.float32))
    state, shape = resume, resume.centroids.shape
    if (
        (shape[0] != k and not fewer)
        or shape[1] != summary.num_steps
        or not np.isfinite(state.centroids).all()
    ):
        raise ValueError(f"expected finite centroids {(k, summary.num_steps)}, got {shape}")
    while not (converged := _converged(state, tolerance)) and state.round < max_rounds:
        state = _next_round(shards, state, summary.num_rows, exponent, fewer)
        if on_round is not None:
            on_round(state)
    before, order = None if everyone else state.previous, None
    if start is None:
        order = _by_mean(state.centroids)
        state = _renumbered(state, order)
    # which of two equal centroids is found depends on their places: only an assignment in the final order tells the sizes
    last = assigned(everyone or shards, state.centroids, before, order)
    return FitResult(state.centroids, last.sizes, last.objective, state.history, converged)


def summary_of(shards: Shards) -> Summary:
    """Of all rows."""
    summary: Summary = _ask(shards, "summary")
    return summary


@dataclass(frozen=True)
class Assignment:
    """What assigning all rows to some centroids gives: sizes int64 [K], the objective, and how many rows had another number before."""

    sizes: np.ndarray
    objective: float
    moves: int


def assigned(
    shards: Shards,
    centroids: np.ndarray,
    previous: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> Assignment:
    """Assign all rows to the centroids; its moves count the rows that had another number under `previous`, see Shard.step."""
    summary = summary_of(shards)
    exponent = fixed_point_exponent(summary.num_rows, summary.max_abs)
    partial = _step(shards, (centroids, exponent, previous, order), summary.num_rows)
    return Assignment(partial.counts, partial.objective(centroids, exponent), partial.moves)


def _converged(state: FitState, tolerance: float) -> bool:
    return bool(state.history) and state.history[-1].reseeded == 0 and state.history[-1].shift <= tolerance


def _next_round(shards: Shards, state: FitState, num_rows: int, exponent: int, fewer: bool) -> FitState:
    partial = _step(shards, (state.centroids, exponent, state.previous), num_rows)
    full = partial.counts > 0
    centroids = state.centroids.copy()
    centroids[full] = np.ldexp(partial.sums[full] / partial.counts[full, None], -exponent)
    empty = np.flatnonzero(~full)
    if len(empty):
        rows = _farthest(shards, len(empty), state.centroids, centroids[full], len(centroids), fewer)
        empty = empty[: len(rows)]
        centroids[empty] = rows
    moved = squared_distances(centroids[full], state.centroids, np.flatnonzero(full))
    objective = partial.objective(state.centroids, exponent)
    mean_squared = objective / num_rows
    entry = Round(
        objective=objective,
        sizes=tuple(partial.counts.tolist()),
        moves=partial.moves,
        shift=math.sqrt(float(moved.max()) / mean_squared) if mean_squared else 0.0,
        reseeded=len(empty),
    )
    return FitState(centroids, previous=state.centroids, history=(*state.history, entry))


def _by_mean(centroids: np.ndarray) -> np.ndarray:
    """Clusters in ascending order of their centroid's mean, int64 [K]."""
    means = [math.fsum(centroid) for centroid in centroids.tolist()]
    return np.lexsort((*centroids.T[::-1], means))


def _renumbered(state: FitState, order: np.ndarray) -> FitState:
    """Cluster i is the one that was order[i]."""
    history = tuple(replace(entry, sizes=tuple(entry.sizes[i] for i in order)) for entry in state.history)
    return FitState(np.ascontiguousarray(state.centroids[order]), history=history)


def _step(shards: Shards, args: tuple[Any, ...], num_rows: int) -> Partial:
    partial: Partial = _ask(shards, "step", *args)
    if partial.counts.sum() != num_rows:
        raise RuntimeError(f"k-means: expected {num_rows} rows from the shards, got {partial.counts.sum()}")
    return partial


def _start(shards: Shards, k: int, seed: int, start_rows: int, fewer: bool) -> np.ndarray:
    """k-means++ on the start sample; the farthest of all rows complete it if too few are distinct."""
    centroids = _plus_plus(_ask(shards, "sample", seed, start_rows).rows, k, seed)
    if len(centroids) < k:
        more = _farthest(shards, k - len(centroids), centroids, centroids, k, fewer)
        centroids = np.concatenate([centroids, more])
    return centroids


def _plus_plus(rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k-means++ (Arthur, Vassilvitskii 2007): up to k rows of distinct value, float32 [<= k, T]."""
    points, same = rows.astype(np.float64), np.zeros(len(rows), dtype=np.int64)
    # no example has a negative id, so these draws are independent of the hashes that chose the sample
    uniforms = (keyed_hash(seed, -1 - np.arange(k)) >> np.uint64(11)) * 2.0**-53
    chosen = [int(uniforms[0] * len(rows))]
    closest = squared_distances(points, points[chosen], same)
    while len(chosen) < k and closest.any():
        cumulative = np.cumsum(closest)
        chosen.append(int(np.searchsorted(cumulative, uniforms[len(chosen)] * cumulative[-1], side="right")))
        closest = np.minimum(closest, squared_distances(points, points[chosen[-1:]], same))
    return rows[chosen]


def _farthest(
    shards: Shards, m: int, centroids: np.ndarray, taken: np.ndarray, k: int, fewer: bool
) -> np.ndarray:
    """Rows [m, T] by the rule of Shard.farthest over all shards; where there are not so many: `fewer`, or a UserError."""
    rows: np.ndarray = _ask(shards, "farthest", m, centroids, taken).rows
    if len(rows) < m and not fewer:
        raise UserError(
            f"Clustering trajectories: expected at least clusters.k = {k} distinct trajectories, got "
            f"{len(_ask(shards, 'farthest', k, centroids, taken[:0]).ids)}. Lower clusters.k, or tell more rows apart: more "
            "clusters.steps, other clusters.features, more clusters.points_per_centroid where that is set."
        )
    return rows
