"""Tests of k-means that scikit-learn and faiss have, run against our k-means.

    python tests/conformance/kmeans.py [CHECKOUT...]

A checkout is one of facebookresearch/faiss or scikit-learn/scikit-learn; without one, the tests
that the installed scikit-learn ships are run. Before they are imported, their k-means is replaced
by an adapter: rows go as float32 to three shards of two parts each. What does not apply (sparse
rows, weights, other algorithms, inner functions and arguments of theirs) is skipped, and the
reasons are printed with their counts. Exit status 1 if any test fails.
"""

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import scipy.sparse
import sklearn.cluster

sys.path.insert(0, str(Path(__file__).parents[2]))
from s2l_ray.core.kmeans.lloyd import KMeans
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.kmeans.state import FitResult
from s2l_ray.core.query import ask_here

TheirKMeans: Any = sklearn.cluster.KMeans
SHARDS, PARTS = 3, 6
# What of a test's name or parameters says that it does not apply.
NOT_APPLICABLE = {
    "sparse": "sparse rows",
    "csr": "sparse rows",
    "MiniBatch": "mini-batches",
    "minibatch": "mini-batches",
    "elkan": "another algorithm for the same result (elkan)",
    "weight": "weights of rows",
    "kmeans_plusplus": "an inner function of theirs",
    "relocate_empty_clusters": "an inner function of theirs",
    "euclidean_distance": "an inner function of theirs",
    "test_inertia": "an inner function of theirs",
    "is_same_clustering": "an inner function of theirs",
    "k_means_function": "an inner function of theirs",
    "wrong_params": "checks of their own arguments",
    "n_init_auto": "checks of their own arguments",
    "warning_n_init": "checks of their own arguments",
    "initial_centroids": "checks of their own arguments",
    "kmeans_verbose": "their own printing",
    "n_threads": "their own threads",
    "float_precision": "float64: rows are float32",
    "integer_input": "float64: rows are float32",
    "warns_less_centers": "fewer distinct rows than clusters: refused in words",
    "relocating_with_duplicates": "fewer distinct rows than clusters: refused in words",
    "relocated_clusters": "rounds are counted otherwise where an empty cluster gets a row",
    "encoded": "another algorithm (codecs)",
    "progressive_dim": "another algorithm (progressive dimensions)",
    "redo_cosine": "another distance",
    "smawk": "another algorithm (one dimension)",
    "cluster1d": "another algorithm (one dimension)",
}


def fit(rows: np.ndarray, k: int, **settings: Any) -> tuple[FitResult, list[Shard]]:
    """The result of ours, and the shards that hold the rows."""
    rows = np.ascontiguousarray(rows, np.float32)
    ids = np.arange(len(rows))
    cut = np.array_split(ids, PARTS)
    shards = [Shard([(ids[p], rows[p]) for p in cut[first::SHARDS]]) for first in range(SHARDS)]
    fitted = KMeans(k=k, allow_fewer_clusters=True, **settings).fit(ask_here(*shards))
    return fitted, shards


def nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The label of each row by ours, int32 [N]."""
    rows = np.ascontiguousarray(rows, np.float32)
    shard = Shard([(np.arange(len(rows)), rows)])
    return shard.labels(0, np.ascontiguousarray(centroids, np.float32))[0].astype(np.int32)


class OursForScikitLearn(TheirKMeans):  # type: ignore[misc]
    """Ours with the attributes of scikit-learn's estimator."""

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "OursForScikitLearn":
        if scipy.sparse.issparse(X):
            pytest.skip("sparse rows")
        if sample_weight is not None:
            pytest.skip("weights of rows")
        X = self._validate(X)
        self.n_features_in_ = X.shape[1]
        self._n_features_out = self.n_clusters
        start = self._starts(X)
        runs = self.n_init if isinstance(self.n_init, int) and start is None else 1
        seed = self._seed()
        settings = {
            "max_rounds": self.max_iter,
            # Ours is relative to the mean distance to centroids, theirs to the columns' variance.
            "tolerance": float(self.tol),
            "start": start,
        }
        found = [fit(X, self.n_clusters, seed=seed + n, **settings)[0] for n in range(runs)]
        best = min(found, key=lambda each: each.objective)
        self.cluster_centers_ = best.centroids.astype(X.dtype)
        self.labels_ = nearest(X, best.centroids)
        self.inertia_ = best.objective
        self.n_iter_ = len(best.history)
        self._n_threads = 1
        return self

    def predict(self, X: Any) -> np.ndarray:
        if scipy.sparse.issparse(X):
            pytest.skip("sparse rows")
        return nearest(self._validate(X), self.cluster_centers_)

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        return self.fit(X, y, sample_weight).labels_

    def _validate(self, X: Any) -> np.ndarray:
        rows = np.asarray(X)
        return rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float64)

    def _seed(self) -> int:
        if isinstance(self.random_state, np.random.RandomState):
            return int(self.random_state.randint(1 << 30))
        return int(self.random_state or 0)

    def _starts(self, X: np.ndarray) -> np.ndarray | None:
        """The centroids to begin from; None: k-means++."""
        given = self.init
        if callable(given):
            given = given(X, self.n_clusters, np.random.RandomState(self._seed()))
        if isinstance(given, str):
            if given == "random":
                draw = np.random.default_rng(self._seed())
                given = X[draw.choice(len(X), self.n_clusters, replace=False)]
            else:
                return None
        return np.ascontiguousarray(given, np.float32)


