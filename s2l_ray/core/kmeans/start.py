"""The rows that k-means begins with: samples by keyed hash, and k-means++ on such a sample.

Shapes: n rows, T columns.
"""

import numpy as np

from s2l_ray.core.hashing import KMEANS_PLUS_PLUS, keyed_hash
from s2l_ray.core.kmeans.assign import squared_distances
from s2l_ray.core.kmeans.queries import HashCounts, HashesWith
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.query import Ask


def hash_limit(ask: Ask[Shard], seed: int, num_rows: int) -> int:
    """The `num_rows`-th smallest keyed hash of all rows, of which there are at least so many."""
    ends = np.cumsum(ask(HashCounts(seed)))
    leading = int(np.searchsorted(ends, num_rows))
    before = int(ends[leading - 1]) if leading else 0
    hashes = np.sort(ask(HashesWith(seed, leading)))
    return int(hashes[num_rows - before - 1])


def plus_plus(rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007): rows of distinct value, float32 [at most k, T].

    Args:
        rows: float32 [n, T] to draw from, in any order that does not depend on the shards.
    """
    points, same = rows.astype(np.float64), np.zeros(len(rows), dtype=np.int64)
    uniforms = (keyed_hash(KMEANS_PLUS_PLUS, seed, np.arange(k)) >> np.uint64(11)) * 2.0**-53
    chosen = [int(uniforms[0] * len(rows))]
    closest = squared_distances(points, points[chosen], same)
    while len(chosen) < k and closest.any():
        cumulative = np.cumsum(closest)
        target = uniforms[len(chosen)] * cumulative[-1]
        chosen.append(int(np.searchsorted(cumulative, target, side="right")))
        closest = np.minimum(closest, squared_distances(points, points[chosen[-1:]], same))
    return rows[chosen]
