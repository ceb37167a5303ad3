r"""Seconds, bytes and memory of `clusters` and `subset` on shards that cannot hold their rows.

    python tests/bench/bench_out_of_core.py --rows 1000000 10000000
    # about 8 GB of temporary disk, and 5 minutes to fill it
    python tests/bench/bench_out_of_core.py --rows 100000000
    # rows are held
    python tests/bench/bench_out_of_core.py --rows 10000 1000000 \
        --shard-memory 1000000000000 --limit 4000000000
    # of clusters that were made with the rows
    python tests/bench/bench_out_of_core.py --rows 10000000 --stages subset

Writes committed trajectories of N x 12 into a temporary storage, and runs both stages on a local
Ray in a fresh process per N. The kernel holds every shard actor to --limit bytes of private memory:
RLIMIT_DATA is set inside the actor to its data segment after it has read one part, plus the limit,
less what it holds privately by then. An actor that exceeds it gets a MemoryError, and the bench
fails. A restarted actor would have no limit, so none may restart. Seconds are those of rounds after
the first.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.config import Config  # noqa: E402
from s2l_ray.contract.stage import Request  # noqa: E402
from s2l_ray.contract.work import Work  # noqa: E402
from s2l_ray.core.kmeans.queries import LloydStep  # noqa: E402
from s2l_ray.core.storage.artifact import Artifact  # noqa: E402
from s2l_ray.core.storage.store import Store  # noqa: E402
from tests import synthetic  # noqa: E402
from tests.bench import frame  # noqa: E402


def main() -> None:
    """Measure every number of rows in a process of its own, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="numbers of rows"
    )
    parser.add_argument("--steps", type=int, default=12, help="T, losses of a row after step 0")
    parser.add_argument("--rows-per-part", type=int, default=131_072, help="rows of a part")
    parser.add_argument("--k", type=int, default=100, help="number of clusters")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of k-means")
    parser.add_argument("--shards", type=int, default=2, help="shard actors")
    parser.add_argument(
        "--limit", type=int, default=512_000_000, help="bytes of private memory of a shard actor"
    )
    parser.add_argument(
        "--shard-memory", type=int, default=1, help="scaling.clusters.memory; 1: all sizes stream"
    )
    parser.add_argument(
        "--storage",
        metavar="FOLDER",
        help="keep what is built there for another run; default: a temporary one",
    )
    parser.add_argument(
        "--stages", nargs="+", default=["clusters", "subset"], choices=["clusters", "subset"]
    )
    parser.add_argument("--measure", metavar="STORAGE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    results = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as made:
            storage = f"{args.storage}/{rows}" if args.storage else made
            if not Path(storage, "clusters", synthetic.NAME, "manifest.json").exists():
                began = time.monotonic()
                synthetic.build(storage, rows, args.rows_per_part, args.steps + 1, statistics=())
                print(f"built {rows:,} rows in {time.monotonic() - began:.0f} s", flush=True)
            for stage in args.stages:
                Store(storage).delete(f"{stage}/bench")
            results.append({"rows": rows, **measured_apart(storage, rows, args)})
    columns = (
        "rows",
        "round s",
        "read MB a round",
        "actor MB",
        "driver MB",
        "clusters s",
        "subset s",
        "subset driver MB",
    )
    frame.show(
        "out of core",
        columns,
        [[result.get(column, "") for column in columns] for result in results],
    )
    first, last = results[0], results[-1]
    exponent = None
    if len(results) > 1 and "clusters" in args.stages:
        exponent = math.log(last["round s"] / first["round s"]) / math.log(
            last["rows"] / first["rows"]
        )
        print(f"seconds of a round grow as N^{exponent:.3f}")
    frame.finish("out_of_core", **{**vars(args), "exponent": exponent, "results": results})


def measured_apart(storage: str, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "k", "rounds", "shards", "limit", "shard_memory")
    command = [sys.executable, __file__, "--measure", storage, f"--rows={rows}"]
    command += [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    command += ["--stages", *args.stages]
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "RAY_ADDRESS": "local",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# -------------------------------------------------------------------------------------- measurement


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run both stages here, watched."""
    from s2l_ray.edge import session
    from s2l_ray.stages.clusters import make as clusters
    from s2l_ray.stages.subset import make as subset

    config = Config.model_validate(
        {
            "run": {"storage": args.measure},
            "examples": {"files": ["none"]},
            "proxy": {
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": "bytes",
                "epochs": 1,
            },
            "clusters": {"k": args.k, "max_rounds": args.rounds, "tolerance": 0.0},
            "scaling": {"local_cpus": 2, "clusters": {"memory": args.shard_memory}},
        }
    )
    session.connect(config.scaling)
    store = Store(args.measure)
    names = {stage: synthetic.NAME for stage in ("examples", "trajectories", "clusters")}
    if "clusters" in args.stages:
        names["clusters"] = "bench"
    inputs = {stage: Artifact(store, stage, name) for stage, name in names.items()}
    manifests = {
        stage: inputs[stage].manifest() for stage in names if names[stage] == synthetic.NAME
    }
    watched = Watched(args.limit)
    clusters.ShardActors = watched.shards(clusters.ShardActors)
    answer: dict[str, Any] = {}
    for stage in args.stages:
        module, prefix = (clusters, "") if stage == "clusters" else (subset, "subset ")
        began = time.monotonic()
        forget_peak()
        artifact = Artifact(store, stage, "bench")
        request = Request("actors", args.shards, all_at_once=True)
        work = Work(config, artifact, inputs, manifests, "bench", request=request)
        manifests[stage] = synthetic.commit(artifact, module.make(work))
        answer[f"{stage} s"] = round(time.monotonic() - began, 1)
        answer[f"{prefix}driver MB"] = resident_mb("VmHWM")
    if "subset" in args.stages:
        assert manifests["subset"].rows == int(0.11 * args.rows[0])
    return {**answer, **watched.figures()} if "clusters" in args.stages else answer


class Watched:
    """Limits the shard actors, and notes seconds and bytes of every round."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seconds: list[float] = []
        self.bytes: list[float] = []
        self.actors: list[dict[str, float]] = []

    def shards(self, kind: Any) -> Any:
        watched = self

        class Shards(kind):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.before = self.call(hold_to, watched.limit)

            def call(self, function: Any, *args: Any) -> list[Any]:
                import ray

                return ray.get(
                    [actor.__ray_call__.remote(function, *args) for actor in self.actors]
                )

            def ask(self, query: Any) -> Any:
                read, began = sum(self.call(bytes_read)), time.monotonic()
                answer = super().ask(query)
                if isinstance(query.query, LloydStep):
                    watched.seconds.append(time.monotonic() - began)
                    watched.bytes.append(sum(self.call(bytes_read)) - read)
                return answer

            def __exit__(self, *error: object) -> None:
                if error[0] is None:
                    watched.actors = self.call(memory)
                    now, before = (
                        [own["pid"] for own in some] for some in (watched.actors, self.before)
                    )
                    assert now == before, (
                        "a shard actor was restarted, and its memory not limited from then on"
                    )
                super().__exit__(*error)

        return Shards

    def figures(self) -> dict[str, Any]:
        return {
            "round s": statistics.median(self.seconds[1:]),
            "read MB a round": statistics.median(self.bytes[1:]) / 1e6,
            "actor MB": max(own["peak_mb"] for own in self.actors),
            "rounds": self.seconds,
            "actors": self.actors,
        }


def hold_to(actor: Any, limit: int) -> dict[str, float]:
    """Let this process have no more than `limit` bytes of private memory.

    Arrow's allocator reserves a gigabyte of addresses at its first use and touches few of them, so
    it is used before.
    """
    actor._read(actor.parts[0])
    free = limit - private_bytes()
    data = int(resident_mb("VmData") * 1e6)
    resource.setrlimit(resource.RLIMIT_DATA, (data + free, data + free))
    return memory(actor)


def memory(actor: Any) -> dict[str, float]:
    private = round(private_bytes() / 1e6, 1)
    return {
        "pid": os.getpid(),
        "peak_mb": resident_mb("VmHWM"),
        "private_mb": private,
        "data_mb": resident_mb("VmData"),
    }


def resident_mb(field: str = "VmRSS") -> float:
    """A line of /proc/self/status in MB (10^6 bytes): VmRSS is the current size, VmHWM the peak.

    Both count pages shared with Ray's store.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    raise RuntimeError(f"expected {field} in /proc/self/status: this bench needs Linux")


def forget_peak() -> None:
    """Let VmHWM begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def bytes_read(actor: Any) -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


if __name__ == "__main__":
    main()
