"""k-means inside sources: each is clustered as if it were alone, whatever holds its rows."""

import random
from typing import Any

import numpy as np
import pytest

from s2l_ray.config import Clusters
from s2l_ray.core.kmeans.lloyd import KMeans
from s2l_ray.core.kmeans.process_rows import HeldRows, ProcessRows, StreamedRows, View, in_view
from s2l_ray.core.kmeans.queries import Farthest, SmallestHashes
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.kmeans.sources import fit_source, moved
from s2l_ray.core.query import Ask, Query, ask_here
from s2l_ray.errors import UserError

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
SIZES = (500, 0, 1, 300, 77, 640)
# the last one has no rows
SOURCES = 4


def section(**fields: Any) -> Clusters:
    return Clusters.model_validate({"k": 5, "seed": 2, "max_rounds": 6, "tolerance": 0.0, **fields})


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    draw, made = np.random.default_rng(0), []
    for number, size in enumerate(SIZES):
        sources = draw.choice(SOURCES - 1, size, p=[0.7, 0.28, 0.02])
        rows = draw.normal(size=(size, 3)) + sources[:, None]
        made.append((np.arange(size) + (number << 40), rows.astype(np.float32), sources))
    return made


def shared(
    parts: list[Part], num_shards: int, seed: int = 0
) -> tuple[Ask[ProcessRows], list[list[Part]]]:
    """Parts on so many shards, which answer in any order; and which parts each has."""
    mixed = random.Random(seed).sample(parts, len(parts))
    shares = [mixed[number::num_shards] for number in range(num_shards)]
    shards: list[ProcessRows] = [HeldRows(share) for share in shares]
    order = random.Random(seed)

    def ask(query: Query[ProcessRows, Any]) -> Any:
        return ask_here(*order.sample(shards, len(shards)))(query)

    return ask, shares


@pytest.mark.parametrize("num_shards", [1, 2, 5, 9])
@pytest.mark.parametrize("points", [None, 8])
def test_a_source_is_fitted_as_if_it_were_alone(
    parts: list[Part], num_shards: int, points: int | None
) -> None:
    ask, _ = shared(parts, num_shards, seed=num_shards)
    made = section(within="source", points_per_centroid=points)
    for source in range(SOURCES - 1):
        own = [(ids[sources == source], rows[sources == source]) for ids, rows, sources in parts]
        alone, count = Shard(own), sum(len(ids) for ids, _ in own)
        sample = alone
        if points is not None and 5 * points < count:
            hashes = np.sort(np.concatenate([_hash(ids) for ids, _ in own]))
            sample = alone.sampled(2, int(hashes[5 * points - 1]))
            assert sample.summary.num_rows == 5 * points
        plain = KMeans(k=5, seed=2, max_rounds=6, tolerance=0.0)
        expected = plain.fit(ask_here(sample), everyone=ask_here(alone))
        found = fit_source(ask, source, made)
        assert found.centroids.tobytes() == expected.centroids.tobytes()
        assert found.sizes.tolist() == expected.sizes.tolist()
        assert (found.objective, found.history) == (expected.objective, expected.history)


def _hash(ids: np.ndarray) -> np.ndarray:
    from s2l_ray.core.hashing import KMEANS_SAMPLE, keyed_hash

    return keyed_hash(KMEANS_SAMPLE, 2, ids)


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

    def streamed(share: list[Part]) -> StreamedRows:
        return StreamedRows(len(share), lambda number: read(share, number))

    kept = [streamed(share) for share in shares]

    def ask(query: Query[ProcessRows, Any]) -> Any:
        return ask_here(*([streamed(share) for share in shares] if forgets else kept))(query)

    for source in range(SOURCES - 1):
        expected, found = fit_source(held, source, made), fit_source(ask, source, made)
        assert found.centroids.tobytes() == expected.centroids.tobytes()
        assert (found.sizes.tolist(), found.objective) == (
            expected.sizes.tolist(),
            expected.objective,
        )
        assert found.history == expected.history
        limit = None if points is None else 2**63
        for query in (
            SmallestHashes(3, 40),
            Farthest(7, expected.centroids, expected.centroids),
        ):
            mine, other = (in_view(each, View(source, 2, limit))(query) for each in (ask, held))
            assert mine.ids.tolist() == other.ids.tolist()
            assert mine.rows.tobytes() == other.rows.tobytes()
    centroids = [fit_source(held, source, made).centroids for source in range(SOURCES - 1)]
    for share, shard in zip(shares, kept, strict=True):
        for number in range(len(share)):
            for mine, other in zip(
                shard.labels(number, centroids),
                HeldRows(share).labels(number, centroids),
                strict=True,
            ):
                assert (mine.dtype, mine.tolist()) == (other.dtype, other.tolist())
    assert len(reads) > 4 * len(parts)


