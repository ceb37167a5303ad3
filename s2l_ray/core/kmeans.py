"""Sharded k-means on loss trajectories: shards add up members exactly, a small driver loop moves the
centroids.

The same rows, cut into the same parts, give the same bits for any number of shards, any order of parts or
answers and any restart: FAISS always multiplies matrices of the same size (see `nearest`), members are added as
int64 fixed point, objectives as exact fractions. Every method of a shard is a pure function of its parts and
arguments; what it keeps is only a cache.

Shapes: N rows (examples that could be scored), T columns (steps, or features made of them), K clusters.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import faiss
import numpy as np

from s2l_ray.core.hashing import keyed_hash
from s2l_ray.errors import UserError

BLOCK = 65_536  # most rows of a part that are worked on at once
PRODUCT = (
    1_024  # rows of every matrix product inside FAISS; another size may change the last bits of its distances
)
_LEADING = 16  # bits of a hash by which rows are counted
Shards = Callable[[str, tuple[Any, ...]], Iterable[Any]]


@dataclass(frozen=True)
class Summary:
    """What the fixed point needs to know of the rows; addable. `num_steps` is 0 where there are no rows."""

    num_rows: int
    max_abs: float
    num_steps: int

    def __add__(self, other: "Summary") -> "Summary":
        if self.num_steps and other.num_steps and self.num_steps != other.num_steps:
            raise UserError(
                "Clustering trajectories: expected the same number of steps T in every part, got "
                f"{self.num_steps} and {other.num_steps}. The parts come from different proxies; score them "
                "again with one proxy."
            )
        return Summary(
            num_rows=self.num_rows + other.num_rows,
            max_abs=max(self.max_abs, other.max_abs),
            num_steps=max(self.num_steps, other.num_steps),
        )


NO_ROWS = Summary(num_rows=0, max_abs=0.0, num_steps=0)


@dataclass(frozen=True)
class Ranked:
    """A few rows in ascending (key, id) order: keys [m], ids int64 [m], rows float32 [m, T]."""

    keys: np.ndarray
    ids: np.ndarray
    rows: np.ndarray

    def first(self, m: int) -> "Ranked":
        """The m smallest by (key, id)."""
        return self._take(np.lexsort((self.ids, self.keys))[:m])

    def first_distinct(self, m: int, skip: set[bytes]) -> "Ranked":
        """The m smallest by (key, id) that differ in value from each other and from all values in `skip`."""
        seen, kept = set(skip), []
        for i in np.lexsort((self.ids, self.keys)):
            value = _value(self.rows[i])
            if value not in seen:
                seen.add(value)
                kept.append(i)
            if len(kept) == m:
                break
        return self._take(np.array(kept, dtype=np.int64))

    def joined(self, other: "Ranked") -> "Ranked":
        """Both, unordered."""
        return Ranked(
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.rows, other.rows]),
        )

    def _take(self, index: np.ndarray) -> "Ranked":
        return Ranked(self.keys[index], self.ids[index], self.rows[index])


@dataclass(frozen=True)
class Partial:
    """One round's sums over some rows; addable, and exact, so that the order of adding does not matter.

    sums int64 [K, T] in units of 2^-exponent, counts int64 [K], objective (sum of squared distances), and
    moves, the rows whose cluster is not the one they had under the previous centroids (all rows in the first
    round).
    """

    sums: np.ndarray
    counts: np.ndarray
    objective: Fraction
    moves: int

    def __add__(self, other: "Partial") -> "Partial":
        return Partial(
            self.sums + other.sums,
            self.counts + other.counts,
            self.objective + other.objective,
            self.moves + other.moves,
        )


def fixed_point_exponent(num_rows: int, max_abs: float) -> int:
    """The largest e with num_rows * max_abs * 2^e < 2^62, so that sums in units of 2^-e fit int64.

    Differences below max_abs * num_rows * 2^-62 are lost (4e-9 for a loss of 20 and 10^9 rows). (design
    section 3)
    """
    if max_abs == 0:
        return 0
    mantissa, exponent = math.frexp(max_abs)
    exact = num_rows * int(math.ldexp(mantissa, 53))  # num_rows * max_abs = exact * 2^(exponent - 53)
    return 62 - exact.bit_length() - (exponent - 53)


def nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Nearest centroid of each row of one part: int32 [n], from float32 [n, T] and float32 [K, T].

    FAISS computes |x|^2 - 2xc + |c|^2 in float32, which overflows above 1e19 and cancels where all values
    share an offset. So it is shown rows and centroids relative to the median centroid and divided by a power
    of two.

    It does so by one of two methods, depending on the size of the call, and by matrix products of so many rows.
    Both are fixed here and calls are padded to whole products, so that a row gets the same bits in any company.
    """
    faiss.omp_set_num_threads(1)
    faiss.cvar.distance_compute_blas_threshold = 1  # always products
    faiss.cvar.distance_compute_blas_query_bs = PRODUCT
    centre = np.median(centroids.astype(np.float64), axis=0)
    offsets = centroids - centre
    labels = np.empty(len(rows), dtype=np.int32)
    for start in range(0, len(rows), BLOCK):
        moved = rows[start : start + BLOCK] - centre
        unit = math.ldexp(1.0, -math.frexp(max(moved.max(), -moved.min(), np.abs(offsets).max()))[1])
        block = np.zeros((-(-len(moved) // PRODUCT) * PRODUCT, rows.shape[1]), dtype=np.float32)
        np.multiply(moved, unit, out=block[: len(moved)], casting="same_kind")
        index = faiss.IndexFlatL2(rows.shape[1])
        index.add((offsets * unit).astype(np.float32))
        labels[start : start + BLOCK] = index.search(block, 1)[1][: len(moved), 0]
    return labels


def squared_distances(rows: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance of each row to the centroid of its label: float64 [n], summed in step order.

    Column by column there is no reduction whose order numpy could choose, and zero means equal values.
    """
    total = np.zeros(len(rows))
    for column, values in zip(rows.T, centroids.T.astype(np.float64), strict=True):
        difference = column - values[labels]
        total += np.multiply(difference, difference, out=difference)
    return total


def member_sums(rows: np.ndarray, labels: np.ndarray, num_clusters: int, exponent: int) -> np.ndarray:
    """Sums of each cluster's rows, int64 [K, T] in units of 2^-exponent; each value rounded half to even."""
    sums = np.zeros((num_clusters, rows.shape[1]), dtype=np.int64)
    if len(rows):
        # numpy sorts 16-bit integers by radix, ten times faster than 32-bit ones
        small = labels.astype(np.uint16) if num_clusters <= 2**16 else labels
        order = np.argsort(small, kind="stable")
        ordered = labels[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        scaled = np.multiply(rows[order], math.ldexp(1.0, exponent), dtype=np.float64)
        sums[ordered[starts]] = np.add.reduceat(np.rint(scaled, out=scaled).astype(np.int64), starts, axis=0)
    return sums


class Shard:
    """Some parts of the trajectories in memory: float32 rows, int64 ids, int32 labels of the last centroids."""

    def __init__(self, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Take (example ids int64 [n], losses float32 [n, T]) of each part, only the rows that could be
        scored.

        Raises UserError, naming the example, if a loss is not finite, or if T differs between parts.
        """
        self._ids: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._summary = NO_ROWS
        self._last: tuple[bytes, list[np.ndarray]] | None = None
        for ids, rows in parts:
            self._ids.append(np.ascontiguousarray(ids, dtype=np.int64))
            self._rows.append(np.ascontiguousarray(rows, dtype=np.float32))
            self._summary += _part_summary(self._ids[-1], self._rows[-1])

    def summary(self) -> Summary:
        """Number of rows, largest absolute value and T."""
        return self._summary

    def sample(self, seed: int, m: int) -> Ranked:
        """The m rows with the smallest keyed hash, or all of them if there are fewer."""
        best = self._nothing(np.uint64)
        for ids, rows in self._filled():
            hashes = keyed_hash(seed, ids)
            keep = hashes <= best.keys[-1] if len(best.keys) == m else np.ones(len(ids), dtype=bool)
            best = best.joined(Ranked(hashes[keep], ids[keep], rows[keep])).first(m)
        return best

    def sampled(self, seed: int, limit: int) -> "Shard":
        """The same parts with only the rows whose keyed hash is at most `limit`."""
        keep = [keyed_hash(seed, ids) <= np.uint64(limit) for ids in self._ids]
        return Shard((ids[k], rows[k]) for ids, rows, k in zip(self._ids, self._rows, keep, strict=True))

    def hash_counts(self, seed: int) -> np.ndarray:
        """Rows by the leading 16 bits of their keyed hash, int64 [65536]."""
        counts = np.zeros(1 << _LEADING, dtype=np.int64)
        for ids in self._ids:
            counts += np.bincount(_leading(keyed_hash(seed, ids)), minlength=len(counts))
        return counts

    def hashes(self, seed: int, leading: int) -> np.ndarray:
        """The keyed hashes with these leading 16 bits, uint64; one row in 65,536."""
        found = [keyed_hash(seed, ids) for ids in self._ids]
        return np.concatenate([np.empty(0, np.uint64), *(h[_leading(h) == leading] for h in found)])

    def step(self, centroids: np.ndarray, exponent: int, previous: np.ndarray | None) -> Partial:
        """Assign every row to its nearest centroid and add up the members; see Partial.

        `previous` are the centroids of the round before, None in the first. Their labels are normally still
        here; a shard that was restarted finds them again, so moves are exact whatever happened.
        """
        before = None if previous is None else self._labels(previous)
        after = self._labels(centroids)
        sums = np.zeros(centroids.shape, dtype=np.int64)
        counts = np.zeros(len(centroids), dtype=np.int64)
        objective = Fraction(0)
        for part_rows, part_labels in zip(self._rows, after, strict=True):
            counts += np.bincount(part_labels, minlength=len(centroids))
            for start in range(0, len(part_rows), BLOCK):
                rows, labels = part_rows[start : start + BLOCK], part_labels[start : start + BLOCK]
                sums += member_sums(rows, labels, len(centroids), exponent)
                objective += Fraction(float(squared_distances(rows, centroids, labels).sum()))
        moves = self._summary.num_rows
        if before is not None:
            moves = sum(int(np.count_nonzero(a != b)) for a, b in zip(before, after, strict=True))
        return Partial(sums, counts, objective, moves)

    def farthest(self, m: int, centroids: np.ndarray, taken: np.ndarray) -> Ranked:
        """The m rows farthest from their nearest centroid, by (-squared distance, id), the key being the
        former.

        They differ in value from each other and from every row of `taken` [any, T]; fewer where there are no
        more.
        """
        skip = {_value(row) for row in taken}
        best = self._nothing(np.float64)
        for (ids, rows), labels in zip(self._filled(), filter(len, self._labels(centroids)), strict=True):
            keys = -squared_distances(rows, centroids, labels)
            keep = keys <= best.keys[-1] if len(best.keys) == m else np.ones(len(ids), dtype=bool)
            best = best.joined(Ranked(keys[keep], ids[keep], rows[keep])).first_distinct(m, skip)
        return best

    def labels(self, part_index: int, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cluster int32 [n] and Euclidean distance float32 [n] of one part, in the order given."""
        rows = self._rows[part_index]
        if self._last is not None and self._last[0] == centroids.tobytes():
            labels = self._last[1][part_index]
        else:
            labels = nearest(rows, centroids) if len(rows) else np.empty(0, dtype=np.int32)
        if not len(rows):
            return labels, np.empty(0, dtype=np.float32)
        return labels, np.sqrt(squared_distances(rows, centroids, labels)).astype(np.float32)

    def spread(self, centroids: np.ndarray) -> np.ndarray:
        """Sums of squared deviations of each cluster's members at every step, float64 [K, T]; for pictures, not exact."""
        total = np.zeros(centroids.shape)
        for rows, labels in zip(self._rows, self._labels(centroids), strict=True):
            if len(rows):
                np.add.at(total, labels, (rows - centroids[labels]) ** 2)
        return total

    def _labels(self, centroids: np.ndarray) -> list[np.ndarray]:
        """Labels of all parts; those of the last centroids asked for are kept."""
        key = centroids.tobytes()
        if self._last is None or self._last[0] != key:
            empty = np.empty(0, dtype=np.int32)
            self._last = None  # never hold two sets while the second is made
            self._last = key, [nearest(rows, centroids) if len(rows) else empty for rows in self._rows]
        return self._last[1]

    def _filled(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        return ((ids, rows) for ids, rows in zip(self._ids, self._rows, strict=True) if len(ids))

    def _nothing(self, key_type: type) -> Ranked:
        steps = self._summary.num_steps
        return Ranked(np.empty(0, key_type), np.empty(0, np.int64), np.empty((0, steps), np.float32))


def _leading(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _LEADING)).astype(np.int64)


def hash_limit(shards: Shards, seed: int, num_rows: int) -> int:
    """The `num_rows`-th smallest keyed hash of all rows, of which there are at least so many."""
    ends = np.cumsum(sum(shards("hash_counts", (seed,))))
    leading = int(np.searchsorted(ends, num_rows))
    before = int(ends[leading - 1]) if leading else 0
    hashes = np.sort(np.concatenate(list(shards("hashes", (seed, leading)))))
    return int(hashes[num_rows - before - 1])


def _part_summary(ids: np.ndarray, rows: np.ndarray) -> Summary:
    if rows.ndim != 2 or len(ids) != len(rows):
        raise ValueError(f"a part needs ids [n] and losses [n, T], got {ids.shape} and {rows.shape}")
    if not len(rows):
        return NO_ROWS
    if not rows.shape[1]:
        raise UserError("Clustering trajectories: expected at least one step per trajectory, got none.")
    low, high = float(rows.min()), float(rows.max())  # NaN and infinities come through
    if not (math.isfinite(low) and math.isfinite(high)):
        row, step = np.argwhere(~np.isfinite(rows))[0]
        raise UserError(
            f"Clustering trajectories: expected finite losses, got {rows[row, step]} for example_id {ids[row]} "
            f"in column {step} (from 0) of the trajectory. Rows that cannot be scored must be left out; score this "
            "part again. Where its losses are finite, clusters.features or clusters.weights leave the range of float32."
        )
    return Summary(num_rows=len(rows), max_abs=max(high, -low), num_steps=rows.shape[1])


def _value(row: np.ndarray) -> bytes:
    return (row + np.float32(0)).tobytes()  # adding zero turns -0.0 into 0.0: equal values, equal bytes


@dataclass(frozen=True)
class Round:
    """What one round saw before it moved the centroids.

    objective: sum of squared distances; sizes: members per cluster; moves: see Partial; shift: largest
    distance that a centroid with members moved, as a fraction of the root mean square distance of rows to
    their centroid (0 where that is 0); reseeded: clusters that had no members and were given a new centroid.
    """

    objective: float
    sizes: tuple[int, ...]
    moves: int
    shift: float
    reseeded: int


@dataclass(frozen=True)
class FitState:
    """All that the driver keeps between rounds; resuming from it gives the same bits as never stopping."""

    centroids: np.ndarray
    previous: np.ndarray | None = None
    history: tuple[Round, ...] = ()

    @property
    def round(self) -> int:
        """Number of finished rounds."""
        return len(self.history)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; every float32 is exact in Python's float and its repr."""
        return {
            "centroids": self.centroids.tolist(),
            "previous": None if self.previous is None else self.previous.tolist(),
            "history": [asdict(entry) for entry in self.history],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "FitState":
        """Inverse of to_dict."""
        previous = value["previous"]
        return cls(
            centroids=np.array(value["centroids"], dtype=np.float32),
            previous=None if previous is None else np.array(previous, dtype=np.float32),
            history=tuple(Round(**{**entry, "sizes": tuple(entry["sizes"])}) for entry in value["history"]),
        )


@dataclass(frozen=True)
class FitResult:
    """Final centroids float32 [K, T], and what assigning all rows to them gives.

    sizes int64 [K] and objective are of these centroids (one more assignment after the last round), and agree
    with Shard.labels. The history is of the rows that the centroids were found on; its sizes use the final
    cluster numbers. `converged`: stopped by the tolerance.
    """

    centroids: np.ndarray
    sizes: np.ndarray
    objective: float
    history: tuple[Round, ...]
    converged: bool


def fit(
    shards: Shards,
    *,
    k: int,
    seed: int,
    max_rounds: int,
    tolerance: float,
    start_rows: int = BLOCK,
    start: np.ndarray | None = None,
    fewer: bool = False,
    everyone: Shards | None = None,
    resume: FitState | None = None,
    on_round: Callable[[FitState], None] | None = None,
) -> FitResult:
    """Lloyd's k-means over shards; the driver holds K x T and at most two start samples.

    Args:
        shards: shards(method, args) calls a method of every Shard and yields the answers in any order.
        k: number of clusters. They are numbered by ascending mean of their centroid.
        seed: of the start; k-means++ in float64 on the rows with the smallest keyed hash.
        max_rounds: at most this many times are the centroids moved.
        tolerance: stop after a round without empty clusters whose shift (see Round) is at most this.
        start_rows: size of the start sample.
        start: float32 [K, T] centroids to begin from instead; clusters keep the numbers they have there.
        fewer: where there are fewer distinct rows than clusters, have one cluster for each of them (with a start:
            leave what cannot be filled where it is) instead of raising.
        everyone: the shards of all rows, where `shards` are those of a sample to find the centroids on.
        resume: state after some round of a fit with the same other arguments.
        on_round: called with the state after every round.

    A cluster without members gets the row farthest from its own centroid, by (-squared distance, id), whose
    value no other centroid has; several empty clusters take such rows in turn, the lowest cluster number
    first. A cluster can be empty in the result only if the very last assignment left it so.

    Raises:
        UserError: k is below 1, above the number of rows or of distinct rows; T differs between shards.
    """
    summary = summary_of(shards)
    if not (1 <= k <= summary.num_rows or (fewer and summary.num_rows)):
        raise UserError(
            "Clustering trajectories: expected clusters.k between 1 and the number of examples with a "
            f"trajectory, {summary.num_rows}, got {k}. Change clusters.k or add examples."
        )
    exponent = fixed_point_exponent(summary.num_rows, summary.max_abs)
    if resume is None:
        begin = _start(shards, k, seed, start_rows, fewer) if start is None else start
        resume = FitState(np.ascontiguousarray(begin, dtype=np.float32))
    state, shape = resume, resume.centroids.shape
    if (
        (shape[0] != k and not fewer)
        or shape[1] != summary.num_steps
        or not np.isfinite(state.centroids).all()
    ):
        raise ValueError(f"expected finite centroids {(k, summary.num_steps)}, got {shape}")
    while not (converged := _converged(state, tolerance)) and state.round < max_rounds:
        state = _next_round(shards, state, summary.num_rows, exponent, fewer)
        if on_round is not None:
            on_round(state)
    if start is None:
        state = _renumbered(state)
    # a tie goes to the lower cluster number, so only an assignment in the final order tells the sizes
    last = assigned(shards if everyone is None else everyone, state.centroids)
    return FitResult(state.centroids, last.counts, float(last.objective), state.history, converged)


def summary_of(shards: Shards) -> Summary:
    """Of all rows."""
    return functools.reduce(operator.add, shards("summary", ()), NO_ROWS)


def assigned(shards: Shards, centroids: np.ndarray, previous: np.ndarray | None = None) -> Partial:
    """What assigning all rows to the centroids gives; its moves count the rows that had another number under `previous`."""
    summary = summary_of(shards)
    exponent = fixed_point_exponent(summary.num_rows, summary.max_abs)
    return _step(shards, (centroids, exponent, previous), summary.num_rows)


def _converged(state: FitState, tolerance: float) -> bool:
    return bool(state.history) and state.history[-1].reseeded == 0 and state.history[-1].shift <= tolerance


def _next_round(shards: Shards, state: FitState, num_rows: int, exponent: int, fewer: bool) -> FitState:
    partial = _step(shards, (state.centroids, exponent, state.previous), num_rows)
    full = partial.counts > 0
    centroids = state.centroids.copy()
    centroids[full] = np.ldexp(partial.sums[full] / partial.counts[full, None], -exponent)
    empty = np.flatnonzero(~full)
    if len(empty):
        rows = _farthest(shards, len(empty), state.centroids, centroids[full], len(centroids), fewer)
        empty = empty[: len(rows)]
        centroids[empty] = rows
    moved = squared_distances(centroids[full], state.centroids, np.flatnonzero(full))
    mean_squared = float(partial.objective) / num_rows
    entry = Round(
        objective=float(partial.objective),
        sizes=tuple(partial.counts.tolist()),
        moves=partial.moves,
        shift=math.sqrt(float(moved.max()) / mean_squared) if mean_squared else 0.0,
        reseeded=len(empty),
    )
    return FitState(centroids, previous=state.centroids, history=(*state.history, entry))


def _renumbered(state: FitState) -> FitState:
    """The clusters in ascending order of their centroid's mean."""
    means = [math.fsum(centroid) for centroid in state.centroids.tolist()]
    order = np.lexsort((*state.centroids.T[::-1], means))
    history = tuple(replace(entry, sizes=tuple(entry.sizes[i] for i in order)) for entry in state.history)
    return FitState(np.ascontiguousarray(state.centroids[order]), history=history)


def _step(shards: Shards, args: tuple[Any, ...], num_rows: int) -> Partial:
    partial: Partial = functools.reduce(operator.add, shards("step", args))
    if partial.counts.sum() != num_rows:
        raise RuntimeError(f"k-means: expected {num_rows} rows from the shards, got {partial.counts.sum()}")
    return partial


def _start(shards: Shards, k: int, seed: int, start_rows: int, fewer: bool) -> np.ndarray:
    """k-means++ on the start sample; the farthest of all rows complete it if too few are distinct."""
    samples = (sample for sample in shards("sample", (seed, start_rows)) if len(sample.ids))
    sample = functools.reduce(lambda a, b: a.joined(b).first(start_rows), samples)
    centroids = _plus_plus(sample.rows, k, seed)
    if len(centroids) < k:
        more = _farthest(shards, k - len(centroids), centroids, centroids, k, fewer)
        centroids = np.concatenate([centroids, more])
    return centroids


def _plus_plus(rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k-means++ (Arthur, Vassilvitskii 2007): up to k rows of distinct value, float32 [<= k, T]."""
    points, same = rows.astype(np.float64), np.zeros(len(rows), dtype=np.int64)
    # no example has a negative id, so these draws are independent of the hashes that chose the sample
    uniforms = (keyed_hash(seed, -1 - np.arange(k)) >> np.uint64(11)) * 2.0**-53
    chosen = [int(uniforms[0] * len(rows))]
    closest = squared_distances(points, points[chosen], same)
    while len(chosen) < k and closest.any():
        cumulative = np.cumsum(closest)
        chosen.append(int(np.searchsorted(cumulative, uniforms[len(chosen)] * cumulative[-1], side="right")))
        closest = np.minimum(closest, squared_distances(points, points[chosen[-1:]], same))
    return rows[chosen]


def _farthest(
    shards: Shards, m: int, centroids: np.ndarray, taken: np.ndarray, k: int, fewer: bool
) -> np.ndarray:
    """Rows [m, T] by the rule of Shard.farthest over all shards; where there are not so many: `fewer`, or a UserError."""
    rows = _farthest_up_to(shards, m, centroids, taken)
    if len(rows) < m and not fewer:
        raise UserError(
            f"Clustering trajectories: expected at least clusters.k = {k} distinct trajectories, got "
            f"{len(_farthest_up_to(shards, k, centroids, taken[:0]))}. Lower clusters.k, or tell more rows apart: more "
            "clusters.steps, other clusters.features, more clusters.points_per_centroid where that is set."
        )
    return rows


def _farthest_up_to(shards: Shards, m: int, centroids: np.ndarray, taken: np.ndarray) -> np.ndarray:
    skip = {_value(row) for row in taken}
    best = Ranked(np.empty(0), np.empty(0, np.int64), centroids[:0])
    for found in shards("farthest", (m, centroids, taken)):
        if len(found.ids):  # a shard without rows does not know T
            best = best.joined(found).first_distinct(m, skip)
    return best.rows
