"""Does a row cost the same on many nodes? Processor seconds of all processes of 1 to 8 hosts; and what the driver sends and receives.

    python tests/bench/bench_nodes.py --hosts 1 2 4 8            # root: hosts are Linux namespaces, see tests/cluster/hosts.py
    python tests/bench/bench_nodes.py --hosts --shards 4 12 --fan-in 3 --listed   # messages alone, on a local Ray
    python tests/bench/bench_nodes.py --hosts --shards --listed --plain 1 8 --rows 1000000 4000000   # the same rows without Ray
    python tests/bench/bench_nodes.py --hosts --shards --listed 1000 4000   # what a part costs the driver, on a local Ray

Every host runs a Ray node of one CPU; all share a folder, and one CPU control group counts what their processes use, dead ones and
the driver (a process of host 1) included. A stage is made of few rows, then of many, in one cluster: the difference over the rows between
is what a row costs once workers are up, and what is left of the first is the stage's start. Actors that score come up one after the other, so
there the time counts from when all of them have begun their first part until the first of them has ended its last one. Ray's own processes work when nobody asks them
to: that is measured for --idle seconds, and taken off in a column of its own. Where cores share what they compute with (hyperthreads, a cache),
a second makes less of a row when both are busy, which one host never does: with --core all hosts share a single one, and only the sum counts.
What that costs without Ray and hosts is measured by --plain: k-means of the same rows in so many processes at once.

Messages are counted where the driver asks (arguments pickled once, answers one by one); seconds are of its processor, in turn with a fan-in
that makes no tree. What a part costs the driver is measured for growing numbers of parts that nobody has to work on: a cost that
grows faster than they do shows.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.config import Config  # noqa: E402
from s2l_ray.core.store import Artifact, Manifest, Part, Store  # noqa: E402
from s2l_ray.stages.work import Outcome, Work, part_dict  # noqa: E402
from tests import synthetic, tiny  # noqa: E402
from tests.bench import frame  # noqa: E402
from tests.bench.bench_feed import timed  # noqa: E402
from tests.cluster.hosts import GIB, Hosts  # noqa: E402
from tests.committed import commit  # noqa: E402

COUNTERS = Path("/sys/fs/cgroup/cpuacct")
OBJECT_STORE = 100_000_000
MODEL = {**tiny.LLAMA, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
NO_TREE = 10**9
# What only people look at is off.
QUIET = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    """Measure every number of hosts, then the messages, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of hosts")
    parser.add_argument(
        "--rows", type=int, nargs=2, default=[500_000, 3_000_000], help="few and many, of clusters"
    )
    parser.add_argument("--scored", type=int, default=8_192, help="rows of trajectories")
    parser.add_argument("--stages", nargs="+", default=["clusters", "subset", "trajectories"])
    parser.add_argument("--idle", type=float, default=15.0, help="seconds for which idle hosts are watched")
    parser.add_argument("--core", type=int, help="that all hosts share; default: any")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of k-means")
    parser.add_argument(
        "--shards", type=int, nargs="*", default=[4, 12], help="shards whose messages are counted"
    )
    parser.add_argument(
        "--k", type=int, nargs="+", default=[100, 1000, 10_000], help="clusters, for messages"
    )
    parser.add_argument("--fan-in", type=int, help="of the counted tree; default: that of the product")
    parser.add_argument("--parts", type=int, nargs="+", default=[36, 360], help="parts, for messages")
    parser.add_argument(
        "--listed",
        type=int,
        nargs="*",
        default=[1000, 4000],
        help="numbers of parts that cost the driver alone",
    )
    parser.add_argument(
        "--plain",
        type=int,
        nargs="*",
        default=[],
        help="processes that do k-means of the same rows without Ray",
    )
    parser.add_argument("--drive", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        return drive(args)
    hosts = []
    everywhere = os.sched_getaffinity(0)
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})  # and all that is started from here
    with tempfile.TemporaryDirectory() as folder:
        if args.hosts:
            build(Path(folder), args)
        for count in args.hosts:
            hosts.append(on_hosts(count, Path(folder), args))
            print(json.dumps(hosts[-1]), flush=True)
    plain = [[count, plain_seconds(count, args)] for count in args.plain]
    os.sched_setaffinity(0, everywhere)
    if hosts:
        show_hosts(hosts)
    if plain:
        rows = [[count, us, us / plain[0][1]] for count, us in plain]
        frame.show("k-means without Ray", ("processes", "us of a row", "beside the first"), rows)
    if args.shards or args.listed:
        local_ray()
    messages = counted(args) if args.shards else []
    driver = [driver_costs(count) for count in args.listed]
    if driver:
        frame.show(
            "seconds of the driver by parts", list(driver[0]), [list(cost.values()) for cost in driver]
        )
    figures = {"results": hosts, "plain": plain, "messages": messages, "driver": driver}
    frame.finish("nodes", **{**vars(args), **figures})


