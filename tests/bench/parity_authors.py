"""Quotas and objectives of the authors' selection code and ours on the same losses.

    git clone https://github.com/BigML-CS-UCLA/S2L /tmp/S2L
    python tests/bench/parity_authors.py /tmp/S2L

Runs schedules/s2l.py of that checkout as it is: only its base class, which loads data and models,
is replaced by an empty one, and calls of FAISS are recorded to get its labels. Settings are those
they ship:
100 clusters a source, 20 rounds, FAISS's 256 points a centroid, clusters of one or two rows last,
half of 262,039 rows. Losses are made up: several sources of very different size, heavy tails, a few
rows far from all others. Prints a table, and one last line of JSON; exit status 1 if any quota
differs.
"""

import argparse
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.config import RULES, Clusters  # noqa: E402
from s2l_ray.core.kmeans.process_rows import HeldRows  # noqa: E402
from s2l_ray.core.kmeans.sources import fit_source  # noqa: E402
from s2l_ray.core.query import ask_here  # noqa: E402
from s2l_ray.core.selection.quotas import quotas  # noqa: E402
from tests.bench.frame import finish  # noqa: E402

K, SMALL, STEPS = 100, 2, 12
PUBLISHED = Clusters(
    within="source", k=K, max_rounds=20, tolerance=0.0, points_per_centroid=256, seed=0
)
# rows of each source, in the proportions of a mixture such as MathInstruct; two are smaller than
# their share, and one is only a little larger than it, so that its small clusters are needed too
SHARES = (
    0.36,
    0.22,
    0.12,
    0.08,
    0.0405,
    0.05,
    0.033,
    0.03,
    0.025,
    0.02,
    0.012,
    0.008,
    0.003,
    0.0005,
)


