"""A keyed hash of example ids: the only source of randomness in sampling and selection.

It depends on (purpose, seed, example_id) and nothing else, so a draw is the same for any order of
the rows, any cut into parts and any machine, and draws for two purposes are independent.
"""

import hashlib

import numpy as np

# Purposes of draws, each listed once, so that no two share a salt by accident.
SCORED = "trajectories.sample"
KMEANS_SAMPLE = "clusters.points_per_centroid"
KMEANS_START = "rows that k-means starts from"
KMEANS_PLUS_PLUS = "draws of k-means++"
SUBSET = "subset"
COVERING = "facility_location"
SEARCH = "sample of keys"
TRAINING_ORDER = "order of training"
DROPOUT = "dropout"
CHECKED = "rows of a check"
BOOTSTRAP = "bootstrap"

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def _finalise(state: np.ndarray) -> np.ndarray:
    """Output function of splitmix64 (Steele, Lea, Flood 2014), a bijection; changes `state`."""
    state ^= state >> np.uint64(30)
    state *= _MULTIPLY_1
    state ^= state >> np.uint64(27)
    state *= _MULTIPLY_2
    state ^= state >> np.uint64(31)
    return state


def _salt(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def keyed_hash(purpose: str, seed: int, ids: np.ndarray) -> np.ndarray:
    """Hash int64 ids [n] to uint64 [n]: output number `id` of the splitmix64 stream of a key.

        key = finalise((seed + golden) ^ salt(purpose))
        hash = finalise((id + 1) * golden + key)  modulo 2^64

    For every key this is a bijection of the id, because multiplying by an odd number, adding a
    constant and the finaliser are bijections: distinct ids never tie. The seed is any integer,
    taken modulo 2^64. The key is hashed, so that neighbouring seeds give unrelated streams. The
    salt is the first 8 bytes of the purpose's SHA-256, as a little-endian number.
    """
    key = np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN
    key = _finalise(key ^ np.uint64(_salt(purpose)))
    return _finalise(
        (np.asarray(ids, dtype=np.int64).view(np.uint64) + np.uint64(1)) * _GOLDEN + key
    )
