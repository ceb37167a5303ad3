"""k-means inside sources: all rows are clustered together, or those of each source by themselves.

Sources share nothing but the processes that hold their rows, so every source's fit is a plain fit
of `KMeans` over the shards of that source. The centroids may be found on a sample of its rows.

Shapes: F features, K clusters of a source.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from s2l_ray.config import Clusters
from s2l_ray.core.kmeans.lloyd import KMeans, assigned
from s2l_ray.core.kmeans.process_rows import ProcessRows, View, in_view
from s2l_ray.core.kmeans.queries import Summarise
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.kmeans.start import hash_limit
from s2l_ray.core.kmeans.state import FitResult, FitState
from s2l_ray.core.query import Ask


def fit_source(
    ask: Ask[ProcessRows],
    source: int,
    section: Clusters,
    *,
    base: np.ndarray | None = None,
    resume: FitState | None = None,
    on_round: Callable[[FitState], None] | None = None,
) -> FitResult:
    """The clusters of one source.

    With section.points_per_centroid, the centroids are found on the rows with the smallest keyed
    hashes, k times so many, and all rows are assigned to them. A source with fewer distinct rows
    than k (among those that the centroids are found on) gets as many clusters as there are, within
    sources.

    Args:
        base: float32 [K, F] centroids of another run: used as they are, or with section.refine the
            start. Their numbers stay. A cluster that no row can fill any more stays where it was,
            without rows.
        resume, on_round: see KMeans.fit.

    Raises:
        UserError: see KMeans.fit.
    """
    everyone = in_view(ask, View(source))
    num_rows = everyone(Summarise()).num_rows
    if base is not None and (not section.refine or not num_rows):
        last = assigned(everyone, base)
        return FitResult(base, last.sizes, last.objective, history=(), converged=True)
    settings = KMeans(
        k=section.k if base is None else len(base),
        seed=section.seed,
        max_rounds=section.max_rounds,
        tolerance=section.tolerance,
        start=base,
        allow_fewer_clusters=base is not None or section.within == "source",
    )
    sample = in_view(ask, _sample(everyone, source, section, num_rows))
    return settings.fit(sample, everyone=everyone, resume=resume, on_round=on_round)


def _sample(everyone: Ask[Shard], source: int, section: Clusters, num_rows: int) -> View:
    """The rows that a source's centroids are found on."""
    per_centroid = section.points_per_centroid
    points = num_rows if per_centroid is None else section.k * per_centroid
    if points >= num_rows:
        return View(source)
    return View(source, section.seed, hash_limit(everyone, section.seed, points))


@dataclass(frozen=True)
class Moved:
    """What refining did to the clusters of a source.

    Attributes:
        before: int64 [K] sizes of all present rows under the base's centroids.
        changed: rows that have another cluster now.
        shifts: float64 [K] how far each centroid went, Euclidean in feature space.
    """

    before: np.ndarray
    changed: int
    shifts: np.ndarray


def moved(ask: Ask[ProcessRows], source: int, base: np.ndarray, centroids: np.ndarray) -> Moved:
    """Compare two sets of centroids [K, F] with the same numbers on all rows of a source."""
    everyone = in_view(ask, View(source))
    before = assigned(everyone, base).sizes
    changed = assigned(everyone, centroids, previous=base).moves
    shifts = np.linalg.norm(centroids.astype(np.float64) - base.astype(np.float64), axis=1)
    return Moved(before, changed, shifts)