class OursForFaiss:
    """Ours with the attributes of faiss.Kmeans and faiss.Clustering."""

    def __init__(self, d: int, k: int, niter: int = 25, seed: int = 1234, **options: Any) -> None:
        self.d, self.k, self.niter, self.seed, self.nredo = d, k, niter, seed, 1
        if not options.keys() <= {"verbose"}:
            pytest.skip(f"options of theirs ({', '.join(options)})")

    def train(
        self, x: np.ndarray, index: Any = None, weights: Any = None, init_centroids: Any = None
    ) -> float:
        if weights is not None:
            pytest.skip("weights of rows")
        start = None if init_centroids is None else np.ascontiguousarray(init_centroids)
        found = [
            fit(x, self.k, seed=self.seed + n, max_rounds=self.niter, tolerance=0.0, start=start)[0]
            for n in range(self.nredo)
        ]
        best = min(found, key=lambda each: each.objective)
        self.centroids, self.obj = best.centroids, [each.objective for each in best.history]
        self.iteration_stats = _Stats({"obj": objective} for objective in self.obj)
        self.index = faiss.IndexFlatL2(self.d) if index is None else index
        self.index.add(self.centroids)
        return best.objective


class _Stats(list[dict[str, float]]):
    """A list of dictionaries that is a vector of structs, too."""

    def at(self, place: int) -> SimpleNamespace:
        return SimpleNamespace(**self[place])

    def size(self) -> int:
        return len(self)


class Counted:
    """A plugin of pytest: skips what does not apply, and counts."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            about = f"{item.name} {parameters}"
            for words, reason in NOT_APPLICABLE.items():
                if words in about:
                    item.add_marker(pytest.mark.skip(reason=reason))
                    break

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.skipped or report.failed:
            self.outcomes[report.outcome] += 1
        if report.skipped:
            self.reasons[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1


def _tests(given: list[str]) -> list[Path]:
    found = importlib.util.find_spec("sklearn")
    assert found is not None
    roots = [Path(name) for name in given] or [Path(str(found.origin)).parents[1]]
    wanted = ("sklearn/cluster/tests/test_k_means.py", "tests/test_clustering.py")
    paths = [root / name for root in roots for name in wanted if (root / name).is_file()]
    if len(paths) < len(roots):
        sys.exit("expected checkouts of facebookresearch/faiss or scikit-learn/scikit-learn")
    return paths


def main() -> int:
    if sys.argv[1:2] and sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    os.environ |= {"SKLEARN_TESTS_GLOBAL_RANDOM_SEED": "42", "SKLEARN_RUN_FLOAT32_TESTS": "1"}
    sklearn.cluster.KMeans = OursForScikitLearn
    faiss.Kmeans = faiss.Clustering = OursForFaiss
    failed = 0
    for path in _tests(sys.argv[1:]):
        counted = Counted()
        options = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull]
        pytest.main([*options, f"--rootdir={path.parent}", str(path)], plugins=[counted])
        for reason, count in counted.reasons.most_common():
            print(f"not applicable, {count} times: {reason}")
        outcomes = counted.outcomes
        print(
            f"{path}: {outcomes['passed']} passed, {outcomes['skipped']} not applicable, "
            f"{outcomes['failed']} failed",
            flush=True,
        )
        failed += outcomes["failed"] + (not outcomes["passed"])
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
