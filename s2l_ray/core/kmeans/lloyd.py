"""Lloyd's k-means over shards: they add up members exactly, a small driver loop moves the
centroids.

The same rows, cut into the same parts, give the same bits for any number of shards, any order of
parts or answers and any restart: see `Shard`.

Shapes: N rows (examples that could be scored), T columns (steps or features), K clusters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from s2l_ray.core.kmeans.assign import squared_distances
from s2l_ray.core.kmeans.queries import Farthest, LloydStep, SmallestHashes, Summarise
from s2l_ray.core.kmeans.shard import Shard, Summary
from s2l_ray.core.kmeans.start import plus_plus
from s2l_ray.core.kmeans.state import FitResult, FitState, Round
from s2l_ray.core.kmeans.sums import PartialSums, fixed_point_exponent
from s2l_ray.core.query import Ask
from s2l_ray.errors import UserError

START_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Settings of a fit.

    A cluster without members gets the row farthest from its own centroid, by (-squared distance,
    id), whose value no other centroid has. Several empty clusters take such rows in turn, the
    lowest cluster number first. A cluster can be empty in the result only if the very last
    assignment left it so.

    Attributes:
        k: number of clusters. They are numbered by ascending mean of their centroid.
        seed: of the start: k-means++ in float64 on the rows with the smallest keyed hashes.
        max_rounds: the centroids are moved at most so often.
        tolerance: stop after a round without empty clusters whose shift (see Round) is at most
            this.
        start_rows: size of the start sample.
        start: float32 [K, T] centroids to begin from instead; clusters keep their numbers.
        allow_fewer_clusters: where there are fewer distinct rows than clusters, have one cluster
            for each (with a start: leave what cannot be filled where it is) instead of raising.
    """

    k: int
    seed: int
    max_rounds: int
    tolerance: float
    start_rows: int = START_ROWS
    start: np.ndarray | None = None
    allow_fewer_clusters: bool = False

    def fit(
        self,
        ask: Ask[Shard],
        *,
        everyone: Ask[Shard] | None = None,
        resume: FitState | None = None,
        on_round: Callable[[FitState], None] | None = None,
    ) -> FitResult:
        """Find centroids; the driver holds K x T and at most two start samples.

        Args:
            ask: asks the shards of the rows to find the centroids on.
            everyone: asks the shards of all rows, where those above are a sample.
            resume: state after some round of a fit with the same settings and rows.
            on_round: called with the state after every round.

        Raises:
            UserError: k is below 1, above the number of rows or of distinct rows; T differs.
        """
        rows = ask(Summarise())
        self._check_rows(rows)
        exponent = fixed_point_exponent(rows.num_rows, rows.max_abs)
        state = resume or FitState(np.ascontiguousarray(self._start(ask), dtype=np.float32))
        self._check_state(state, rows.num_columns)
        while not state.converged(self.tolerance) and state.round < self.max_rounds:
            state = self._next_round(ask, state, rows.num_rows, exponent)
            if on_round is not None:
                on_round(state)
        previous, order = None if everyone else state.previous, None
        if self.start is None:
            order = _by_mean(state.centroids)
            state = state.renumbered(order)
        # Which of two equal centroids a row gets depends on their places, so sizes are those of an
        # assignment in the final order.
        last = assigned(everyone or ask, state.centroids, previous, order)
        converged = state.converged(self.tolerance)
        return FitResult(state.centroids, last.sizes, last.objective, state.history, converged)

    def _check_rows(self, rows: Summary) -> None:
        if 1 <= self.k <= rows.num_rows or (self.allow_fewer_clusters and rows.num_rows):
            return
        raise UserError(
            "Clustering trajectories: expected clusters.k between 1 and the number of examples "
            f"with a trajectory, {rows.num_rows}, got {self.k}. Change clusters.k or add examples."
        )

    def _check_state(self, state: FitState, num_columns: int) -> None:
        shape = state.centroids.shape
        enough = shape[0] == self.k or self.allow_fewer_clusters
        if not enough or shape[1] != num_columns or not np.isfinite(state.centroids).all():
            raise ValueError(f"expected finite centroids {(self.k, num_columns)}, got {shape}")

    def _start(self, ask: Ask[Shard]) -> np.ndarray:
        """The centroids to begin from: k-means++ on the start sample.

        If too few rows of it are distinct, the farthest of all rows complete them.
        """
        if self.start is not None:
            return self.start
        sample = ask(SmallestHashes(self.seed, self.start_rows))
        centroids = plus_plus(sample.rows, self.k, self.seed)
        if len(centroids) < self.k:
            more = self._farthest(ask, self.k - len(centroids), centroids, centroids)
            centroids = np.concatenate([centroids, more])
        return centroids

    def _next_round(
        self, ask: Ask[Shard], state: FitState, num_rows: int, exponent: int
    ) -> FitState:
        sums = ask(LloydStep(state.centroids, exponent, state.previous))
        _check_counts(sums, num_rows)
        full = sums.counts > 0
        centroids = state.centroids.copy()
        centroids[full] = np.ldexp(sums.sums[full] / sums.counts[full, None], -exponent)
        empty = np.flatnonzero(~full)
        if len(empty):
            rows = self._farthest(ask, len(empty), state.centroids, centroids[full])
            empty = empty[: len(rows)]
            centroids[empty] = rows
        moved = squared_distances(centroids[full], state.centroids, np.flatnonzero(full))
        objective = sums.objective(state.centroids, exponent)
        mean_squared = objective / num_rows
        entry = Round(
            objective=objective,
            sizes=tuple(sums.counts.tolist()),
            moves=sums.moves,
            shift=math.sqrt(float(moved.max()) / mean_squared) if mean_squared else 0.0,
            reseeded=len(empty),
        )
        return FitState(centroids, previous=state.centroids, history=(*state.history, entry))

    def _farthest(
        self, ask: Ask[Shard], count: int, centroids: np.ndarray, taken: np.ndarray
    ) -> np.ndarray:
        """Rows [count, T], see `queries.Farthest`; fewer only where that is allowed."""
        rows = ask(Farthest(count, centroids, taken)).rows
        if len(rows) < count and not self.allow_fewer_clusters:
            distinct = len(ask(Farthest(self.k, centroids, taken[:0])).ids)
            raise UserError(
                f"Clustering trajectories: expected at least clusters.k = {self.k} distinct "
                f"trajectories, got {distinct}. Lower clusters.k, or tell more rows apart: more "
                "clusters.steps, other clusters.features, more clusters.points_per_centroid where "
                "that is set."
            )
        return rows


