"""Where the seconds of the demo go, from the command to its end: start-up and work of every stage.

    python tests/bench/bench_startup.py                           this checkout
    python tests/bench/bench_startup.py --beside OTHER_CHECKOUT   and another one, in turn

Each run is the README's first command in a process and a storage of its own. Start-up is what a
stage's manifest tells: the time until its first row was worked on. Stages that are made side by
side overlap, so they add up to more than the total.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.core.storage.artifact import Artifact  # noqa: E402
from s2l_ray.core.storage.store import Store  # noqa: E402
from tests.bench import frame  # noqa: E402

STAGES = (
    "examples",
    "proxy",
    "trajectories",
    "clusters",
    "subset",
    "target",
    "evaluation",
    "report",
)


def main() -> None:
    """Run the demo --repeats times a checkout, and print medians by stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs of each checkout")
    parser.add_argument(
        "--beside", type=Path, metavar="CHECKOUT", help="another checkout to run in turn"
    )
    args, options = parser.parse_known_args()
    checkouts = {"here": ROOT} | ({"beside": args.beside.resolve()} if args.beside else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(args.repeats):
        for name, checkout in checkouts.items():
            runs[name].append(demo(checkout, options))
    rows = [
        [
            name,
            stage,
            *(
                statistics.median(run[stage][what] for run in own)
                for what in ("made", "seconds", "start-up")
            ),
        ]
        for name, own in runs.items()
        for stage in STAGES
    ]
    frame.show(
        "the demo by stage", ("checkout", "stage", "artifacts", "seconds", "of it start-up"), rows
    )
    totals = {name: [run["total"] for run in own] for name, own in runs.items()}
    for name, seconds in totals.items():
        print(f"{name}: {statistics.median(seconds):.1f} s from the command to its end")
    if args.beside:
        print(f"here / beside: {frame.ratio(totals['here'], totals['beside']):.3f}")
    frame.finish("startup", options=options, runs=runs)


def demo(checkout: Path, options: list[str]) -> dict[str, Any]:
    """One run: seconds in all, and by stage the number of artifacts made, their seconds, and their
    start-up.
    """
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "s2l_ray.run", f"--run.storage={storage}", *options]
        environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(checkout)}
        began = time.monotonic()
        subprocess.run(
            command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        total = time.monotonic() - began
        store = Store(storage)
        result: dict[str, Any] = {"total": round(total, 1)}
        for stage in STAGES:
            made = [Artifact(store, stage, name).manifest() for name in store.folders(stage)]
            result[stage] = {
                "made": len(made),
                "seconds": round(sum(manifest.seconds for manifest in made), 1),
                "start-up": round(sum(manifest.start_seconds or 0.0 for manifest in made), 1),
            }
    return result


if __name__ == "__main__":
    main()
