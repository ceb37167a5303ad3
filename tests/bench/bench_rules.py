"""Seconds that every selection rule takes to find its draw over stored trajectories, through the stage's own code.

    python tests/bench/bench_rules.py --rows 1000000
    python tests/bench/bench_rules.py --rows 100000 --rules facility_location

Makes trajectories of 12 steps with all statistics and clusters in a temporary folder, then draws 11 % with each rule on a local Ray
with 2 CPUs. Prints a table, and one last line of JSON. Writing the chosen rows' text is not part of it.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.update({"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)})
os.environ.setdefault("OMP_NUM_THREADS", "1")

from s2l_ray.config import RULES, Config  # noqa: E402
from s2l_ray.core.store import Artifact, Store  # noqa: E402
from s2l_ray.stages.work import Work  # noqa: E402
from tests import synthetic  # noqa: E402
from tests.bench.frame import finish  # noqa: E402


def main() -> None:
    """Build once, draw with every rule, print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of stored trajectories")
    parser.add_argument("--steps", type=int, default=12, help="stored steps of a row, step 0 included")
    parser.add_argument("--k", type=int, default=100, help="number of clusters")
    parser.add_argument("--sources", type=int, default=14, help="number of sources")
    parser.add_argument("--rules", nargs="+", default=list(RULES), help="names of rules")
    args = parser.parse_args()
    from s2l_ray.stages import edge

    with tempfile.TemporaryDirectory() as storage:
        began = time.monotonic()
        sources = [f"source {number}" for number in range(args.sources)]
        synthetic.build(storage, args.rows, steps=args.steps, sources=sources, clusters=args.k)
        print(f"built {args.rows:,} rows in {time.monotonic() - began:.0f} s", flush=True)
        edge.connect(config_of(storage, "random"))
        draw_seconds(storage, "random")  # starts the workers, which a run has long done by then
        results = []
        for rule in args.rules:
            results.append({"rule": rule, **draw_seconds(storage, rule)})
            print(f"{rule:24} {results[-1]['rows']:>9,} rows {results[-1]['seconds']:6.2f} s", flush=True)
    total = round(sum(result["seconds"] for result in results), 2)
    print(f"{'all':24} {total:22.2f} s")
    finish("rules", rows=args.rows, steps=args.steps, total=total, results=results)


def config_of(storage: str, rule: str) -> Config:
    return Config.model_validate(
        {
            "run": {"storage": storage},
            "examples": {"files": ["none"]},
            "proxy": {"model": {"config": {"model_type": "llama"}}, "tokenizer": "bytes", "epochs": 1},
            "trajectories": {"statistics": synthetic.STATISTICS},
            "subset": {"rule": rule},
            "scaling": {"local_cpus": 2},
        }
    )


def draw_seconds(storage: str, rule: str) -> dict[str, Any]:
    """Find the draw of one rule, and time it."""
    from s2l_ray.core.selection import needs
    from s2l_ray.stages import subset

    config, store = config_of(storage, rule), Store(storage)
    stages = ["examples", "trajectories"]
    stages += ["clusters"] if needs(config.subset) & {"cluster", "distance"} else []
    inputs = {stage: Artifact(store, stage, synthetic.NAME) for stage in stages}
    manifests = {stage: artifact.manifest() for stage, artifact in inputs.items()}
    work = Work(config, Artifact(store, "subset", rule), inputs, manifests, "bench")
    began = time.monotonic()
    budget = int(0.11 * manifests["trajectories"].info["scored"])
    found = subset.find(work, subset.reading_of(work), budget)
    seconds = round(time.monotonic() - began, 2)
    return {"seconds": seconds, "rows": sum(found.rows_of_part)}


if __name__ == "__main__":
    main()