def main() -> None:
    """Run both on three tasks, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a checkout of the authors' code")
    parser.add_argument("--rows", type=int, default=262_039, help="rows in all")
    args = parser.parse_args()
    sources, losses = made_up(args.rows)
    # some of its clusters have one or two rows, all but one of which are needed
    one = sources == "source 10"
    tasks = {
        "half of all, as shipped": (sources, losses, (args.rows + 1) // 2),
        "11 % of all": (sources, losses, int(0.11 * args.rows)),
        "all but one row of one source": (sources[one], losses[one], int(one.sum()) - 1),
    }
    results = [{"task": name, **run_task(args.checkout, *task)} for name, task in tasks.items()]
    for result in results:
        print_table(result)
    same = all(result["same_quotas"] for result in results)
    answer = {
        "rows": args.rows,
        "same_quotas": same,
        "fewer_rows_than_k": fewer_rows_than_clusters(args.checkout, losses[:960]),
        "results": results,
    }
    finish("parity_authors", **answer)
    sys.exit(0 if same else 1)


def run_task(
    checkout: Path, sources: np.ndarray, losses: np.ndarray, budget: int
) -> dict[str, Any]:
    """Run both on the same rows: rows taken of every source and cluster, and the objectives."""
    began = time.monotonic()
    theirs = run_theirs(checkout, sources, losses, budget)
    their_seconds = time.monotonic() - began
    began = time.monotonic()
    taken = our_quotas(sources, theirs, budget)
    objectives = our_objectives(sources, losses, theirs)
    our_seconds = time.monotonic() - began
    rows = [
        compared(source, sources, theirs, taken, objectives)
        for source in sorted(set(sources.tolist()))
    ]
    return {
        "budget": budget,
        "theirs": int(theirs.chosen.sum()),
        "ours": sum(row["ours"] for row in rows),
        "same_quotas": all(row["same_quotas"] for row in rows),
        "objective_ratio": round(sum(objectives.values()) / sum(theirs.objectives.values()), 4),
        "their_seconds": round(their_seconds, 1),
        "our_seconds": round(our_seconds, 1),
        "sources": rows,
    }


def made_up(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Source names [N] and losses float32 [N, T].

    Each source has its own shape of loss curves, with tails as heavy as those of real losses.
    """
    numbers = np.random.default_rng(0)
    sizes = (np.array(SHARES) / sum(SHARES) * rows).astype(int)
    sizes[0] += rows - sizes.sum()
    of_source = []
    for size in sizes:
        start = numbers.lognormal(0.3, 0.6, (size, 1))
        rate = numbers.gamma(2, numbers.uniform(0.03, 0.1), (size, 1))
        floor = start * numbers.beta(2, 5, (size, 1))
        losses = floor + (start - floor) * np.exp(-rate * np.arange(STEPS))
        losses += 0.03 * numbers.standard_t(3, (size, STEPS))
        far = numbers.choice(size, max(3, size // 2000), replace=False)
        losses[far] += numbers.lognormal(2, 0.7, (len(far), 1)) * numbers.uniform(
            0, 1, (len(far), STEPS)
        )
        of_source.append(np.abs(losses).astype(np.float32))
    names = np.repeat([f"source {number:02}" for number in range(len(sizes))], sizes)
    order = numbers.permutation(rows)
    return names[order], np.concatenate(of_source)[order]


# ------------------------------------------------------------------------------------------- theirs


class Theirs:
    """What their code chose, bool [N]; labels and objective of each source it clustered."""

    def __init__(self, chosen: np.ndarray) -> None:
        self.chosen = chosen
        self.labels: dict[str, np.ndarray] = {}
        self.objectives: dict[str, float] = {}


def their_class(checkout: Path) -> Any:
    """The class S2L of their schedules/s2l.py, with an empty base class, in one process."""
    import torch

    base = types.ModuleType("schedule_base")
    base.Schedule = type("Schedule", (), {})  # type: ignore[attr-defined]
    sys.modules["schedule_base"] = base
    torch.distributed.get_rank = lambda: 0  # type: ignore[assignment]
    module: dict[str, Any] = {"__name__": "their_schedule", "print": lambda *_: None}
    path = checkout / "schedules" / "s2l.py"
    exec(compile(path.read_text(), str(path), "exec"), module)
    return module["S2L"]


def run_theirs(checkout: Path, sources: np.ndarray, losses: np.ndarray, budget: int) -> Theirs:
    """Their initialize_labeled_data, with every k-means remembered."""
    import faiss
    import torch

    fitted: list[tuple[np.ndarray, float]] = []
    plain = faiss.Kmeans

    class Watched(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "verbose": False})

        def train(self, rows: np.ndarray, *args: Any, **options: Any) -> Any:
            answer = super().train(rows, *args, **options)
            labels = self.index.search(rows, 1)[1][:, 0]
            apart = rows.astype(np.float64) - self.centroids[labels]
            fitted.append((labels, float((apart**2).sum())))
            return answer

    schedule = their_class(checkout).__new__(their_class(checkout))
    schedule.sources, schedule.losses = sources, torch.from_numpy(losses)
    schedule.n_components, schedule.init_label_num = K, budget
    schedule.labeled_idx = torch.zeros(len(sources), dtype=torch.bool)
    # they do not seed it
    np.random.seed(0)
    faiss.Kmeans = Watched
    try:
        schedule.initialize_labeled_data()
    finally:
        faiss.Kmeans = plain
    theirs = Theirs(schedule.labeled_idx.numpy())
    for labels, objective in fitted:
        # a fit belongs to the source of its size; sizes differ
        (source,) = (
            name for name in set(sources.tolist()) if (sources == name).sum() == len(labels)
        )
        theirs.labels[source], theirs.objectives[source] = labels, objective
    return theirs


def fewer_rows_than_clusters(checkout: Path, losses: np.ndarray) -> dict[str, str]:
    """What their code does with a source where share < rows < clusters (reference bug 12)."""
    sources = np.array(["a"] * 60 + ["b"] * 900)
    try:
        run_theirs(checkout, sources, losses, 80)
        theirs = "chooses"
    except RuntimeError as error:
        theirs = f"raises {str(error).splitlines()[0][-80:]}"
    held = HeldRows([(np.arange(60), losses[:60], np.zeros(60, np.int64))])
    sizes = fit_source(ask_here(held), 0, PUBLISHED).sizes
    return {"theirs": theirs, "ours": f"takes {quotas(sizes, 40, SMALL).sum()} of 40"}


# --------------------------------------------------------------------------------------------- ours


def our_quotas(sources: np.ndarray, theirs: Theirs, budget: int) -> dict[str, np.ndarray]:
    """Rows our rule takes of each of their clusters, [K] by source.

    A source they did not cluster is one cluster.
    """
    assert RULES["s2l_within_sources"].group == "source / cluster"
    names = sorted(set(sources.tolist()))
    sizes = np.zeros((len(names), K), np.int64)
    for number, name in enumerate(names):
        labels = theirs.labels.get(name, np.zeros((sources == name).sum(), np.int64))
        sizes[number] = np.bincount(labels, minlength=K)
    parents = np.repeat(np.arange(len(names)), K)
    taken = quotas(sizes.reshape(-1), budget, SMALL, parents).reshape(sizes.shape)
    return dict(zip(names, taken, strict=True))


def our_objectives(sources: np.ndarray, losses: np.ndarray, theirs: Theirs) -> dict[str, float]:
    """Sum of squared distances of all rows of a source to our centroids."""
    found = {}
    for name in theirs.labels:
        own = np.flatnonzero(sources == name)
        held = HeldRows([(own, losses[own], np.zeros(len(own), np.int64))])
        found[name] = float(fit_source(ask_here(held), 0, PUBLISHED).objective)
    return found


def compared(
    source: str,
    sources: np.ndarray,
    theirs: Theirs,
    taken: dict[str, np.ndarray],
    objectives: dict[str, float],
) -> dict[str, Any]:
    """One source of both."""
    own = sources == source
    rows, chosen = int(own.sum()), theirs.chosen[own]
    labels = theirs.labels.get(source, np.zeros(rows, np.int64))
    sizes = np.bincount(labels, minlength=K)
    of_theirs = np.bincount(labels[chosen], minlength=K)
    ours = taken[source]
    small = sizes <= SMALL if source in theirs.labels else np.zeros(K, bool)
    # their unstable sort visits equally large clusters in another order, which may give the odd row
    # to another cluster; they draw from all small clusters together
    pairs = [
        sorted(zip(sizes[~small].tolist(), side[~small].tolist(), strict=True))
        for side in (of_theirs, ours)
    ]
    same = pairs[0] == pairs[1] and of_theirs[small].sum() == ours[small].sum()
    return {
        "source": source,
        "rows": rows,
        "theirs": int(chosen.sum()),
        "ours": int(ours.sum()),
        "clusters": int((sizes > 0).sum()),
        "small_clusters": int((small & (sizes > 0)).sum()),
        "from_small": int(of_theirs[small].sum()),
        "identical_clusters": int(((of_theirs == ours) & ~small & (sizes > 0)).sum()),
        "same_quotas": bool(same and chosen.sum() == ours.sum()),
        "their_objective": theirs.objectives.get(source),
        "our_objective": objectives.get(source),
    }


def print_table(result: dict[str, Any]) -> None:
    print(
        f"{result['task']}: {result['budget']:,} rows; "
        f"theirs {result['their_seconds']} s, ours {result['our_seconds']} s"
    )
    print(
        "source           rows   theirs     ours  clusters  small  "
        "from small  same quotas  objective ours / theirs"
    )
    for row in result["sources"]:
        ratio = (
            f"{row['our_objective'] / row['their_objective']:.4f}"
            if row["their_objective"]
            else "whole"
        )
        print(
            f"{row['source']:10} {row['rows']:>10,} {row['theirs']:>8,} {row['ours']:>8,} "
            f"{row['clusters']:>9} {row['small_clusters']:>6} {row['from_small']:>11}  "
            f"{row['same_quotas']!s:>11}  {ratio:>10}"
        )
    print(f"objective in all, ours / theirs: {result['objective_ratio']}\n")


if __name__ == "__main__":
    main()
