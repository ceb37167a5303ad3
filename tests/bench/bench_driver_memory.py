"""Memory of the driver in `clusters` and `subset` for growing numbers of rows.

    python tests/bench/bench_driver_memory.py --rows 10000 100000 1000000

Makes synthetic trajectories and the smallest examples in a temporary folder, then runs both stages on a local Ray in a fresh
process per number of rows. Prints a table, and one last line of JSON. The driver should grow with the number of parts only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.config import Config  # noqa: E402
from s2l_ray.core.store import Artifact, Store  # noqa: E402
from s2l_ray.stages.work import Work  # noqa: E402
from tests import synthetic  # noqa: E402
from tests.bench.frame import finish  # noqa: E402
from tests.committed import commit  # noqa: E402


def main() -> None:
    """Measure every number of rows in a process of its own, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of rows"
    )
    parser.add_argument("--steps", type=int, default=12, help="T, losses of a row")
    parser.add_argument("--rows-per-part", type=int, default=16_384, help="rows of a part")
    parser.add_argument("--k", type=int, default=100, help="number of clusters")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of k-means")
    parser.add_argument("--shards", type=int, default=2, help="shard actors")
    parser.add_argument("--measure", metavar="STORAGE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    results = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as storage:
            synthetic.build(storage, rows, args.rows_per_part, args.steps, statistics=())
            results.append({"rows": rows, **measured_apart(storage, rows, args)})
            print_row(results[-1], first=len(results) == 1)
    finish("driver_memory", steps=args.steps, k=args.k, results=results)


def measured_apart(storage: str, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    options = {"steps": args.steps, "k": args.k, "rounds": args.rounds, "shards": args.shards, "rows": rows}
    command = [sys.executable, __file__, "--measure", storage]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def print_row(result: dict[str, Any], first: bool) -> None:
    stages = ("clusters", "subset")
    if first:
        print(
            "      rows  parts   before MB" + "".join(f"  {s:>8} peak MB  grown MB  seconds" for s in stages)
        )
    cells = "".join(
        f"  {result[s]['peak_mb']:16.1f}  {result[s]['grown_mb']:8.1f}  {result[s]['seconds']:7.1f}"
        for s in stages
    )
    print(f"{result['rows']:>10,}  {result['parts']:>5}  {result['before_mb']:10.1f}{cells}", flush=True)


# --------------------------------------------------------------------------------------------------------- measurement


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run both stages here, and take this process's peak resident memory in each."""
    from s2l_ray.stages import clusters, edge, subset

    config = Config.model_validate(
        {
            "run": {"storage": args.measure},
            "examples": {"files": ["none"]},
            "proxy": {"model": {"config": {"model_type": "llama"}}, "tokenizer": "bytes", "epochs": 1},
            "clusters": {"k": args.k, "max_rounds": args.rounds},
            "scaling": {"shards": args.shards, "local_cpus": 2},
        }
    )
    edge.connect(config)
    store = Store(args.measure)
    names = {"examples": synthetic.NAME, "trajectories": synthetic.NAME, "clusters": "bench"}
    inputs = {stage: Artifact(store, stage, name) for stage, name in names.items()}
    manifests = {stage: inputs[stage].manifest() for stage in ("examples", "trajectories")}
    answer: dict[str, Any] = {"parts": len(manifests["examples"].parts), "before_mb": resident_mb()}
    for stage, module in (("clusters", clusters), ("subset", subset)):
        began, before = time.monotonic(), resident_mb()
        forget_peak()
        artifact = Artifact(store, stage, "bench")
        manifests[stage] = commit(artifact, module.make(Work(config, artifact, inputs, manifests, "bench")))
        peak = resident_mb("VmHWM")
        seconds = round(time.monotonic() - began, 1)
        answer[stage] = {"peak_mb": peak, "grown_mb": round(peak - before, 1), "seconds": seconds}
    assert manifests["subset"].rows == int(0.11 * args.rows[0])
    return answer


def resident_mb(field: str = "VmRSS") -> float:
    """A line of /proc/self/status in MB (10^6 bytes): VmRSS is now, VmHWM the peak; both count pages shared with Ray's store."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    raise RuntimeError(f"expected {field} in /proc/self/status: this bench needs Linux")


def forget_peak() -> None:
    """Let VmHWM begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
