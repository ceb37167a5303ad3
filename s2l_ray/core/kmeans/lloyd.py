"""Sharded k-means on loss trajectories: shards add up members exactly, a small driver loop moves the
centroids.

The same rows, cut into the same parts, give the same bits for any number of shards, any order of parts or
answers and any restart: see `Shard`.

Shapes: N rows (examples that could be scored), T columns (steps, or features made of them), K clusters.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.kmeans.shard import Summary, merged, squared_distances
from s2l_ray.core.kmeans.sums import Partial, fixed_point_exponent
from s2l_ray.errors import UserError

START_ROWS = 65_536
Shards = Callable[[str, tuple[Any, ...]], Iterable[Any]]


def _ask(shards: Shards, method: str, *args: Any) -> Any:
    return merged(method, args, shards(method, args))


def hash_limit(shards: Shards, seed: int, num_rows: int) -> int:
    """The `num_rows`-th smallest keyed hash of all rows, of which there are at least so many."""
    ends = np.cumsum(_ask(shards, "hash_counts", seed))
    leading = int(np.searchsorted(ends, num_rows))
    before = int(ends[leading - 1]) if leading else 0
    hashes = np.sort(_ask(shards, "hashes", seed, leading))
    return int(hashes[num_rows - before - 1])


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
            history=tuple(
                Round(**{**entry, "sizes": tuple(entry["sizes"])}) for entry in value["history"]
            ),
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
    return (
        bool(state.history)
        and state.history[-1].reseeded == 0
        and state.history[-1].shift <= tolerance
    )


def _next_round(
    shards: Shards, state: FitState, num_rows: int, exponent: int, fewer: bool
) -> FitState:
    partial = _step(shards, (state.centroids, exponent, state.previous), num_rows)
    full = partial.counts > 0
    centroids = state.centroids.copy()
    centroids[full] = np.ldexp(partial.sums[full] / partial.counts[full, None], -exponent)
    empty = np.flatnonzero(~full)
    if len(empty):
        rows = _farthest(
            shards, len(empty), state.centroids, centroids[full], len(centroids), fewer
        )
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
    history = tuple(
        replace(entry, sizes=tuple(entry.sizes[i] for i in order)) for entry in state.history
    )
    return FitState(np.ascontiguousarray(state.centroids[order]), history=history)


def _step(shards: Shards, args: tuple[Any, ...], num_rows: int) -> Partial:
    partial: Partial = _ask(shards, "step", *args)
    if partial.counts.sum() != num_rows:
        raise RuntimeError(
            f"k-means: expected {num_rows} rows from the shards, got {partial.counts.sum()}"
        )
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
        chosen.append(
            int(np.searchsorted(cumulative, uniforms[len(chosen)] * cumulative[-1], side="right"))
        )
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
