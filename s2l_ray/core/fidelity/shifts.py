"""What shifted losses change: how far they are from the reference, and which rows change cluster.

Shapes: n rows, S columns of losses (member, step), K clusters, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2l_ray.config import Clusters
from s2l_ray.core.kmeans.features import features
from s2l_ray.core.kmeans.lloyd import KMeans
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.query import ask_here
from s2l_ray.core.storage.info import ClustersInfo, info_of
from s2l_ray.core.storage.manifest import Manifest

# Relative shifts are those to a loss of at least this.
SMALL_LOSS = 0.01


@dataclass(frozen=True)
class Grouping:
    """Centroids [K, F], the source that each serves (None: all), and where they are from."""

    centroids: np.ndarray
    sources: list[str | None]
    steps: list[list[int]]
    section: Clusters
    origin: str

    def labels(self, losses: np.ndarray, sources: Sequence[str]) -> np.ndarray:
        """Nearest centroid of each row, int64 [n]."""
        rows = features(losses, self.steps, self.section).astype(np.float64)
        allowed = {
            source: np.array([own is None or own == source for own in self.sources])
            for source in set(sources)
        }
        return np.array(
            [
                np.where(
                    allowed[source], ((self.centroids - row) ** 2).sum(axis=1), np.inf
                ).argmin()
                for row, source in zip(rows, sources, strict=True)
            ],
            np.int64,
        )


def committed_grouping(manifest: Manifest, steps: list[list[int]], section: Clusters) -> Grouping:
    """The job's own clusters."""
    info = info_of(manifest, ClustersInfo)
    centroids, sources = np.array(info.centroids, np.float64), info.cluster_sources
    return Grouping(centroids, sources, steps, section, f"the job's {len(centroids)} clusters")


def fresh_grouping(
    losses: np.ndarray, ids: np.ndarray, steps: list[list[int]], section: Clusters, complete: bool
) -> Grouping:
    """Clusters of these rows alone, by the job's features if all checkpoints are there."""
    if not complete:
        given = [step for _, step in steps]
        section = Clusters(
            k=section.k, seed=section.seed, initial=0 in given, steps=sorted(set(given))
        )
    rows = features(losses, steps, section)
    k = max(1, min(section.k, len(rows) // 4, len(np.unique(rows, axis=0))))
    settings = KMeans(
        k=k, seed=section.seed, max_rounds=section.max_rounds, tolerance=section.tolerance
    )
    found = settings.fit(ask_here(Shard([(ids, rows)])))
    centroids = found.centroids.astype(np.float64)
    return Grouping(centroids, [None] * k, steps, section, f"{k} clusters of these rows alone")


@dataclass(frozen=True)
class Shift:
    """The largest distance of a setting's losses from the reference: in nats, relative, its place
    (row, column); and how many rows are in another cluster."""

    absolute: float
    relative: float
    row: int
    column: int
    moved: int


def shift(
    reference: np.ndarray, losses: np.ndarray, before: np.ndarray, after: np.ndarray
) -> Shift:
    """Compare losses [n, S], and labels [n]."""
    distance = np.abs(losses.astype(np.float64) - reference)
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    relative = (distance / np.maximum(reference, SMALL_LOSS)).max()
    moved = int((before != after).sum())
    return Shift(float(distance[row, column]), float(relative), int(row), int(column), moved)
