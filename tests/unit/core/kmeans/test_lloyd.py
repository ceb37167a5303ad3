"""k-means against FAISS, scikit-learn and exact arithmetic."""

import itertools
import random
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as ScikitLearnKMeans

from s2l_ray.core.hashing import KMEANS_SAMPLE, KMEANS_START, keyed_hash
from s2l_ray.core.kmeans import block as block_module
from s2l_ray.core.kmeans import queries, sums
from s2l_ray.core.kmeans import shard as shard_module
from s2l_ray.core.kmeans.assign import MAX_BOUNDED, Pruning, assign, nearest
from s2l_ray.core.kmeans.bounding_balls import BALL_ROWS, BoundingBalls
from s2l_ray.core.kmeans.centroid_index import CHUNK_ROWS, CentroidIndex, tiles_are_independent
from s2l_ray.core.kmeans.hamerly import BoundTest, HamerlyBounds
from s2l_ray.core.kmeans.lloyd import KMeans
from s2l_ray.core.kmeans.queries import Farthest, LloydStep, SmallestHashes, SquaredDeviations
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.kmeans.start import hash_limit, plus_plus
from s2l_ray.core.kmeans.state import FitResult, FitState
from s2l_ray.core.kmeans.sums import PartialSums, Totals, fixed_point_exponent
from s2l_ray.core.query import Ask, Query, ask_here
from s2l_ray.core.storage.records import from_bytes, to_bytes
from s2l_ray.errors import UserError

Part = tuple[np.ndarray, np.ndarray]


def trajectories(num: int, seed: int, steps: int = 6) -> np.ndarray:
    """Falling loss curves of a few kinds: heavy-tailed levels, different speeds, noise."""
    rng = np.random.default_rng(seed)
    speed = rng.choice([0.0, 0.1, 0.5, 1.5], size=(num, 1), p=[0.1, 0.5, 0.3, 0.1])
    level = rng.lognormal(0.5, 0.7, size=(num, 1))
    curve = level * np.exp(-speed * np.arange(steps)) + rng.normal(0, 0.05, size=(num, steps))
    return curve.astype(np.float32)


def cut(rows: np.ndarray, sizes: Iterable[int]) -> list[Part]:
    ends = [*itertools.accumulate(sizes), len(rows)]
    ids = np.arange(len(rows)) + (3 << 40)
    return [(ids[a:b], rows[a:b]) for a, b in itertools.pairwise([0, *ends])]


def local(shards: list[Shard], seed: int = 0) -> Ask[Shard]:
    """Asks in this process; the answers come in another order every time."""
    order = random.Random(seed)
    return lambda query: ask_here(*order.sample(shards, len(shards)))(query)


def spread(parts: list[Part], num_shards: int, seed: int = 0) -> Ask[Shard]:
    """Parts in any order on so many shards, some of them perhaps without a part."""
    parts = random.Random(seed).sample(parts, len(parts))
    return local([Shard(parts[i::num_shards]) for i in range(num_shards)], seed)


def bits(result: FitResult) -> tuple[Any, ...]:
    return result.centroids.tobytes(), result.sizes.tolist(), result.objective, result.history


def objective(rows: np.ndarray, centroids: np.ndarray) -> float:
    wide = rows.astype(np.float64)
    return float(((wide[:, None] - centroids[None]) ** 2).sum(axis=2).min(axis=1).sum())