# --------------------------------------------------------------------------------------------------------------- hosts


def build(folder: Path, args: argparse.Namespace) -> None:
    """Few and many rows of trajectories, few and many examples, and a proxy of random weights."""
    for size, rows in zip(("few", "many"), args.rows, strict=True):
        synthetic.build(f"{folder}/data/rows-{size}", rows, 65_536, 13, statistics=())
    synthetic.build(f"{folder}/data/scored", args.scored, 64, 3, statistics=())
    make_proxy(Store(f"{folder}/data/scored"))
    shutil.copytree(ROOT / "s2l_ray", folder / "data" / "code" / "s2l_ray")
    shutil.copytree(ROOT / "tests", folder / "data" / "code" / "tests")


def make_proxy(store: Store) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    artifact, files, steps = Artifact(store, "proxy", synthetic.NAME), [], [0, 1]
    for step in steps:
        torch.manual_seed(step)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**dict[str, Any](MODEL)))
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            files += [
                artifact.write_named(f"step-{step}/{path.name}", path.read_bytes())
                for path in Path(saved).iterdir()
            ]
    member = {
        "steps": steps,
        "folders": [f"step-{step}" for step in steps],
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
    commit(artifact, Outcome(files=files, info={"members": [member]}))


class Cluster:
    """A Ray node on every host, and a group of the kernel that counts their processor time."""

    def __init__(self, hosts: Hosts, group: Path) -> None:
        self.hosts, self.group = hosts, group
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = {**QUIET, **token, "PYTHONPATH": f"{hosts.shared}/data/code"}
        self.noted: list[tuple[float, float]] = []
        self.started = [self._start(number) for number in hosts.numbers]

    def seconds(self) -> float:
        """Of processor time, of all processes so far."""
        return int((self.group / "cpuacct.usage").read_text()) / 1e9

    def popen(self, number: int, argv: list[str], **options: Any) -> subprocess.Popen[str]:
        counted = ["sh", "-c", f'echo 0 > {self.group}/cgroup.procs && exec "$@"', "sh", *argv]
        return self.hosts.popen(number, counted, env=self.env, **options)

    def _start(self, number: int) -> subprocess.Popen[str]:
        head = f"{self.hosts.address(1)}:6379"
        place = ["--head", "--include-dashboard=false"] if number == 1 else [f"--address={head}"]
        size = [
            "--num-cpus=1",
            f"--memory={GIB}",
            f"--object-store-memory={OBJECT_STORE}",
            "--disable-usage-stats",
        ]
        own = f"--node-ip-address={self.hosts.address(number)}"
        argv = [sys.executable, "-m", "ray.scripts.scripts", "start", *place, own, *size, "--block"]
        with (self.hosts.disk(number) / "ray.log").open("w") as log:
            return self.popen(number, argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def watch(self, until: threading.Event) -> None:
        """Note the seconds at many times."""
        while not until.wait(0.2):
            self.noted.append((time.time(), self.seconds()))

    def seconds_at(self, moment: float) -> float:
        """What had been used at a moment (time.time), between two notes."""
        moments, seconds = np.array(self.noted).T
        return float(np.interp(moment, moments, seconds))


@contextlib.contextmanager
def counter() -> Iterator[Path]:
    """A group of the kernel that counts; its processes must have gone before it does."""
    group = COUNTERS / f"s2l-nodes-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        group.rmdir()


def on_hosts(count: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What so many hosts cost: start and idleness of a host, and of every stage its start and a row."""
    with counter() as group, Hosts(count, memory=3 * GIB) as hosts:
        os.rename(folder / "data", hosts.shared / "data")
        cluster = Cluster(hosts, group)
        options = [f"--drive={hosts.shared}/data", f"--hosts={count}", "--stages", *args.stages]
        options += [f"--rounds={args.rounds}", f"--idle={args.idle}"]
        script = f"{hosts.shared}/data/code/tests/bench/bench_nodes.py"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with cluster.popen(1, [sys.executable, script, *options], **pipes) as driver:
            ended = threading.Event()
            watcher = threading.Thread(target=cluster.watch, args=(ended,))
            watcher.start()
            try:
                marks = list(marks_of(driver, cluster))
            finally:
                ended.set()
                watcher.join()
        if driver.returncode:
            logs = "\n".join((hosts.disk(number) / "ray.log").read_text() for number in hosts.numbers)
            raise RuntimeError(f"the driver ended with status {driver.returncode}; Ray said:\n{logs}")
        os.rename(hosts.shared / "data", folder / "data")
    return {"hosts": count, **figures(count, marks, cluster)}


def marks_of(driver: subprocess.Popen[str], cluster: Cluster) -> Iterator[dict[str, Any]]:
    """What the driver says when it comes to a mark, with the time and the processor seconds until then."""
    assert driver.stdin is not None
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith("{"):
            yield {**json.loads(line), "wall": time.time(), "cpu": cluster.seconds()}
            print("on", file=driver.stdin, flush=True)


def figures(count: int, marks: list[dict[str, Any]], cluster: Cluster) -> dict[str, Any]:
    """What the marks tell: microseconds of a row, seconds of starts."""
    spans: dict[str, dict[str, float]] = {"start": {"cpu": marks[0]["cpu"]}}
    for before, after in zip(marks, marks[1:], strict=False):
        spans[after["mark"]] = {name: after[name] - before[name] for name in ("cpu", "wall")} | {
            "rows": after["rows"]
        }
    idle = spans["idle"]["cpu"] / spans["idle"]["wall"]
    result: dict[str, Any] = {
        "start of a host": spans["start"]["cpu"] / count,
        "idle of a host": idle / count,
    }
    for stage in {name.split()[0] for name in spans if name.endswith(" many")}:
        few, many = spans[f"{stage} few"], spans[f"{stage} many"]
        more = {name: many[name] - few[name] for name in many}
        row = more["cpu"] / more["rows"]
        result[stage] = {
            "row": row * 1e6,
            "row less idle": (more["cpu"] - idle * more["wall"]) / more["rows"] * 1e6,
            "start": few["cpu"] - row * few["rows"],
            "seconds": many["wall"],
        }
    for before, after in zip(marks, marks[1:], strict=False):
        if "between" in after:
            up, ended = after["between"]
            cpu, wall = cluster.seconds_at(ended) - cluster.seconds_at(up), ended - up
            result[after["mark"]] = {
                "row": cpu / after["rows"] * 1e6,
                "row less idle": (cpu - idle * wall) / after["rows"] * 1e6,
                "start": cluster.seconds_at(up) - before["cpu"],
                "seconds": wall,
            }
    return result


def drive(args: argparse.Namespace) -> None:
    """The driver, on host 1: says where it is, and waits for an answer before it goes on."""
    import ray

    while not ray.is_initialized():
        with contextlib.suppress(ConnectionError):  # the head is not up yet
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        time.sleep(0.5)
    (count,) = args.hosts
    while sum(node["Alive"] for node in ray.nodes()) < count:
        time.sleep(0.2)
    time.sleep(5)  # workers that Ray starts ahead come up
    mark("up")
    time.sleep(args.idle)
    mark("idle")
    for stage in args.stages:
        if stage == "trajectories":
            rows, between = score(f"{args.drive}/scored", count)
            mark(stage, rows, between=between)
            continue
        for size in ("warm", "few", "many"):
            mark(f"{stage} {size}", make(stage, f"{args.drive}/rows-", size, count, args.rounds))


def mark(name: str, rows: float = 0, **more: Any) -> None:
    print(json.dumps({"mark": name, "rows": rows, **more}), flush=True)
    sys.stdin.readline()


def make(stage: str, places: str, size: str, count: int, rounds: int) -> int:
    """Run a stage; returns its rows."""
    from s2l_ray.stages import clusters, edge, subset

    place = f"{places}{'few' if size == 'warm' else size}"
    config = config_of(place, k=100, rounds=rounds, shards=count)
    edge.connect(config)
    store = Store(place)
    wanted = {"clusters": ("trajectories",), "subset": ("examples", "trajectories", "clusters")}[stage]
    inputs = {name: Artifact(store, name, synthetic.NAME) for name in wanted}
    manifests = {name: artifact.manifest() for name, artifact in inputs.items()}
    made = Artifact(store, stage, f"{count}-{size}")
    module: Any = {"clusters": clusters, "subset": subset}[stage]
    module.make(Work(config, made, inputs, manifests, "bench"))
    made.delete("")
    return manifests[wanted[0]].rows


def score(place: str, count: int) -> tuple[float, tuple[float, float]]:
    """Score with an actor on every host; returns the rows done while all of them worked, and when that was."""
    from s2l_ray.stages import edge

    config = config_of(place, k=2, rounds=1, shards=count)
    edge.connect(config)
    store = Store(place)
    inputs = {name: Artifact(store, name, synthetic.NAME) for name in ("examples", "proxy")}
    manifests = {name: artifact.manifest() for name, artifact in inputs.items()}
    work = Work(config, Artifact(store, "trajectories", f"scored-{count}"), inputs, manifests, "bench")
    jobs = {part.index: {"part": part_dict(part)} for part in manifests["examples"].parts}
    parts = edge.make_parts(work, jobs, load=timed(manifests["proxy"]), actors=count)
    nodes = {part.node for part in parts}
    if len(nodes) < count:
        raise RuntimeError(f"only {len(nodes)} of {count} hosts scored: raise --scored")
    up = max(min(part.stats["began"] for part in parts if part.node == node) for node in nodes)
    ended = min(max(part.stats["ended"] for part in parts if part.node == node) for node in nodes)
    rows = 0.0
    for part in parts:
        began, done = part.stats["began"], part.stats["ended"]
        rows += part.rows * max(0.0, min(done, ended) - max(began, up)) / (done - began)
    return rows, (up, ended)


def config_of(place: str, k: int, rounds: int, shards: int) -> Config:
    training = {
        "model": {"config": MODEL},
        "tokenizer": "bytes",
        "prompt": "plain",
        "max_length": 64,
        "dtype": "fp32",
    }
    return Config.model_validate(
        {
            "run": {"storage": place},
            "examples": {"files": ["none"]},
            "proxy": {**training, "epochs": 1},
            "trajectories": {"dtype": "fp32"},
            "clusters": {"k": k, "max_rounds": rounds, "tolerance": 0.0},
            "subset": {"budget": 0.11},
            "scaling": {"shards": shards, "scorers": shards, "local_cpus": 2},
        }
    )


def show_hosts(results: list[dict[str, Any]]) -> None:
    stages = [name for name in results[0] if isinstance(results[0][name], dict)]
    for stage in stages:
        first = results[0][stage]
        columns = (
            "hosts",
            "us of a row",
            "beside 1 host",
            "less idle",
            "beside 1 host",
            "start s",
            "seconds, many",
        )
        rows = [
            [
                result["hosts"],
                (own := result[stage])["row"],
                own["row"] / first["row"],
                own["row less idle"],
                own["row less idle"] / first["row less idle"],
                own["start"],
                own["seconds"],
            ]
            for result in results
        ]
        frame.show(f"{stage}: processor time of all hosts together", columns, rows)
    rows = [[result[name] for name in ("hosts", "start of a host", "idle of a host")] for result in results]
    frame.show("a host of Ray", ("hosts", "start, processor s", "idle, processor s a second"), rows)


# ------------------------------------------------------------------------------------------------------------ messages


def local_ray() -> None:
    import ray

    os.environ |= QUIET
    ray.init(
        address="local",
        num_cpus=2,
        _memory=4 * GIB,
        object_store_memory=500_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )


def counted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the driver sends and receives in a round, with a tree and without, by shards, parts and K."""
    from s2l_ray.stages import clusters

    settings = [(shards, args.parts[0], k) for shards in args.shards for k in args.k]
    settings += [(args.shards[0], parts, args.k[0]) for parts in args.parts[1:]]
    results = []
    for shards, parts, k in settings:
        with tempfile.TemporaryDirectory() as place:
            synthetic.build(place, parts * 600, 600, 13, statistics=())
            for fan_in in (args.fan_in or clusters.FAN_IN, NO_TREE):
                clusters.FAN_IN = fan_in
                own = {"shards": shards, "parts": parts, "k": k, "fan_in": fan_in}
                results.append(own | rounds_of(place, shards, k))
                print(json.dumps(results[-1]), flush=True)
    names = (
        "shards",
        "parts",
        "k",
        "fan_in",
        "messages",
        "sent_bytes",
        "received_bytes",
        "driver_ms",
        "round_ms",
    )
    shown = [
        {**result, "fan_in": "none" if result["fan_in"] == NO_TREE else str(result["fan_in"])}
        for result in results
    ]
    frame.show("a round, seen by the driver", names, [[result[name] for name in names] for result in shown])
    return results


def rounds_of(place: str, shards: int, k: int, rounds: int = 6) -> dict[str, Any]:
    """Medians over the rounds after the first."""
    from s2l_ray.stages import clusters

    seen: list[dict[str, float]] = []
    asked = clusters._asked

    def watched(actors: list[Any], view: Any, method: str, args: tuple[Any, ...]) -> Iterator[Any]:
        of_args = len(pickle.dumps(args, protocol=5))
        began, cpu = time.perf_counter(), time.process_time()
        answers = list(asked(actors, view, method, args))
        seen.append(
            {
                "step": method == "step",
                "messages": len(answers),
                "sent_bytes": of_args,
                "began": began,
                "cpu": cpu,
                "received_bytes": sum(len(pickle.dumps(answer, protocol=5)) for answer in answers),
            }
        )
        return iter(answers)

    config = config_of(place, k, rounds, shards)
    store = Store(place)
    inputs = {"trajectories": Artifact(store, "trajectories", synthetic.NAME)}
    work = Work(
        config,
        Artifact(store, "clusters", "m"),
        inputs,
        {"trajectories": inputs["trajectories"].manifest()},
        "",
    )
    times: list[tuple[float, float]] = []
    clusters._asked = watched
    try:
        with clusters._Shards(work, [None]) as own:
            clusters.fit_group(
                own.call,
                0,
                config.clusters,
                on_round=lambda _: times.append((time.perf_counter(), time.process_time())),
            )
    finally:
        clusters._asked = asked
    steps = [call for call in seen if call["step"]][1 : len(times)]
    both = list(zip(times[1:], steps, strict=True))
    return {
        **{
            name: statistics.median(call[name] for call in steps)
            for name in ("messages", "sent_bytes", "received_bytes")
        },
        "driver_ms": statistics.median(1e3 * (ended[1] - call["cpu"]) for ended, call in both),
        "round_ms": statistics.median(1e3 * (ended[0] - call["began"]) for ended, call in both),
        "start_bytes": max(call["received_bytes"] for call in seen),
    }


# ---------------------------------------------------------------------------------------------------------------- plain


def plain_seconds(count: int, args: argparse.Namespace) -> float:
    """Processor microseconds of a row of k-means in so many processes at once, which share the rows and nothing else."""
    context = multiprocessing.get_context("spawn")
    both = []
    for rows in args.rows:
        barrier, answers = context.Barrier(count), context.SimpleQueue()
        own = [
            context.Process(target=plain_fit, args=(number, rows // count, args.rounds, barrier, answers))
            for number in range(count)
        ]
        for process in own:
            process.start()
        both.append(sum(answers.get() for _ in own))
        for process in own:
            process.join()
    return 1e6 * (both[1] - both[0]) / (args.rows[1] - args.rows[0])


def plain_fit(number: int, rows: int, rounds: int, barrier: Any, answers: Any) -> None:
    """Fit a shard of made-up trajectories, once all processes have theirs; answers with the processor's seconds."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy multiplies for the first time
    from s2l_ray.core.kmeans import Shard, fit
    from s2l_ray.core.tables import vectors

    parts = []
    for first in range(0, rows, 65_536):
        made = synthetic.part_tables(number * rows + first, min(65_536, rows - first), 13, ["s"], 100, [])[
            "trajectories"
        ]
        parts.append((made["example_id"].to_numpy(), vectors(made["losses"], "bench")[1][:, 1:]))
    start = parts[0][1][:100]
    barrier.wait()
    began = time.process_time()
    shard = Shard(parts)
    fit(
        lambda method, given: [getattr(shard, method)(*given)],
        k=100, seed=0, max_rounds=rounds, tolerance=0.0, start=start,
    )  # fmt: skip
    answers.put(time.process_time() - began)


# ---------------------------------------------------------------------------------------------------------------- parts


def driver_costs(count: int) -> dict[str, float]:
    """Seconds that so many parts take of the driver, where making one is nothing; Ray's also by this process's processor alone."""
    from s2l_ray.stages import edge

    costs: dict[str, float] = {"parts": count}

    def watch(name: str, act: Callable[[], Any]) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        result = act()
        costs[name], costs[f"{name}, processor"] = time.perf_counter() - began, time.process_time() - cpu
        return result

    with tempfile.TemporaryDirectory() as place:
        artifact = Artifact(Store(place), "trajectories", "f")
        work = Work(config_of(place, 2, 1, 1), artifact, {}, {}, "bench")
        edge.connect(work.config)
        jobs: dict[int, dict[str, Any]] = {number: {"part": {"rows": 16_384}} for number in range(count)}
        most, edge.MOST_TASKS = edge.MOST_TASKS, count // 8
        watch("make_parts, 8 a task", lambda: edge.make_parts(work, jobs, make=write_nothing))
        edge.MOST_TASKS = most
        artifact.delete("receipts")
        parts = watch("make_parts", lambda: edge.make_parts(work, jobs, make=write_nothing))
        watch("list finished", artifact.finished_parts)
        manifest = watch("commit", lambda: commit(artifact, Outcome(parts)))
        data = watch("to JSON", manifest.to_bytes)
        watch("from JSON", lambda: Manifest.from_bytes(data, "the manifest"))
        costs["MB of JSON"] = len(data) / 1e6
    watch("tasks", lambda: sum(1 for _ in edge.bounded(nothing(), [(number,) for number in range(count)])))
    return costs


def write_nothing(context: Any, job: dict[str, Any]) -> Part:
    stats = {"sources": {f"source {number}": 1170 for number in range(14)}, "examples": "0" * 64}
    part: Part = context.write(job["index"], 16_384, {"data": (".parquet", b"")}, stats)
    return part


def nothing() -> Any:
    import ray

    return ray.remote(lambda number: number)


if __name__ == "__main__":
    main()
