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

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.config import Config  # noqa: E402
from s2l_ray.core.rawfiles import original_rows  # noqa: E402
from s2l_ray.core.store import FORMAT, Artifact, Manifest, Store  # noqa: E402
from s2l_ray.core.tables import parquet_bytes, schema_text, trajectories_schema, vector_column  # noqa: E402
from s2l_ray.stages.work import Outcome, Work  # noqa: E402

COLUMNS = {"names": {"instruction": "instruction", "output": "output"}, "order": ["instruction", "output"]}


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
            build(storage, rows, args.rows_per_part, args.steps)
            results.append({"rows": rows, **measured_apart(storage, rows, args)})
            print_row(results[-1], first=len(results) == 1)
    print(json.dumps({"bench": "driver_memory", "steps": args.steps, "k": args.k, "results": results}))


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


# ------------------------------------------------------------------------------------------------------ synthetic data


def build(storage: str, rows: int, rows_per_part: int, steps: int) -> None:
    """Commit examples and trajectories of `rows` rows: losses fall from a random height, as those of real rows do."""
    made: dict[str, list[Any]] = {"examples": [], "trajectories": []}
    artifacts = {stage: Artifact(Store(storage), stage, "bench") for stage in made}
    schema = ""
    for index, first in enumerate(range(0, rows, rows_per_part)):
        count = min(rows_per_part, rows - first)
        tables = part_tables(first, count, steps)
        schema = schema_text(original_rows(tables["examples"], COLUMNS).schema)
        for stage, table in tables.items():
            files = {"data": (".parquet", parquet_bytes(table))}
            made[stage].append(artifacts[stage].write_part(index, count, files, "", "", {"columns": COLUMNS}))
    infos = {
        "examples": {"schema": schema, "columns": [COLUMNS["names"]]},
        "trajectories": {
            "scored": rows,
            "sources": {"s": rows},
            "steps": [[0, step] for step in range(steps)],
        },
    }
    for stage, parts in made.items():
        commit(artifacts[stage], Outcome(parts, info=infos[stage]))


def part_tables(first: int, count: int, steps: int) -> dict[str, pa.Table]:
    numbers = np.random.default_rng(first)
    start, rate = numbers.uniform(1, 6, (count, 1)), numbers.uniform(0, 0.3, (count, 1))
    losses = start * np.exp(-rate * np.arange(steps)) + numbers.normal(0, 0.05, (count, steps))
    ids, text = pa.array(np.arange(first, first + count)), pa.array(["a"] * count)
    everyone = np.ones(count, bool)
    columns = {
        "example_id": ids,
        "source": pa.array(["s"] * count),
        "num_tokens": pa.array(everyone.astype(np.int32)),
        "losses": vector_column(everyone, losses),
        "reason": pa.nulls(count, pa.string()),
    }
    nothing = pa.nulls(count, pa.string())
    examples = {
        "example_id": ids,
        "source": columns["source"],
        "instruction": text,
        "input": nothing,
        "output": text,
    }
    return {
        "examples": pa.table(examples),
        "trajectories": pa.table(columns, schema=trajectories_schema(steps)),
    }


def commit(artifact: Artifact, outcome: Outcome) -> Manifest:
    manifest = Manifest(
        FORMAT,
        artifact.stage,
        artifact.fingerprint,
        {},
        {},
        outcome.parts,
        outcome.files,
        outcome.info,
        0,
        "",
        "",
        {},
        {},
    )
    artifact.commit(manifest)
    return manifest


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
    inputs = {stage: Artifact(store, stage, "bench") for stage in ("examples", "trajectories", "clusters")}
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
