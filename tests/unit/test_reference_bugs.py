"""Bugs of the published code, each by its number in the reference notes (section 7.2), and that they are not ours."""

import numpy as np

from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.selection import Keys, Points, draw, quotas


def test_bug_8_the_selection_is_seeded_and_depends_on_nothing_else() -> None:
    """np.random.choice runs there before any seed is set; here a draw is a function of (seed, id)."""
    ids = np.arange(1000, dtype=np.int64) * 7
    groups = ids % 5

    def chosen(seed: int, order: np.ndarray) -> set[int]:
        points = Points(groups[order], np.zeros(1000, np.uint64), keyed_hash(seed, ids[order]))
        keys = Keys.of(points, np.zeros(1000, np.int32), 5)
        taken = quotas(keys.sizes(), 110)
        found = draw(lambda method, args: [getattr(keys, method)(*args)], keys.sizes(), taken)
        return set(ids[order][found.chosen(points)].tolist())

    np.random.seed(1)
    as_stored, shuffled = np.arange(1000), np.random.default_rng(2).permutation(1000)
    first = chosen(3, as_stored)
    np.random.seed(99)
    assert chosen(3, as_stored) == chosen(3, shuffled) == first
    assert len(first) == 110
    assert chosen(4, as_stored) != first


def test_bug_12_a_source_with_more_rows_than_its_share_and_fewer_than_clusters() -> None:
    """FAISS raises there on a source of 60 rows, a share of 40 and 100 clusters; here its rows lie in as many clusters as there are."""
    sizes = np.zeros((2, 100), np.int64)
    sizes[0, :60] = 1  # a source of 60 rows: a cluster each, the others empty
    sizes[1] = 9
    parents = np.repeat([0, 1], 100)
    taken = quotas(sizes.reshape(-1), 80, parents=parents).reshape(2, 100)
    assert taken.sum(axis=1).tolist() == [40, 40]
    assert taken[0, 60:].sum() == 0
    # with the authors' rule that tiny clusters come last, all of them are tiny: they are used all the same
    last = quotas(sizes.reshape(-1), 80, small_last=2, parents=parents).reshape(2, 100)
    assert last.sum(axis=1).tolist() == [40, 40]
