"""A keyed hash of example ids: the only source of randomness in sampling and selection.

It depends on (seed, example_id) and nothing else, so a draw is the same for any order of the rows,
any cut into parts and any machine.
"""

import numpy as np

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


def keyed_hash(seed: int, ids: np.ndarray) -> np.ndarray:
    """Hash int64 ids [n] to uint64 [n]: output number `id` of the splitmix64 stream of the seed.

        hash(seed, id) = finalise((id + 1) * golden + finalise(seed + golden))  modulo 2^64

    For every seed this is a bijection of the id, because multiplying by an odd number, adding a
    constant and the finaliser are bijections: distinct ids never tie. The seed is any integer,
    taken modulo 2^64. It is hashed first, so that neighbouring seeds give unrelated streams.
    """
    key = _finalise(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    return _finalise(
        (np.asarray(ids, dtype=np.int64).view(np.uint64) + np.uint64(1)) * _GOLDEN + key
    )
