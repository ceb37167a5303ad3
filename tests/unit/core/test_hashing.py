"""The keyed hash against plain integers."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.core import hashing
from s2l_ray.core.hashing import _finalise, keyed_hash

MASK = 2**64 - 1


def finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_finaliser_gives_the_published_outputs_of_splitmix64() -> None:
    # first outputs of splitmix64 from state 1234567, as in the generator's public test vectors
    states = (1234567 + 0x9E3779B97F4A7C15 * np.arange(1, 6, dtype=object)) & MASK
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert _finalise(states.astype(np.uint64)).tolist() == expected


@given(
    st.text(max_size=20),
    st.integers(-(2**70), 2**70),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
)
def test_the_vectorised_hash_equals_plain_integers(purpose: str, seed: int, ids: list[int]) -> None:
    salt = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = finalise(((seed + 0x9E3779B97F4A7C15) & MASK) ^ salt)
    expected = [finalise(((i + 1) * 0x9E3779B97F4A7C15 + key) & MASK) for i in ids]
    hashes = keyed_hash(purpose, seed, np.array(ids, dtype=np.int64))
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == expected


def test_ids_keep_their_value_and_no_two_tie() -> None:
    ids = np.concatenate([np.arange(100_000), (7 << 40) + np.arange(100_000)])
    before = ids.copy()
    assert len(np.unique(keyed_hash("a", 0, ids))) == len(ids)
    assert (ids == before).all()


def test_purposes_neighbouring_seeds_and_neighbouring_ids_give_unrelated_hashes() -> None:
    named = [value for name, value in vars(hashing).items() if name.isupper() and name[0] != "_"]
    assert len(set(named)) == len(named) == 11
    ids = np.arange(4096)
    hashes = np.stack(
        [keyed_hash("a", seed, ids) for seed in range(8)]
        + [keyed_hash(purpose, 0, ids) for purpose in named]
    )
    pairs = [(hashes[0], other) for other in hashes[1:]] + [(hashes[0, 1:], hashes[0, :-1])]
    for a, b in pairs:
        flipped = np.bitwise_count(a ^ b).mean()
        # 64 fair bits, 4096 times: 32 +- 0.0625
        assert 31.5 < flipped < 32.5


def test_each_leading_value_is_about_equally_frequent() -> None:
    counts = np.bincount(
        (keyed_hash("a", 3, np.arange(256_000)) >> np.uint64(56)).astype(int), minlength=256
    )
    # chi-square, 255 degrees of freedom: p(400) < 1e-7
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 400
