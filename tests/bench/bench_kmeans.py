"""k-means of this package, faiss, scikit-learn, Spark MLlib and dask-ml from one start.

Faiss uses all points, and every side does the same number of rounds.

    # 10^6 x 12, K = 100 and 1,000, one thread
    python tests/bench/bench_kmeans.py
    # the stated size
    python tests/bench/bench_kmeans.py --rows 10000000 --sides ours faiss
    # FOLDER is where pip --target has put the extra `bench`
    python tests/bench/bench_kmeans.py --k 100 --rivals FOLDER
    # what a shard holds, in a process of its own for each K
    python tests/bench/bench_kmeans.py --rows 5000000 --memory

Ours has one Shard per thread, its rows in parts of --rows-per-part; where there are several, each
is in a process of its own, as on a cluster. Others get the same number of threads. Seconds are of
whole fits of rows that a side already holds in its own form. Seconds to convert the rows are listed
as "making": ours puts its parts into Shards, anew for every fit (a fit sorts their rows), Spark's
RDD and dask's array are cached once, the others take the array of rows as it is. Ratios are given
without and with it. MiniBatchKMeans does no rounds of all rows; it reads as many rows as the others
do. Ours assigns all rows to the final centroids, for their sizes and the objective; faiss does not,
and faiss+labels does. "without bounds" and "without tiles" are ours without Hamerly bounds or
without leaving SIMD tiles out, in one thread. A rival that is not installed is skipped, with the
reason.

Memory is private memory after a fit of all rows in one Shard, less that of the same process after a
fit of 1,000 rows, over the bytes of the float32 rows.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss  # noqa: E402
import numpy as np  # noqa: E402

from s2l_ray.core.kmeans import assign  # noqa: E402
from s2l_ray.core.kmeans.assign import nearest, squared_distances  # noqa: E402
from s2l_ray.core.kmeans.centroid_index import CentroidIndex  # noqa: E402
from s2l_ray.core.kmeans.lloyd import KMeans  # noqa: E402
from s2l_ray.core.kmeans.shard import Shard  # noqa: E402
from s2l_ray.core.query import Query, ask_here  # noqa: E402
from tests.bench import frame  # noqa: E402

# the centroids
Fit = Callable[[], np.ndarray]
# Sides that count making inside their seconds.
OURS = {"ours", "without bounds", "without tiles"}
# seconds, by side; of ours one for each fit, the one to warm up included
MAKING: dict[str, list[float]] = {}
FAISS_DEFAULTS = (
    faiss.cvar.distance_compute_blas_threshold,
    faiss.cvar.distance_compute_blas_query_bs,
)


def main() -> None:
    """Fit with every side in turn, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of trajectories")
    parser.add_argument("--steps", type=int, default=12, help="T, losses of a row")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.05,
        help="standard deviation of every loss around its curve",
    )
    parser.add_argument("--k", type=int, nargs="+", default=[100, 1000], help="numbers of clusters")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of every fit")
    parser.add_argument("--threads", type=int, default=1, help="threads of every side")
    parser.add_argument(
        "--rows-per-part", type=int, default=16_384, help="rows of a part, as they are by default"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="measured runs of every side, after one to warm up"
    )
    parser.add_argument(
        "--sides", nargs="+", default=list(SIDES), choices=list(SIDES), help="who takes part"
    )
    parser.add_argument(
        "--rivals", metavar="FOLDER", help="a folder with further packages, looked at last"
    )
    parser.add_argument(
        "--memory", action="store_true", help="measure memory of ours instead of time"
    )
    args = parser.parse_args()
    if args.memory:
        memory(args)
        return
    if args.rivals:
        sys.path.append(args.rivals)
    rows = trajectories(args.rows, args.steps, args.noise)
    results = [result for k in args.k for result in compare(rows, k, args)]
    columns = ("K", "side", "seconds", "ours / side", "making", "with it", "objective", "over ours")
    frame.show(
        f"{args.rows:,} x {args.steps}, {args.rounds} rounds, {args.threads} thread(s)",
        columns,
        [[result[column] for column in columns] for result in results],
    )
    frame.finish("kmeans", **{**vars(args), "results": results})


def trajectories(num_rows: int, steps: int, noise: float, seed: int = 5) -> np.ndarray:
    """Losses float32 [N, T] that fall from a random height at a random speed, with noise."""
    draw = np.random.default_rng(seed)
    rows = np.empty((num_rows, steps), np.float32)
    for start in range(0, num_rows, 1 << 20):
        some = rows[start : start + (1 << 20)]
        height, rate = draw.uniform(1, 6, (len(some), 1)), draw.uniform(0, 0.3, (len(some), 1))
        some[:] = height * np.exp(-rate * np.arange(steps)) + draw.normal(0, noise, some.shape)
    return rows