def run(rows: np.ndarray, k: int, **options: Any) -> FitResult:
    settings = {"seed": 0, "max_rounds": 20, "tolerance": 0.0, **options}
    on_round = settings.pop("on_round", None)
    ask = spread(cut(rows, [len(rows) // 3, 7] if len(rows) > 30 else []), 2)
    return KMeans(k=k, **settings).fit(ask, on_round=on_round)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """So that shards have several blocks, of one part or of several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_module, "MAX_ROWS", 1_500)
        yield


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    sizes = [CHUNK_ROWS + 7, 0, 7, 1000, 1, 300, 2000, 41, 500, 999, 123, 64]
    return cut(trajectories(sum(sizes) + 800, seed=1), sizes)


OPTIONS: dict[str, Any] = {
    "k": 9,
    "seed": 4,
    "max_rounds": 4,
    "tolerance": 1e-9,
    "start_rows": 5000,
}


@pytest.fixture(scope="module")
def undisturbed(parts: list[Part]) -> FitResult:
    return KMeans(**OPTIONS).fit(local([Shard(parts)]))


@pytest.mark.parametrize("num_shards", [2, 5, 13, 20])
def test_any_number_of_shards_and_any_order_of_parts_give_the_same_bits(
    num_shards: int, parts: list[Part], undisturbed: FitResult
) -> None:
    assert len(undisturbed.history) == 4
    assert bits(KMeans(**OPTIONS).fit(spread(parts, num_shards, seed=num_shards))) == bits(
        undisturbed
    )


def test_shards_that_lose_their_memory_before_every_call_give_the_same_bits(
    parts: list[Part], undisturbed: FitResult
) -> None:
    def restarted(query: Query[Shard, Any]) -> Any:
        return ask_here(Shard(parts[:5]), Shard(parts[5:]))(query)

    assert undisturbed.history[0].moves > undisturbed.history[-1].moves > 0
    assert bits(KMeans(**OPTIONS).fit(restarted)) == bits(undisturbed)


def test_a_long_fit_gives_the_same_bits_with_bounds_and_without(parts: list[Part]) -> None:
    options = {**OPTIONS, "max_rounds": 30}
    held = Shard(parts)
    # Rows with a bound, after every round.
    bounded: list[int] = []

    def count(_: FitState) -> None:
        bounds = bounds_of(held)
        bounded.append(
            sum(int(np.isfinite(own.negative_margins).sum()) for own in bounds if own is not None)
        )

    found = KMeans(**options).fit(local([held]), on_round=count)
    assert bounded[0] == 0
    assert bounded[-1] > held.summary.num_rows / 2
    unsorted = KMeans(**options).fit(lambda query: query.of(Shard(parts, sort=False)))
    assert bits(unsorted) == bits(found)


def bounds_of(shard: Shard) -> list[HamerlyBounds | None]:
    return [block.pruning.bounds if block.pruning else None for block in shard._blocks]


def test_resuming_from_any_round_gives_the_same_bits(
    parts: list[Part], undisturbed: FitResult
) -> None:
    saved: list[bytes] = []
    KMeans(**OPTIONS).fit(spread(parts, 2), on_round=lambda state: saved.append(to_bytes(state)))
    assert len(saved) == 4
    for text in saved:
        state = from_bytes(FitState, text)
        assert bits(KMeans(**OPTIONS).fit(spread(parts, 3), resume=state)) == bits(undisturbed)


def test_labels_of_all_parts_agree_with_sizes_and_objective(
    parts: list[Part], undisturbed: FitResult
) -> None:
    used, fresh = Shard(parts), Shard(parts)
    KMeans(**OPTIONS).fit(local([used]))
    other = undisturbed.centroids[:4].copy()
    np.testing.assert_array_equal(used.labels(3, other)[0], fresh.labels(3, other)[0])
    counts = np.zeros(9, dtype=np.int64)
    total = 0.0
    for index, (_, rows) in enumerate(parts):
        labels, distances = used.labels(index, undisturbed.centroids)
        again = fresh.labels(index, undisturbed.centroids)
        np.testing.assert_array_equal(labels, again[0])
        np.testing.assert_array_equal(distances, again[1])
        assert labels.dtype == np.int32
        assert distances.dtype == np.float32
        exact = np.linalg.norm(rows - undisturbed.centroids.astype(np.float64)[labels], axis=1)
        np.testing.assert_allclose(distances, exact, rtol=1e-6)
        counts += np.bincount(labels, minlength=9)
        total += float((exact**2).sum())
    assert counts.tolist() == undisturbed.sizes.tolist()
    assert total == pytest.approx(undisturbed.objective, rel=1e-12)


def test_clusters_are_numbered_by_ascending_mean_and_history_follows(
    undisturbed: FitResult,
) -> None:
    means = undisturbed.centroids.astype(np.float64).mean(axis=1)
    assert (np.diff(means) > 0).all()
    last = np.array(undisturbed.history[-1].sizes)
    assert np.corrcoef(last, undisturbed.sizes)[0, 1] > 0.999
    tied = run(np.array([[3, 1], [1, 3], [2, 2], [0, 0]], dtype=np.float32), 4)
    assert tied.centroids.tolist() == [[0, 0], [1, 3], [2, 2], [3, 1]]


HALF = np.concatenate([np.ones((1000, 6), np.float32), trajectories(1000, seed=2)])
HEAVY = np.random.default_rng(3).standard_t(1.5, size=(3000, 6)).astype(np.float32)
PLAIN = trajectories(4000, seed=5, steps=12)


@pytest.mark.parametrize(
    "rows",
    [PLAIN, PLAIN[:, :1], HALF, HEAVY, PLAIN + 1000],
    ids=["plain", "one-step", "half-equal", "heavy-tails", "offset"],
)
def test_the_objective_is_that_of_faiss_and_scikit_learn_from_the_same_start(
    rows: np.ndarray,
) -> None:
    start = rows[np.unique(rows, axis=0, return_index=True)[1]][
        :: len(np.unique(rows, axis=0)) // 20
    ][:20]
    ours = run(rows, 20, start=start)
    reference = ScikitLearnKMeans(
        20, init=start, n_init=1, max_iter=20, tol=0, algorithm="lloyd"
    ).fit(rows.astype(np.float64))
    assert ours.objective == pytest.approx(objective(rows, ours.centroids), rel=1e-6)
    assert ours.objective == pytest.approx(objective(rows, reference.cluster_centers_), rel=1e-4)
    # FAISS alone loses half of its digits where all values share an offset
    if rows[0, 0] < 900:
        other = faiss.Kmeans(rows.shape[1], 20, niter=20, max_points_per_centroid=len(rows), seed=1)
        other.train(np.ascontiguousarray(rows), init_centroids=start)
        assert ours.objective == pytest.approx(objective(rows, other.centroids), rel=1e-4)


def test_the_objective_falls_every_round_and_the_tolerance_stops() -> None:
    history = run(PLAIN, 10, max_rounds=200).history
    assert all(a.objective >= b.objective for a, b in itertools.pairwise(history))
    exact = run(PLAIN, 10, max_rounds=200)
    assert exact.converged
    assert exact.history[-1].shift == 0
    loose = run(PLAIN, 10, max_rounds=200, tolerance=0.01)
    assert loose.converged
    assert [r.shift <= 0.01 for r in loose.history] == [False] * (len(loose.history) - 1) + [True]
    assert not run(PLAIN, 10, max_rounds=2).converged


def test_the_start_is_k_means_plus_plus_on_the_rows_with_the_smallest_hashes() -> None:
    shard = Shard(cut(PLAIN, [500, 7, 2000]))
    sample = SmallestHashes(11, 300).of(shard)
    hashes = keyed_hash(KMEANS_START, 11, np.arange(4000) + (3 << 40))
    np.testing.assert_array_equal(sample.rows, PLAIN[np.argsort(hashes)[:300]])
    begun = run(PLAIN, 8, seed=11, start_rows=300, max_rounds=0).centroids
    drawn = plus_plus(sample.rows, 8, 11)
    assert sorted(begun.tolist()) == sorted(drawn.tolist())
    # D^2 sampling is far better than uniform draws on rows with many equal ones (mean over seeds)
    spread_out = [run(HALF, 8, seed=s, max_rounds=0).objective for s in range(10)]
    uniform = [objective(HALF, HALF[np.random.default_rng(s).choice(2000, 8)]) for s in range(10)]
    assert np.mean(spread_out) < 0.5 * np.mean(uniform)
    assert len(set(spread_out)) == 10


@pytest.mark.parametrize("value", [0.0, 3.3, -1e30, 1e-42])
def test_constant_rows_are_one_cluster_with_zero_distance(value: float) -> None:
    rows = np.full((50, 3), value, dtype=np.float32)
    result = run(rows, 1)
    assert (result.centroids == rows[:1]).all()
    assert result.objective == 0
    assert result.converged


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 1e-40, 1e38])
def test_two_distinct_values_are_two_clusters_at_any_magnitude(scale: float) -> None:
    rows = np.repeat(
        np.array([[1, 2], [1.5, -2]], dtype=np.float32) * np.float32(scale), [70, 30], axis=0
    )
    result = run(rows, 2)
    assert result.sizes.tolist() == [30, 70]
    assert result.objective == 0


@pytest.mark.parametrize(("num", "steps"), [(1, 1), (1, 5), (40, 1), (40, 4)])
def test_as_many_clusters_as_rows_put_every_row_on_its_centroid(num: int, steps: int) -> None:
    rows = trajectories(num, seed=8, steps=steps)
    result = run(rows, num)
    assert result.sizes.tolist() == [1] * num
    assert result.objective == pytest.approx(0, abs=1e-12)


def test_one_far_outlier_has_its_own_cluster_and_the_others_stay_apart() -> None:
    rows = PLAIN.copy()
    rows[123] = 1e6
    result = run(rows, 6, max_rounds=50)
    assert result.sizes[-1] == 1
    assert (result.sizes[:-1] > 1).all()
    reference = (
        ScikitLearnKMeans(5, n_init=3, random_state=0)
        .fit(np.delete(rows, 123, axis=0).astype(np.float64))
        .inertia_
    )
    assert result.objective < 2 * reference


@pytest.mark.parametrize("steps", [1, 2, 4, 12, 40])
def test_padding_and_company_do_not_change_the_bits_of_faiss(steps: int) -> None:
    rows = np.random.default_rng(0).normal(size=(8192, steps)).astype(np.float32)
    # The first index fixes FAISS's method.
    CentroidIndex(rows[:3])
    index = faiss.IndexFlatL2(steps)
    index.add(rows[:100])
    together = index.search(rows, 1)
    for count in (1, 2, 7):
        part = index.search(rows[1024 : (count + 1) * 1024], 1)
        padded = np.zeros((4096, steps), np.float32)
        padded[:700] = rows[1024:1724]
        for found, size in ((part, count * 1024), (index.search(padded, 1), 700)):
            np.testing.assert_array_equal(found[0][:size], together[0][1024 : 1024 + size])
            np.testing.assert_array_equal(found[1][:size], together[1][1024 : 1024 + size])


@pytest.mark.parametrize("rows", [PLAIN, HALF, HEAVY, PLAIN + 1000, PLAIN * np.float32(1e30)])
@pytest.mark.parametrize("k", [2, 16, 17, 300])
def test_leaving_out_far_centroids_does_not_change_the_nearest_one(
    rows: np.ndarray, k: int
) -> None:
    draw = np.random.default_rng(k)
    centroids = rows[draw.permutation(len(rows))[:k]].copy()
    # equal ones
    centroids[: k // 4] = centroids[-(k // 4) :] if k >= 4 else centroids[:0]
    index = CentroidIndex(centroids)
    # copies in narrow heaps, so that the balls are small; on a grid, so that distances tie
    heaps = np.concatenate([np.repeat(rows[i : i + 1], 2048, axis=0) for i in range(0, 900, 100)])
    heaps = heaps + (draw.integers(-2, 3, heaps.shape) * np.float32(2**-6) * np.abs(heaps)).astype(
        np.float32
    )
    pruning = Pruning(heaps)
    balls = pruning.balls
    np.testing.assert_array_equal(nearest(heaps, index, pruning), nearest(heaps, index))
    if k == 300 and rows is PLAIN:
        assert tiles_are_independent(rows.shape[1]), "FAISS has changed: no tile is left out now"
        assert np.mean([*balls.tiles_to_search(index)]) < 0.5
    inside = np.linalg.norm(heaps[:2048] - balls.centres[0], axis=1)
    assert inside.max() <= balls.radii[0]
    # squares leave float32: no ball
    assert balls.radii[0] <= inside.max() * 1.01 or inside.max() > 1e18


@pytest.mark.parametrize("start", [None, PLAIN[:10]])
def test_without_tolerance_exactly_the_rounds_that_are_allowed_unless_nothing_moves(
    start: np.ndarray | None,
) -> None:
    noise = np.random.default_rng(0).normal(size=(4000, 12)).astype(np.float32)
    assert len(run(noise, 10, max_rounds=20, tolerance=0.0, start=start).history) == 20
    few = run(PLAIN[:12], 10, max_rounds=20, tolerance=0.0, start=start)
    assert len(few.history) < 20
    assert few.history[-1].shift == 0


def test_fewer_distinct_rows_than_clusters_are_one_cluster_each_where_that_is_asked_for() -> None:
    rows = np.repeat(np.array([[0.0, 1], [-0.0, 1], [2, 2], [3, 3]], dtype=np.float32), 30, axis=0)
    result = run(rows, 7, allow_fewer_clusters=True)
    assert result.centroids.tolist() == [[0, 1], [2, 2], [3, 3]]
    assert result.sizes.tolist() == [60, 30, 30]
    assert (result.objective, result.converged) == (0, True)
    assert len(run(rows, 2, allow_fewer_clusters=True).centroids) == 2
    # with a start, what nothing can fill stays where it was
    start = np.array([[9, 9], [0, 1], [8, 8], [7, 7], [3, 3]], dtype=np.float32)
    kept = run(rows, 5, start=start, allow_fewer_clusters=True)
    assert kept.sizes.tolist() == [30, 60, 30, 0, 0]
    assert kept.centroids.tolist() == [[2, 2], [0, 1], [3, 3], [7, 7], [2.5, 2.5]]


@pytest.mark.parametrize("leading", [2, 16])
def test_the_hash_limit_is_that_of_a_full_sort(
    leading: int, parts: list[Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "_LEADING_BITS", leading)
    ids = np.concatenate([ids for ids, _ in parts])
    hashes = np.sort(keyed_hash(KMEANS_SAMPLE, 6, ids))
    for count in (1, 2, 1000, len(ids)):
        limit = hash_limit(spread(parts, 3), 6, count)
        assert limit == int(hashes[count - 1])
        sampled = [
            shard.sampled(6, limit).summary.num_rows
            for shard in (Shard(parts[:4]), Shard(parts[4:]))
        ]
        assert sum(sampled) == count


def test_centroids_from_a_sample_have_the_sizes_of_all_rows(parts: list[Part]) -> None:
    limit = hash_limit(spread(parts, 3), 4, 900)
    chosen = [keyed_hash(KMEANS_SAMPLE, 4, ids) <= np.uint64(limit) for ids, _ in parts]
    small = [(ids[keep], rows[keep]) for (ids, rows), keep in zip(parts, chosen, strict=True)]
    whole = KMeans(**OPTIONS).fit(spread(small, 2), everyone=spread(parts, 3))
    alone = KMeans(**OPTIONS).fit(spread(small, 5))
    assert whole.centroids.tobytes() == alone.centroids.tobytes()
    assert whole.history == alone.history
    assert alone.sizes.sum() == 900
    assert whole.sizes.sum() == sum(len(ids) for ids, _ in parts)
    rows = np.concatenate([rows for _, rows in parts])
    assert whole.objective == pytest.approx(objective(rows, whole.centroids), rel=1e-6)


def test_empty_clusters_get_the_farthest_distinct_rows() -> None:
    rows = np.zeros((30, 2), dtype=np.float32)
    rows[[4, 9, 17]] = [[8, 0], [8, 0], [0, 8]]
    rows[20] = [5, 0]
    start = np.array([[0, 0], [900, 900], [901, 901]], dtype=np.float32)
    states: list[FitState] = []
    result = run(rows, 3, start=start, on_round=states.append)
    first = states[0]
    assert first.history[0].reseeded == 2
    # row 4, not its double 9, then the tie 17
    assert first.centroids[1:].tolist() == [
        [8, 0],
        [0, 8],
    ]
    assert sorted(result.sizes.tolist()) == [1, 3, 26]
    assert result.converged
    assert result.history[-1].reseeded == 0


def test_a_round_that_seeds_a_cluster_is_not_the_last_although_no_other_centroid_moved() -> None:
    rows = np.array([[-1], [1], [-1], [1]], dtype=np.float32)
    result = run(rows, 2, start=np.array([[0], [900]], dtype=np.float32))
    assert (result.history[0].shift, result.history[0].reseeded) == (0, 1)
    assert result.centroids.tolist() == [[1], [-1]]


@pytest.mark.parametrize("sizes", [[], [1, 2, 3, 50, 100], [700, 7]])
def test_the_farthest_rows_are_those_of_a_full_sort(sizes: list[int]) -> None:
    # later rows repeat earlier ones
    rows = PLAIN[np.arange(1000) % 400]
    centroids, taken = PLAIN[:5], PLAIN[100:200]
    squared = ((rows[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2).min(axis=1)
    first = [i for i in np.lexsort((np.arange(1000), -squared)) if i < 400 and not 100 <= i < 200][
        :30
    ]
    found = Farthest(30, centroids, taken).of(Shard(cut(rows, sizes)))
    assert (found.ids - (3 << 40)).tolist() == first
    np.testing.assert_array_equal(found.rows, rows[first])
    np.testing.assert_allclose(found.keys, -squared[first], rtol=1e-12)


def test_a_start_sample_with_too_few_distinct_rows_is_completed_from_all_rows() -> None:
    rows = np.ones((400, 2), dtype=np.float32)
    rows[[10, 200, 390]] = [[2, 2], [3, 3], [9, 9]]
    result = run(rows, 4, start_rows=2)
    assert result.sizes.tolist() == [397, 1, 1, 1]
    assert result.objective == pytest.approx(0, abs=1e-12)


def test_fewer_distinct_rows_than_clusters_is_refused_with_their_number() -> None:
    rows = np.repeat(np.array([[0.0, 1], [-0.0, 1], [2, 2], [3, 3]], dtype=np.float32), 30, axis=0)
    with pytest.raises(UserError, match=r"at least clusters.k = 4 distinct trajectories, got 3"):
        run(rows, 4)
    with pytest.raises(UserError, match=r"at least clusters.k = 5 distinct trajectories, got 3"):
        run(rows, 5, start=np.arange(10, dtype=np.float32).reshape(5, 2))


@pytest.mark.parametrize("k", [0, -1, 31])
def test_an_impossible_number_of_clusters_is_refused(k: int) -> None:
    with pytest.raises(UserError, match=f"between 1 and .* 30, got {k}"):
        run(PLAIN[:30], k)


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(UserError, match=r"trajectory, 0, got 2"):
        KMeans(**{**OPTIONS, "k": 2}).fit(
            local([Shard([]), Shard([(np.empty(0, np.int64), np.empty((0, 4), np.float32))])])
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_refused_with_its_example(bad: float) -> None:
    rows = PLAIN.copy()
    rows[77, 5] = bad
    with pytest.raises(UserError, match=f"got {bad} for example_id {(3 << 40) + 77} in column 5"):
        Shard(cut(rows, [50]))


def test_parts_with_different_numbers_of_steps_are_refused_within_and_between_shards() -> None:
    ids = np.arange(3)
    two, three = (ids, np.zeros((3, 2), np.float32)), (ids, np.zeros((3, 3), np.float32))
    with pytest.raises(UserError, match="same number of steps"):
        Shard([two, three])
    with pytest.raises(UserError, match="same number of steps"):
        KMeans(**{**OPTIONS, "k": 1}).fit(local([Shard([two]), Shard([three])]))


def test_a_shard_that_answers_twice_is_noticed() -> None:
    shard = Shard(cut(PLAIN, []))

    def doubled(query: Query[Shard, Any]) -> Any:
        return query.merge([query.of(shard)] * (2 if isinstance(query, LloydStep) else 1))

    with pytest.raises(RuntimeError, match="expected 4000 rows from the shards, got 8000"):
        KMeans(**OPTIONS).fit(doubled)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.data(), st.integers(1, 5))
@settings(max_examples=200)
def test_fixed_point_sums_are_exact_sums_of_the_rounded_values(data: st.DataObject, k: int) -> None:
    steps = data.draw(st.integers(1, 3))
    values = data.draw(
        st.lists(st.lists(finite, min_size=steps, max_size=steps), min_size=1, max_size=12)
    )
    rows = np.array(values, dtype=np.float32)
    labels = np.array(
        data.draw(st.lists(st.integers(0, k - 1), min_size=len(rows), max_size=len(rows))), np.int32
    )
    exponent = fixed_point_exponent(len(rows), float(np.abs(rows).max()))
    totals = Totals((k, steps), exponent)
    totals.add(rows, labels)
    scale = Fraction(2) ** exponent
    expected = [[0] * steps for _ in range(k)]
    for row, label in zip(rows, labels, strict=True):
        for t, value in enumerate(row.tolist()):
            # exact, half to even
            expected[label][t] += round(Fraction(value) * scale)
    assert totals.sums.tolist() == expected
    fixed = [[round(Fraction(value) * scale) for value in row] for row in rows.tolist()]
    assert totals.squares == sum(value**2 for row in fixed for value in row)
    other = np.array(
        data.draw(st.lists(st.integers(0, k - 1), min_size=len(rows), max_size=len(rows))), np.int32
    )
    totals.move(rows, labels, other)
    moved = Totals((k, steps), exponent)
    moved.add(rows, other)
    assert (totals.sums.tolist(), totals.counts.tolist()) == (
        moved.sums.tolist(),
        moved.counts.tolist(),
    )
    # the objective is that of the fixed-point rows, exactly, and rounded once
    centroids = rows[np.arange(k) % len(rows)]
    exact = sum(
        (value / scale - Fraction(c)) ** 2
        for row, label in zip(fixed, other, strict=True)
        for value, c in zip(row, centroids[label].tolist(), strict=True)
    )
    assert PartialSums(moved.sums, moved.counts, moved.squares, 0).objective(
        centroids, exponent
    ) == float(exact)


@pytest.mark.parametrize("num", [1, 300, 2 * CHUNK_ROWS + 5])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-40])
@pytest.mark.parametrize("kind", ["curves", "all-equal", "one-far", "on-the-edge"])
def test_sums_of_many_rows_are_those_of_plain_int64(num: int, scale: float, kind: str) -> None:
    draw = np.random.default_rng(num)
    rows = {
        "curves": trajectories(num, seed=3),
        "all-equal": np.full((num, 6), -3.3, np.float32),
        "one-far": np.where(np.arange(num)[:, None] == num // 2, 1e6, draw.normal(size=(num, 6))),
        "on-the-edge": np.where(draw.random((num, 6)) < 0.5, -1.0, 1.0) * (2 - 2.0**-23),
    }[kind]
    rows = (rows * np.float64(scale)).astype(np.float32)
    labels = draw.integers(0, 400, num).astype(np.uint16)
    # a large one, and empty ones behind it
    labels[labels > 300] = 300
    exponent = fixed_point_exponent(num, float(np.abs(rows).max()))
    fixed = np.rint(rows.astype(np.float64) * 2.0**exponent).astype(np.int64)

    def plain(labels: np.ndarray) -> tuple[list[list[int]], list[int]]:
        sums = np.zeros((401, 6), np.int64)
        np.add.at(sums, labels, fixed)
        return sums.tolist(), np.bincount(labels, minlength=401).tolist()

    totals = Totals((401, 6), exponent)
    totals.add(rows, labels)
    assert (totals.sums.tolist(), totals.counts.tolist()) == plain(labels)
    assert totals.squares == sum(value**2 for value in fixed.reshape(-1).tolist())
    after = draw.integers(0, 401, num).astype(np.uint16)
    totals.move(rows, labels, after)
    assert (totals.sums.tolist(), totals.counts.tolist()) == plain(after)


@pytest.mark.parametrize("largest", [0, 1, 2**31, 2**43 - 1, 2**44, 2**53, 2**62 - 1])
def test_squares_of_any_int64_below_2_to_the_62_add_up_exactly(largest: int) -> None:
    draw = np.random.default_rng(largest % 97)
    values = draw.integers(-largest, largest, (3, CHUNK_ROWS), endpoint=True)
    for some in (
        values,
        np.full_like(values, largest),
        np.full_like(values, -largest),
        values[:, :1],
    ):
        assert sums._sum_of_squares(some, some.astype(np.float64)) == sum(
            value**2 for value in some.reshape(-1).tolist()
        )


@pytest.mark.parametrize(("most", "blocks"), [(1, 12), (1_500, 6), (10**6, 1)])
def test_parts_that_are_put_together_give_the_same_bits(
    parts: list[Part],
    undisturbed: FitResult,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    blocks: int,
) -> None:
    monkeypatch.setattr(block_module, "MAX_ROWS", most)
    held = Shard(parts)
    assert len(held._blocks) == blocks
    assert bits(KMeans(**OPTIONS).fit(local([held]))) == bits(undisturbed)
    for number, (_, rows) in enumerate(parts):
        labels, distances = held.labels(number, undisturbed.centroids)
        np.testing.assert_array_equal(labels, nearest(rows, CentroidIndex(undisturbed.centroids)))
        away = np.linalg.norm(rows - undisturbed.centroids[labels].astype(np.float64), axis=1)
        np.testing.assert_allclose(distances, away, rtol=1e-6)


def test_parts_whose_ids_lie_far_apart_are_not_put_together() -> None:
    """So that a row's id takes four bytes; but those of one file are."""
    ids = [np.arange(3) + (number << 40) for number in (0, 1, 1, 2)]
    held = Shard((own, np.full((3, 2), 1.0, np.float32)) for own in ids)
    assert [block.ids.tolist() for block in held._blocks] == [
        ids[0].tolist(),
        [*ids[1].tolist(), *ids[2].tolist()],
        ids[3].tolist(),
    ]


@pytest.mark.parametrize("ids", [[], [7], [-(2**63), 2**63 - 1, 0], [5, 2**40 + 5, 9], [300, 1, 2]])
def test_ids_come_back_whatever_lies_between_them(ids: list[int]) -> None:
    given = np.array(ids, np.int64)
    ((block, _),) = block_module.blocks_of([(given, np.zeros((len(ids), 2), np.float32))])
    assert block.ids.dtype == np.int64
    assert block.ids.tolist() == ids


def test_what_assign_says_has_changed_has_changed() -> None:
    rows = PLAIN[np.argsort(PLAIN[:, 0])]
    pruning = Pruning(rows)
    for centroids in (PLAIN[:1], PLAIN[:70]):
        index = CentroidIndex(centroids)
        right = nearest(rows, index)
        labels = np.where(
            np.arange(len(rows)) % 3 == 0, (right + 1) % len(centroids), right
        ).astype(np.uint8)
        old = labels.copy()
        places, before = assign(rows, labels, index, pruning)
        np.testing.assert_array_equal(labels, right)
        np.testing.assert_array_equal(places, np.flatnonzero(old != right))
        np.testing.assert_array_equal(before, old[places])


GRID = np.random.default_rng(9).integers(-3, 4, (5000, 6)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 17, 100, MAX_BOUNDED])
@pytest.mark.parametrize(
    "rows",
    [
        PLAIN,
        HALF,
        HEAVY,
        GRID,
        PLAIN + 1000,
        PLAIN * np.float32(1e-30),
        PLAIN * np.float32(1e30),
        PLAIN[:, :1],
    ],
    ids=["plain", "half-equal", "heavy-tails", "grid", "offset", "tiny", "huge", "one-step"],
)
def test_bounds_leave_out_only_rows_that_faiss_would_leave_where_they_are(
    rows: np.ndarray, k: int
) -> None:
    draw = np.random.default_rng(k)
    rows = rows[np.argsort(rows[:, 0])]
    centroids = rows[draw.permutation(len(rows))[:k]].copy()
    # equal ones, until they part
    centroids[: k // 8] = centroids[k // 8 : 2 * (k // 8)]
    pruning, labels = Pruning(rows), nearest(rows, CentroidIndex(centroids))
    drift = np.zeros(k)
    for number in range(12):
        index = CentroidIndex(centroids)
        # Whether few or many rows change, bounds are begun.
        pruning.reassignment_rate = 0
        assign(rows, labels, index, pruning, drift)
        np.testing.assert_array_equal(labels, nearest(rows, index))
        step = (
            draw.normal(0, 0.1**number, centroids.shape)
            * np.abs(centroids).mean()
            * (draw.random((k, 1)) < 0.5)
        )
        before, centroids = centroids, (centroids + step).astype(np.float32)
        if number == 6:
            # as an empty cluster that gets another row
            centroids[-1] = rows[0]
        drift = shard_module._drift(before, centroids)


@pytest.mark.parametrize(
    "rows", [PLAIN, HALF, HEAVY, GRID, PLAIN + 1000, PLAIN * np.float32(1e-10)]
)
@pytest.mark.parametrize("k", [1, 2, 3, 100, MAX_BOUNDED])
def test_what_is_not_near_a_ball_is_farther_from_its_rows_than_two_others(
    rows: np.ndarray, k: int
) -> None:
    draw = np.random.default_rng(k)
    offsets = rows[draw.permutation(len(rows))[:k]].astype(np.float64)
    # equal ones
    offsets[: k // 8] = offsets[k // 8 : 2 * (k // 8)]
    error = np.full(k, 1e-12 * float(np.abs(rows).max()) ** 2)
    for size in (1, 5, 30, 300) * 10:
        first = draw.integers(0, len(rows) - size + 1)
        some = rows[np.argsort(rows[:, 0])][first : first + size]
        (near,) = BoundingBalls.around(some).two_nearest(offsets, np.zeros(rows.shape[1]), error)
        distances = np.linalg.norm(some[:, None].astype(np.float64) - offsets, axis=2)
        second = np.sort(distances, axis=1)[:, :2].max(axis=1)
        assert near.sum() >= min(k, 2)
        assert (distances[:, ~near] > second[:, None]).all()
        assert size > 1 or k < 100 or rows is not PLAIN or near.mean() < 0.5


def test_bounds_leave_out_most_rows_where_clusters_lie_apart() -> None:
    draw = np.random.default_rng(0)
    centroids = (np.eye(20, 6, dtype=np.float32) * 4 + np.arange(20)[:, None]).astype(np.float32)
    rows = (centroids[np.arange(4000) // 200] + draw.normal(0, 0.05, (4000, 6))).astype(np.float32)
    balls, bounds, drift = BoundingBalls.around(rows), HamerlyBounds(4000), np.zeros(20)
    labels = nearest(rows, CentroidIndex(centroids)).astype(np.uint8)
    for number in range(3):
        index = CentroidIndex(centroids)
        unsure = BoundTest(index, balls, drift).loosened(labels, bounds)
        assert len(unsure) == (0 if number else 4000)
        assert not len(BoundTest(index, balls, 0 * drift).open_rows(rows, labels, bounds))
        assert np.isfinite(bounds.negative_margins).all()
        before, centroids = centroids, centroids + np.float32(0.1)
        drift = shard_module._drift(before, centroids)


def test_a_centroid_that_stays_far_from_a_ball_may_move_far() -> None:
    draw = np.random.default_rng(0)
    centroids = (10 * np.eye(6)).astype(np.float32)
    rows = (
        centroids[np.arange(6 * BALL_ROWS) // BALL_ROWS] + draw.normal(0, 0.05, (6 * BALL_ROWS, 6))
    ).astype(np.float32)
    balls, bounds, index = (
        BoundingBalls.around(rows),
        HamerlyBounds(len(rows)),
        CentroidIndex(centroids),
    )
    labels = nearest(rows, index)
    assert not len(BoundTest(index, balls, np.zeros(6)).open_rows(rows, labels, bounds))
    moved = centroids.copy()
    # By far more than any margin.
    moved[5] *= 10
    test = BoundTest(CentroidIndex(moved), balls, shard_module._drift(centroids, moved))
    assert set(labels[test.loosened(labels, bounds)]) == {5}


@pytest.mark.parametrize("drift", [None, np.zeros(6)])
def test_no_bound_outlives_a_round_in_which_it_was_not_looked_at(drift: np.ndarray | None) -> None:
    """Because centroids leave the safe range of the bounds, or because their drift is unknown."""
    pruning, labels = Pruning(PLAIN), np.zeros(len(PLAIN), np.uint8)
    pruning.bounds = HamerlyBounds(len(PLAIN))
    pruning.bounds.negative_margins[:] = -1e6
    far = np.full((1, 12), 1e20 if drift is not None else 1, np.float32)
    assign(PLAIN, labels, CentroidIndex(np.concatenate([PLAIN[:5], far])), pruning, drift)
    assert pruning.bounds is None


def test_bounds_do_not_outlive_the_drift_that_they_are_loosened_by() -> None:
    shard, base = Shard(cut(PLAIN, [])), PLAIN[:8]
    previous = None
    # To and fro, so that drifts add up.
    for number in range(60):
        centroids = base + np.float32(0.004 * (number % 2))
        shard.add_up(centroids, 20, previous)
        previous = centroids
    (bounds,) = bounds_of(shard)
    assert bounds is not None
    assert np.isfinite(bounds.negative_margins).mean() > 0.9
    # Another fixed point: totals and drifts start anew.
    centroids = np.ascontiguousarray(base[::-1])
    shard.add_up(centroids, 19, previous)
    np.testing.assert_array_equal(
        shard.labels(0, centroids)[0], nearest(PLAIN, CentroidIndex(centroids))
    )


@pytest.mark.parametrize("k", [8, 200, 300])
def test_clusters_under_other_numbers_keep_what_is_known_of_their_rows(k: int) -> None:
    order = np.random.default_rng(0).permutation(k)
    first, second = PLAIN[:k], PLAIN[:k] + np.float32(0.01)
    shard = Shard(cut(PLAIN, [300]))
    shard.add_up(first, 20, None)
    # No row moves, so bounds begin in the next round where clusters are few.
    shard.add_up(first, 20, first)
    shard.add_up(first, 20, first)
    bounds = bounds_of(shard)
    found = shard.add_up(second[order], 20, first, order)
    fresh = Shard(cut(PLAIN, [300])).add_up(second[order], 20, None)
    assert found.sums.tolist() == fresh.sums.tolist()
    assert (found.counts.tolist(), found.squares) == (fresh.counts.tolist(), fresh.squares)
    before, after = (nearest(PLAIN, CentroidIndex(own)) for own in (first, second[order]))
    assert found.moves == (before != order[after]).sum() > 0
    assert bounds_of(shard) == bounds
    assert all(own is not None for own in bounds) == (k <= MAX_BOUNDED)


def test_spread_is_the_sum_of_squared_deviations_of_the_members() -> None:
    # more than a block
    rows = np.tile(PLAIN, (3, 1))
    centroids = np.concatenate([PLAIN[:7], np.full((1, 12), 1e6, np.float32)])
    labels = nearest(rows, CentroidIndex(centroids))
    expected = [
        ((rows[labels == k].astype(np.float64) - centroids[k]) ** 2).sum(axis=0) for k in range(8)
    ]
    found = SquaredDeviations(centroids).of(Shard(cut(rows, [100, 9000])))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(20, 300), (300, 20)])
def test_moves_between_different_numbers_of_clusters_are_counted(before: int, after: int) -> None:
    first, second = (PLAIN[::-1][:k].copy() for k in (before, after))
    labels = [nearest(PLAIN, CentroidIndex(centroids)) for centroids in (first, second)]
    found = Shard(cut(PLAIN, [100])).add_up(second, 20, first)
    assert found.moves == (labels[0] != labels[1]).sum()
    assert found.counts.tolist() == np.bincount(labels[1], minlength=after).tolist()


@given(st.integers(1, 10**12), finite.map(abs).filter(bool))
def test_the_fixed_point_uses_all_bits_that_cannot_overflow(num_rows: int, max_abs: float) -> None:
    largest = num_rows * Fraction(max_abs) * Fraction(2) ** fixed_point_exponent(num_rows, max_abs)
    assert 2**61 <= largest < 2**62


def test_labels_of_a_row_do_not_depend_on_its_neighbours_or_on_offset() -> None:
    part = PLAIN[:1000]
    alone = Shard(cut(part, [])).labels(0, PLAIN[:50])[0]
    exact = ((part[:, None].astype(np.float64) - PLAIN[None, :50]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(alone, exact)
    moved = part + np.float32(4096)
    centroids = moved[:50]
    exact = ((moved[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(Shard(cut(moved, [])).labels(0, centroids)[0], exact)
