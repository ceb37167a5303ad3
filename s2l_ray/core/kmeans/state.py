"""What a k-means fit keeps between rounds, and what it returns.

Shapes: T columns (steps, or features made of them), K clusters.
"""

from dataclasses import dataclass, replace

import numpy as np

from s2l_ray.core.storage.records import Float32Array


@dataclass(frozen=True)
class Round:
    """What one round saw before it moved the centroids.

    Attributes:
        objective: sum of squared distances of the rows to their centroids.
        sizes: members of each cluster.
        moves: rows that changed their cluster, see PartialSums.
        shift: largest distance that a centroid with members moved, as a fraction of the root mean
            square distance of rows to their centroid; 0 where that is 0.
        reseeded: clusters that had no members and were given a new centroid.
    """

    objective: float
    sizes: tuple[int, ...]
    moves: int
    shift: float
    reseeded: int


@dataclass(frozen=True)
class FitState:
    """All that the driver keeps between rounds; resuming from it gives the same bits.

    Attributes:
        centroids: float32 [K, T], for the next round.
        previous: those that the last round assigned rows to; None before the first round.
        history: the finished rounds.
    """

    centroids: Float32Array
    previous: Float32Array | None = None
    history: tuple[Round, ...] = ()

    @property
    def round(self) -> int:
        """Number of finished rounds."""
        return len(self.history)

    def converged(self, tolerance: float) -> bool:
        """Whether the last round had no empty clusters and a shift of at most this."""
        last = self.history[-1] if self.history else None
        return last is not None and last.reseeded == 0 and last.shift <= tolerance

    def renumbered(self, order: np.ndarray) -> "FitState":
        """The same clusters under other numbers, without `previous`: cluster i was order[i]."""
        history = tuple(
            replace(entry, sizes=tuple(entry.sizes[i] for i in order)) for entry in self.history
        )
        return FitState(np.ascontiguousarray(self.centroids[order]), history=history)


@dataclass(frozen=True)
class FitResult:
    """Final centroids, and what assigning all rows to them gives.

    Attributes:
        centroids: float32 [K, T].
        sizes: int64 [K] members of each cluster, by one more assignment after the last round.
        objective: of that assignment; both agree with `Shard.labels`.
        history: the rounds, on the rows that the centroids were found on, by final cluster numbers.
        converged: whether the tolerance stopped the fit.
    """

    centroids: np.ndarray
    sizes: np.ndarray
    objective: float
    history: tuple[Round, ...]
    converged: bool