def compare(rows: np.ndarray, k: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    start = rows[np.random.default_rng(k).choice(len(rows), k, replace=False)]
    sides: dict[str, Fit] = {}
    MAKING.clear()
    for name in args.sides:
        try:
            sides[name] = SIDES[name](rows, start, args)
        except ImportError as missing:
            print(f"{name} is skipped: {missing}", flush=True)
    found: dict[str, np.ndarray] = {}

    def keeping(name: str) -> Callable[[], None]:
        return lambda: found.update({name: sides[name]()})

    seconds = frame.in_turn({name: keeping(name) for name in sides}, args.repeats)
    objectives = {name: objective(rows, centroids) for name, centroids in found.items()}
    made = {name: MAKING.get(name, [0.0])[-args.repeats :] for name in sides}
    whole = {
        name: own if name in OURS else [took + made[name][0] for took in own]
        for name, own in seconds.items()
    }
    for name in OURS & seconds.keys():
        seconds[name] = [took - own for took, own in zip(seconds[name], made[name], strict=True)]
    return [
        {
            "K": k,
            "side": name,
            "seconds": statistics.median(own),
            "ours / side": frame.ratio(seconds["ours"], own),
            "making": statistics.median(made[name]),
            "with it": frame.ratio(whole["ours"], whole[name]),
            "objective": objectives[name],
            "over ours": f"{objectives[name] / objectives['ours'] - 1:+.1e}",
        }
        for name, own in seconds.items()
    ]


def objective(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, the same way for all sides."""
    centroids = np.ascontiguousarray(centroids, np.float32)
    index, total = CentroidIndex(centroids), 0.0
    for start in range(0, len(rows), 1 << 17):
        some = rows[start : start + (1 << 17)]
        total += float(squared_distances(some, centroids, nearest(some, index)).sum())
    return total


def memory(args: argparse.Namespace) -> None:
    """Print what a shard holds for every K."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        held = {k: pool.submit(held_by_a_shard, k, args).result() for k in args.k}
    results = [
        {
            "K": k,
            "idle MiB": idle / 2**20,
            "held MiB": own / 2**20,
            "times the rows": own / (4 * args.rows * args.steps),
        }
        for k, (idle, own) in held.items()
    ]
    frame.show(
        f"{args.rows:,} x {args.steps}, {args.rounds} rounds",
        list(results[0]),
        [list(result.values()) for result in results],
    )
    frame.finish("kmeans memory", **{**vars(args), "results": results})


def held_by_a_shard(k: int, args: argparse.Namespace) -> tuple[int, int]:
    """Bytes of private memory: after a tiny fit, and more than that after the fit."""

    def fitted(num_rows: int) -> Shard:
        sizes = range(0, num_rows, args.rows_per_part)
        shard = Shard(
            (
                np.arange(first, min(first + args.rows_per_part, num_rows)),
                trajectories(
                    min(args.rows_per_part, num_rows - first), args.steps, args.noise, first
                ),
            )
            for first in sizes
        )
        clusters, rounds = min(k, num_rows // 2), args.rounds
        KMeans(
            k=clusters,
            seed=0,
            max_rounds=rounds,
            tolerance=-1.0,
            start=trajectories(clusters, args.steps, args.noise),
        ).fit(ask_here(shard))
        gc.collect()
        return shard

    fitted(1000)
    idle = private_bytes()
    shard = fitted(args.rows)
    assert shard.summary.num_rows == args.rows
    return idle, private_bytes() - idle


def private_bytes() -> int:
    """Memory of this process that no other one shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


# -------------------------------------------------------------------------------------------- sides


@contextlib.contextmanager
def making(side: str) -> Iterator[None]:
    """Times what brings the rows to where the side needs them."""
    began = time.perf_counter()
    yield
    MAKING.setdefault(side, []).append(time.perf_counter() - began)


def ours(
    rows: np.ndarray,
    start: np.ndarray,
    args: argparse.Namespace,
    side: str = "ours",
    **limits: int,
) -> Fit:
    """Ours; `limits` are constants of `assign` in this process, which leave a shortcut out."""
    limits = {"MAX_BOUNDED": assign.MAX_BOUNDED, **limits}
    shards = (
        [Apart(args, number) for number in range(args.threads)]
        if args.threads > 1
        else [Here(args, rows)]
    )

    def put(query: Query[Shard, Any] | None) -> list[Any]:
        for shard in shards:
            shard.ask(query)
        return [shard.answer() for shard in shards]

    def run() -> np.ndarray:
        with making(side):
            put(None)
        options = {
            "k": len(start),
            "seed": 0,
            "max_rounds": args.rounds,
            "tolerance": -1.0,
            "start": start,
        }
        with mock.patch.dict(vars(assign), limits):
            return KMeans(**options).fit(lambda query: query.merge(put(query))).centroids

    return run


class Here:
    """Every n-th part in a Shard of this process; no query makes the Shard anew."""

    def __init__(self, args: argparse.Namespace, rows: np.ndarray, number: int = 0) -> None:
        size, step = args.rows_per_part, args.rows_per_part * args.threads
        self.parts = [
            (np.arange(first, min(first + size, len(rows))), rows[first : first + size])
            for first in range(number * size, len(rows), step)
        ]

    def ask(self, query: Query[Shard, Any] | None) -> None:
        if query is None:
            self.shard = Shard(self.parts)
        self.result = None if query is None else query.of(self.shard)

    def answer(self) -> Any:
        return self.result


class Apart:
    """The same in a process of its own, which makes all rows by itself and ends with this one."""

    def __init__(self, args: argparse.Namespace, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, args, number), daemon=True).start()
        self.answer()

    def ask(self, query: Query[Shard, Any] | None) -> None:
        self.pipe.send(query)

    def answer(self) -> Any:
        return self.pipe.recv()


def serve(pipe: Any, args: argparse.Namespace, number: int) -> None:
    faiss.omp_set_num_threads(1)
    own = Here(args, trajectories(args.rows, args.steps, args.noise), number)
    pipe.send(None)
    # the other end is gone
    with contextlib.suppress(EOFError):
        while True:
            own.ask(pipe.recv())
            pipe.send(own.answer())


def faiss_kmeans(
    rows: np.ndarray, start: np.ndarray, args: argparse.Namespace, last_labels: bool = False
) -> Fit:
    def run() -> np.ndarray:
        faiss.omp_set_num_threads(args.threads)
        faiss.cvar.distance_compute_blas_threshold, faiss.cvar.distance_compute_blas_query_bs = (
            FAISS_DEFAULTS
        )
        model = faiss.Kmeans(
            rows.shape[1], len(start), niter=args.rounds, max_points_per_centroid=len(rows)
        )
        model.train(rows, init_centroids=start)
        if last_labels:
            model.assign(rows)
        return np.asarray(model.centroids)

    return run


def scikit_learn(rows: np.ndarray, start: np.ndarray, args: argparse.Namespace) -> Fit:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    def run() -> np.ndarray:
        with threadpool_limits(args.threads):
            return (
                KMeans(
                    len(start), init=start, n_init=1, max_iter=args.rounds, tol=0, algorithm="lloyd"
                )
                .fit(rows)
                .cluster_centers_
            )

    return run


def mini_batch(rows: np.ndarray, start: np.ndarray, args: argparse.Namespace) -> Fit:
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    def run() -> np.ndarray:
        with threadpool_limits(args.threads):
            model = MiniBatchKMeans(
                len(start),
                init=start,
                n_init=1,
                max_iter=args.rounds,
                batch_size=16_384,
                tol=0,
                max_no_improvement=None,
            )
            return model.fit(rows).cluster_centers_

    return run


def spark(rows: np.ndarray, start: np.ndarray, args: argparse.Namespace) -> Fit:
    from pyspark import SparkConf, SparkContext
    from pyspark.mllib.clustering import KMeans, KMeansModel

    settings = {
        "spark.driver.memory": "6g",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.maxResultSize": "2g",
    }
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.environ.get("PYTHONPATH"), args.rivals])
    )
    context = SparkContext.getOrCreate(
        SparkConf().setMaster(f"local[{args.threads}]").setAll(list(settings.items()))
    )
    context.setLogLevel("ERROR")
    step = max(1, len(rows) // 64)
    with making("spark"):
        pieces = [
            rows[first : first + step].astype(np.float64) for first in range(0, len(rows), step)
        ]
        vectors = context.parallelize(pieces, len(pieces)).flatMap(list).cache()
        assert vectors.count() == len(rows)
    model = KMeansModel(list(start.astype(np.float64)))

    def run() -> np.ndarray:
        found = KMeans.train(
            vectors, len(start), maxIterations=args.rounds, epsilon=0.0, initialModel=model
        )
        return np.array(found.clusterCenters)

    return run


def dask_ml(rows: np.ndarray, start: np.ndarray, args: argparse.Namespace) -> Fit:
    import dask
    import dask.array
    from dask_ml.cluster import KMeans

    with making("dask-ml"):
        array = dask.array.from_array(rows, chunks=(args.rows_per_part, rows.shape[1])).persist()

    def run() -> np.ndarray:
        with dask.config.set(scheduler="threads", num_workers=args.threads):
            model = KMeans(len(start), init=start.astype(np.float64), max_iter=args.rounds, tol=0)
            return model.fit(array).cluster_centers_

    return run


SIDES: dict[str, Callable[[np.ndarray, np.ndarray, argparse.Namespace], Fit]] = {
    "ours": ours,
    "without bounds": partial(ours, side="without bounds", MAX_BOUNDED=0),
    "without tiles": partial(ours, side="without tiles", _FEW_CENTROIDS=1 << 30),
    "faiss": faiss_kmeans,
    "faiss+labels": partial(faiss_kmeans, last_labels=True),
    "scikit-learn": scikit_learn,
    "mini-batch": mini_batch,
    "spark": spark,
    "dask-ml": dask_ml,
}

if __name__ == "__main__":
    main()
