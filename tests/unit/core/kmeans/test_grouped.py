"""k-means inside groups: each group is clustered as if it were alone, whatever holds its rows."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from s2l_ray.config import Clusters
from s2l_ray.core.kmeans.grouped import Call, GroupedShard, StreamedShard, View, fit_group, moved
from s2l_ray.core.kmeans.lloyd import fit
from s2l_ray.core.kmeans.shard import Shard, merged
from s2l_ray.errors import UserError

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
SIZES = (500, 0, 1, 300, 77, 640)
GROUPS = 4  # the last one has no rows


def section(**fields: Any) -> Clusters:
    return Clusters.model_validate({"k": 5, "seed": 2, "max_rounds": 6, "tolerance": 0.0, **fields})


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    draw, made = np.random.default_rng(0), []
    for number, size in enumerate(SIZES):
        groups = draw.choice(GROUPS - 1, size, p=[0.7, 0.28, 0.02])
        rows = draw.normal(size=(size, 3)) + groups[:, None]
        made.append((np.arange(size) + (number << 40), rows.astype(np.float32), groups))
    return made


def shared(parts: list[Part], num_shards: int, seed: int = 0) -> tuple[Call, list[list[Part]]]:
    """Parts on so many shards, which answer in any order; and which parts each has."""
    mixed = random.Random(seed).sample(parts, len(parts))
    shares = [mixed[number::num_shards] for number in range(num_shards)]
    shards = [GroupedShard(share) for share in shares]
    order = random.Random(seed)

    def call(view: View, method: str, args: tuple[Any, ...]) -> Iterable[Any]:
        return (shard.call(view, method, args) for shard in order.sample(shards, len(shards)))

    return call, shares


@pytest.mark.parametrize("num_shards", [1, 2, 5, 9])
@pytest.mark.parametrize("points", [None, 8])
def test_a_group_is_fitted_as_if_it_were_alone(
    parts: list[Part], num_shards: int, points: int | None
) -> None:
    call, _ = shared(parts, num_shards, seed=num_shards)
    made = section(within="source", points_per_centroid=points)
    for group in range(GROUPS - 1):
        own = [(ids[groups == group], rows[groups == group]) for ids, rows, groups in parts]
        alone, count = Shard(own), sum(len(ids) for ids, _ in own)
        sample = alone
        if points is not None and 5 * points < count:
            hashes = np.sort(np.concatenate([_hash(ids) for ids, _ in own]))
            sample = alone.sampled(2, int(hashes[5 * points - 1]))
            assert sample.summary().num_rows == 5 * points
        expected = fit(
            lambda method, args, shard=sample: [getattr(shard, method)(*args)],
            k=5,
            seed=2,
            max_rounds=6,
            tolerance=0.0,
            everyone=lambda method, args, shard=alone: [getattr(shard, method)(*args)],
        )
        found = fit_group(call, group, made)
        assert found.centroids.tobytes() == expected.centroids.tobytes()
        assert found.sizes.tolist() == expected.sizes.tolist()
        assert (found.objective, found.history) == (expected.objective, expected.history)


def _hash(ids: np.ndarray) -> np.ndarray:
    from s2l_ray.core.hashing import keyed_hash

    return keyed_hash(2, ids)


@pytest.mark.parametrize("points", [None, 8])
@pytest.mark.parametrize("forgets", [False, True])
def test_streamed_parts_give_the_bits_of_held_ones(
    parts: list[Part], points: int | None, forgets: bool
) -> None:
    """`forgets`: a shard that was restarted before every call."""
    made, (held, shares) = section(within="source", points_per_centroid=points), shared(parts, 2)
    reads: list[int] = []

    def read(share: list[Part], number: int) -> Part:
        reads.append(number)
        return share[number]

    def streamed(share: list[Part]) -> StreamedShard:
        return StreamedShard(len(share), lambda number: read(share, number))

    kept = [streamed(share) for share in shares]

    def call(view: View, method: str, args: tuple[Any, ...]) -> Iterable[Any]:
        now = [streamed(share) for share in shares] if forgets else kept
        return (shard.call(view, method, args) for shard in now)

    for group in range(GROUPS - 1):
        expected, found = fit_group(held, group, made), fit_group(call, group, made)
        assert found.centroids.tobytes() == expected.centroids.tobytes()
        assert (found.sizes.tolist(), found.objective) == (
            expected.sizes.tolist(),
            expected.objective,
        )
        assert found.history == expected.history
        limit = None if points is None else 2**63
        for method, args in (
            ("sample", (3, 40)),
            ("farthest", (7, expected.centroids, expected.centroids)),
        ):
            mine, other = (
                merged(method, args, ask(View(group, 2, limit), method, args))
                for ask in (call, held)
            )
            assert mine.ids.tolist() == other.ids.tolist()
            assert mine.rows.tobytes() == other.rows.tobytes()
    centroids = [fit_group(held, group, made).centroids for group in range(GROUPS - 1)]
    for share, shard in zip(shares, kept, strict=True):
        for number in range(len(share)):
            for mine, other in zip(
                shard.labels(number, centroids),
                GroupedShard(share).labels(number, centroids),
                strict=True,
            ):
                assert (mine.dtype, mine.tolist()) == (other.dtype, other.tolist())
    assert len(reads) > 4 * len(parts)


def test_labels_of_a_part_are_numbered_through_all_groups(parts: list[Part]) -> None:
    call, (mine, _) = shared(parts, 2)
    found = [fit_group(call, group, section(within="source")) for group in range(GROUPS - 1)]
    centroids = [own.centroids for own in found]
    shard, counts = GroupedShard(mine), np.zeros(15, np.int64)
    together = np.concatenate(centroids)
    for number, (ids, rows, groups) in enumerate(mine):
        labels, distances = shard.labels(number, centroids)
        assert (labels.dtype, distances.dtype, len(labels)) == (np.int32, np.float32, len(ids))
        assert (labels // 5 == groups).all()
        exact = (
            np.linalg.norm(rows - together[labels].astype(np.float64), axis=1) if len(rows) else []
        )
        np.testing.assert_allclose(distances, exact, rtol=1e-6)
        for row, group, distance in zip(rows, groups, distances, strict=True):
            nearest = np.linalg.norm(row - centroids[group].astype(np.float64), axis=1).min()
            assert distance == pytest.approx(nearest, rel=1e-6)
        counts += np.bincount(labels, minlength=15)
    assert (counts <= np.concatenate([own.sizes for own in found])).all()


def test_all_rows_as_one_group_are_a_plain_fit(parts: list[Part]) -> None:
    everyone = [(ids, rows, np.zeros(len(ids), int)) for ids, rows, _ in parts]
    found = fit_group(shared(everyone, 3)[0], 0, section())
    plain = Shard([(ids, rows) for ids, rows, _ in parts])
    expected = fit(
        lambda method, args: [getattr(plain, method)(*args)],
        k=5,
        seed=2,
        max_rounds=6,
        tolerance=0.0,
    )
    assert found.centroids.tobytes() == expected.centroids.tobytes()


def test_a_base_is_kept_or_refined_and_what_moved_is_exact(parts: list[Part]) -> None:
    call, _ = shared(parts, 3)
    base = fit_group(call, 0, section(within="source", max_rounds=1)).centroids[::-1].copy()
    used = fit_group(call, 0, section(within="source", use="x"), base=base)
    assert used.centroids is base
    assert used.history == ()
    refined = fit_group(call, 0, section(within="source", use="x", refine=True), base=base)
    assert len(refined.history) > 1
    assert refined.objective < used.objective
    change = moved(call, 0, base, refined.centroids)
    rows = np.concatenate([rows[groups == 0] for _, rows, groups in parts]).astype(np.float64)
    before, after = (
        np.linalg.norm(rows[:, None] - centroids, axis=2).argmin(axis=1)
        for centroids in (base, refined.centroids)
    )
    assert change.changed == int((before != after).sum()) > 0
    assert (
        change.before.tolist() == np.bincount(before, minlength=5).tolist() == used.sizes.tolist()
    )
    np.testing.assert_allclose(
        change.shifts, np.linalg.norm(refined.centroids - base, axis=1), rtol=1e-5
    )
    still = moved(call, 0, base, base)
    assert (still.changed, still.shifts.tolist()) == (0, [0.0] * 5)


@pytest.mark.parametrize("refine", [False, True])
def test_a_group_without_rows_keeps_its_base(parts: list[Part], refine: bool) -> None:
    call, _ = shared(parts, 2)
    base = np.ones((5, 3), np.float32)
    found = fit_group(call, GROUPS - 1, section(within="source", use="x", refine=refine), base=base)
    assert found.centroids is base
    assert found.sizes.tolist() == [0] * 5
    assert moved(call, GROUPS - 1, base, base).before.tolist() == [0] * 5


def test_fewer_distinct_rows_than_k_are_only_allowed_within_sources(parts: list[Part]) -> None:
    same = [(ids, np.round(rows[:, :1] * 0), groups) for ids, rows, groups in parts]
    call, _ = shared(same, 2)
    assert fit_group(call, 1, section(within="source")).centroids.tolist() == [[0.0]]
    with pytest.raises(
        UserError, match=r"clusters.k = 5 distinct trajectories, got 1\. .*clusters.features"
    ):
        fit_group(call, 1, section())