@dataclass(frozen=True)
class Assignment:
    """What assigning all rows to some centroids gives.

    Attributes:
        sizes: int64 [K] members of each cluster.
        objective: sum of squared distances of the rows to their centroids.
        moves: rows that had another number before.
    """

    sizes: np.ndarray
    objective: float
    moves: int


def assigned(
    ask: Ask[Shard],
    centroids: np.ndarray,
    previous: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> Assignment:
    """Assign all rows to centroids float32 [K, T]; see `LloydStep` for `previous` and `order`."""
    rows = ask(Summarise())
    exponent = fixed_point_exponent(rows.num_rows, rows.max_abs)
    sums = ask(LloydStep(centroids, exponent, previous, order))
    _check_counts(sums, rows.num_rows)
    return Assignment(sums.counts, sums.objective(centroids, exponent), sums.moves)


def _check_counts(sums: PartialSums, num_rows: int) -> None:
    if sums.counts.sum() != num_rows:
        raise RuntimeError(
            f"k-means: expected {num_rows} rows from the shards, got {sums.counts.sum()}"
        )


def _by_mean(centroids: np.ndarray) -> np.ndarray:
    """Clusters in ascending order of their centroid's mean, int64 [K]."""
    means = [math.fsum(centroid) for centroid in centroids.tolist()]
    return np.lexsort((*centroids.T[::-1], means))