def test_labels_of_a_part_are_numbered_through_all_sources(parts: list[Part]) -> None:
    ask, (mine, _) = shared(parts, 2)
    found = [fit_source(ask, source, section(within="source")) for source in range(SOURCES - 1)]
    centroids = [own.centroids for own in found]
    shard, counts = HeldRows(mine), np.zeros(15, np.int64)
    together = np.concatenate(centroids)
    for number, (ids, rows, sources) in enumerate(mine):
        labels, distances = shard.labels(number, centroids)
        assert (labels.dtype, distances.dtype, len(labels)) == (np.int32, np.float32, len(ids))
        assert (labels // 5 == sources).all()
        exact = (
            np.linalg.norm(rows - together[labels].astype(np.float64), axis=1) if len(rows) else []
        )
        np.testing.assert_allclose(distances, exact, rtol=1e-6)
        for row, source, distance in zip(rows, sources, distances, strict=True):
            nearest = np.linalg.norm(row - centroids[source].astype(np.float64), axis=1).min()
            assert distance == pytest.approx(nearest, rel=1e-6)
        counts += np.bincount(labels, minlength=15)
    assert (counts <= np.concatenate([own.sizes for own in found])).all()


def test_all_rows_as_one_source_are_a_plain_fit(parts: list[Part]) -> None:
    everyone = [(ids, rows, np.zeros(len(ids), int)) for ids, rows, _ in parts]
    found = fit_source(shared(everyone, 3)[0], 0, section())
    plain = Shard([(ids, rows) for ids, rows, _ in parts])
    expected = KMeans(k=5, seed=2, max_rounds=6, tolerance=0.0).fit(ask_here(plain))
    assert found.centroids.tobytes() == expected.centroids.tobytes()


def test_a_base_is_kept_or_refined_and_what_moved_is_exact(parts: list[Part]) -> None:
    ask, _ = shared(parts, 3)
    base = fit_source(ask, 0, section(within="source", max_rounds=1)).centroids[::-1].copy()
    used = fit_source(ask, 0, section(within="source", use="x"), base=base)
    assert used.centroids is base
    assert used.history == ()
    refined = fit_source(ask, 0, section(within="source", use="x", refine=True), base=base)
    assert len(refined.history) > 1
    assert refined.objective < used.objective
    change = moved(ask, 0, base, refined.centroids)
    rows = np.concatenate([rows[sources == 0] for _, rows, sources in parts]).astype(np.float64)
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
    still = moved(ask, 0, base, base)
    assert (still.changed, still.shifts.tolist()) == (0, [0.0] * 5)


@pytest.mark.parametrize("refine", [False, True])
def test_a_source_without_rows_keeps_its_base(parts: list[Part], refine: bool) -> None:
    ask, _ = shared(parts, 2)
    base = np.ones((5, 3), np.float32)
    found = fit_source(
        ask, SOURCES - 1, section(within="source", use="x", refine=refine), base=base
    )
    assert found.centroids is base
    assert found.sizes.tolist() == [0] * 5
    assert moved(ask, SOURCES - 1, base, base).before.tolist() == [0] * 5


def test_fewer_distinct_rows_than_k_are_only_allowed_within_sources(parts: list[Part]) -> None:
    same = [(ids, np.round(rows[:, :1] * 0), sources) for ids, rows, sources in parts]
    ask, _ = shared(same, 2)
    assert fit_source(ask, 1, section(within="source")).centroids.tolist() == [[0.0]]
    with pytest.raises(
        UserError, match=r"clusters.k = 5 distinct trajectories, got 1\. .*clusters.features"
    ):
        fit_source(ask, 1, section())
