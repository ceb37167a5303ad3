"""Processor seconds of a row on 1 to 8 hosts, and what the driver sends and receives.

    # needs root: hosts are Linux namespaces, see tests/cluster/hosts.py
    python tests/bench/bench_nodes.py --hosts 1 2 4 8
    # messages alone, on a local Ray
    python tests/bench/bench_nodes.py --hosts --shards 4 12 --fan-in 3 --listed
    # the same rows without Ray
    python tests/bench/bench_nodes.py --hosts --shards --listed --plain 1 8 --stages clusters
    # what a part costs the driver, on a local Ray
    python tests/bench/bench_nodes.py --hosts --shards --listed 1000 4000

Every host runs a Ray node of one CPU and all share a folder. One CPU control group counts what
their processes use, including processes that have ended and the driver (a process of host 1). The
bench reads the use of each kind of process ten times a second. The use of workers depends on rows.
Ray's own processes use some time every second, also when idle: this is measured for --idle seconds
and subtracted in rows of their own. A stage is made of few rows, then of many, in one cluster. Time
counts from when the stage reports that it works on rows (workers are up), and the cost of a row is
the difference of the times / the difference of the rows. Actors that score start one after the
other, so there the time counts from when all of them have ended their first part until the first of
them has ended its last one.

Hosts share the machine's cores, which real ones do not, and one host alone shares nothing. A
process that gets a core back finds its caches full of another's data, which takes some 0.4 ms each
time; so turns are longer here than by default (--slice). Where cores share hardware (hyperthreads,
a cache), each computes less in a second when both are busy: with --core all hosts share a single
core, and only the sum counts. --plain measures what is left of that effect: the work of the
clusters actors on the same rows, in as many processes at once without Ray.

Messages are counted where the driver asks (arguments pickled once, answers one by one). Seconds are
of its processor, in turn with a fan-in that makes no tree. What a part costs the driver is measured
for growing numbers of parts without work, which shows a cost that grows faster than their number.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import platform
import secrets
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.config import Config  # noqa: E402
from s2l_ray.contract.stage import Request  # noqa: E402
from s2l_ray.contract.work import Outcome, Work  # noqa: E402
from s2l_ray.core.storage.artifact import Artifact  # noqa: E402
from s2l_ray.core.storage.info import ProxyInfo, ProxyMember  # noqa: E402
from s2l_ray.core.storage.manifest import Manifest, Part  # noqa: E402
from s2l_ray.core.storage.records import to_json  # noqa: E402
from s2l_ray.core.storage.store import Store  # noqa: E402
from tests import synthetic, tiny  # noqa: E402
from tests.bench import frame  # noqa: E402
from tests.bench.bench_feed import timed  # noqa: E402
from tests.cluster.hosts import GIB, Hosts  # noqa: E402
from tests.committed import commit, info_with  # noqa: E402

COUNTERS = Path("/sys/fs/cgroup/cpuacct")
# holds all keys of subset on one host
OBJECT_STORE = 300_000_000
MODEL = {**tiny.LLAMA, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
NO_TREE = 10**9
# Words of a command line that identify the kind of a process; the first match counts.
TITLES = {
    "raylets": "raylet/raylet",
    "gcs": "gcs_server",
    "agents": "Agent",
    "idle workers": "ray::IDLE",
    "workers": "ray::",
    "driver": "--drive",
}
# Processor seconds of all processes, by kind, and of workers in the kernel; and pages that workers
# touched first. What a process spends between its last reading and its end counts only in the sum.
SPENT = ("all", *TITLES, "others", "workers, system", "workers, pages")
TICKS = os.sysconf("SC_CLK_TCK")
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
    parser.add_argument(
        "--hosts", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of hosts"
    )
    parser.add_argument(
        "--rows", type=int, nargs=2, default=[500_000, 3_000_000], help="few and many, of clusters"
    )
    parser.add_argument("--scored", type=int, default=8_192, help="rows of trajectories")
    parser.add_argument("--stages", nargs="+", default=["clusters", "subset", "trajectories"])
    parser.add_argument(
        "--idle", type=float, default=15.0, help="seconds for which idle hosts are watched"
    )
    parser.add_argument(
        "--slice", type=float, default=30.0, help="milliseconds; see above; 0: the kernel's own"
    )
    parser.add_argument("--core", type=int, help="that all hosts share; default: any")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of k-means")
    parser.add_argument(
        "--shards", type=int, nargs="*", default=[4, 12], help="shards whose messages are counted"
    )
    parser.add_argument(
        "--k", type=int, nargs="+", default=[100, 1000, 10_000], help="clusters, for messages"
    )
    parser.add_argument(
        "--fan-in", type=int, help="of the counted tree; default: that of the product"
    )
    parser.add_argument(
        "--parts", type=int, nargs="+", default=[36, 360], help="parts, for messages"
    )
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
        help="processes that do what clusters does of the same rows, without Ray",
    )
    parser.add_argument("--drive", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        return drive(args)
    hosts, without = [], []
    everywhere = os.sched_getaffinity(0)
    if args.core is not None:
        # and all that is started from here
        os.sched_setaffinity(0, {args.core})
    if args.slice:
        set_slice(args.slice)
    with tempfile.TemporaryDirectory() as folder:
        if args.hosts or args.plain:
            build(Path(folder), args)
        for count in args.hosts:
            hosts.append(on_hosts(count, Path(folder), args))
            print(json.dumps(hosts[-1]), flush=True)
        for count in args.plain:
            without.append(plain(count, Path(folder), args))
    os.sched_setaffinity(0, everywhere)
    if hosts:
        show_hosts(hosts)
    if without:
        rows = [[*own.values(), own["all"] / without[0]["all"]] for own in without]
        frame.show("clusters without Ray: us of a row", [*without[0], "beside the first"], rows)
    if args.shards or args.listed:
        local_ray()
    messages = counted(args) if args.shards else []
    driver = [driver_costs(count) for count in args.listed]
    if driver:
        frame.show(
            "seconds of the driver by parts",
            list(driver[0]),
            [list(cost.values()) for cost in driver],
        )
    figures = {"results": hosts, "plain": without, "messages": messages, "driver": driver}
    frame.finish("nodes", **{**vars(args), **figures})


# -------------------------------------------------------------------------------------------- hosts


def build(folder: Path, args: argparse.Namespace) -> None:
    """Few and many rows of trajectories, few and many examples, and a proxy of random weights."""
    for size, rows in zip(("few", "many"), args.rows, strict=True):
        synthetic.build(f"{folder}/data/rows-{size}", rows, 65_536, 13, statistics=())
    if "trajectories" in args.stages:
        synthetic.build(f"{folder}/data/scored", args.scored, 64, 3, statistics=())
        make_proxy(Store(f"{folder}/data/scored"))
    shutil.copytree(ROOT / "s2l_ray", folder / "data" / "code" / "s2l_ray")
    shutil.copytree(ROOT / "tests", folder / "data" / "code" / "tests")


def set_slice(milliseconds: float) -> None:
    """Set the time slice of this process and of those it starts (Linux 6.12 or later)."""
    attributes = struct.pack("IIQiIQQQ", 48, 0, 0, 0, 0, int(milliseconds * 1e6), 0, 0)
    set_attributes = {"x86_64": 314, "aarch64": 274}[platform.machine()]
    if ctypes.CDLL(None, use_errno=True).syscall(set_attributes, 0, attributes, 0):
        raise OSError(ctypes.get_errno(), "sched_setattr")


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
    member = info_with(
        ProxyMember,
        steps=steps,
        folders=[f"step-{step}" for step in steps],
        parameters=sum(weight.numel() for weight in model.parameters()),
    )
    commit(artifact, Outcome(files=files, info=info_with(ProxyInfo, members=[member])))


class Cluster:
    """A Ray node on every host, and a group of the kernel that counts their processor time."""

    def __init__(self, hosts: Hosts, group: Path) -> None:
        self.hosts, self.group = hosts, group
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = {**QUIET, **token, "PYTHONPATH": f"{hosts.shared}/data/code"}
        self.noted: list[tuple[float, np.ndarray]] = []
        self._kinds: dict[str, str] = {}
        self._seen: dict[str, np.ndarray] = {}
        self._spent = np.zeros(len(SPENT))
        self.started = [self._start(number) for number in hosts.numbers]

    def note(self) -> None:
        """Note what all processes have spent so far, in the order of SPENT."""
        for pid in (self.group / "cgroup.procs").read_text().split():
            # it has just ended
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self._add(pid, Path("/proc", pid))
        self._spent[0] = int((self.group / "cpuacct.usage").read_text()) / 1e9
        self.noted.append((time.time(), self._spent.copy()))

    def _add(self, pid: str, process: Path) -> None:
        """Add what a process has spent since it was last read.

        A process that has worked once counts as a worker from then on, idle or not.
        """
        title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        if self._kinds.get(pid) != "workers":
            self._kinds[pid] = next(
                (kind for kind, mark in TITLES.items() if mark in title), "others"
            )
        now = np.array([int(fields[11]) / TICKS, int(fields[12]) / TICKS, float(fields[7])])
        user, system, pages = now - self._seen.get(pid, 0.0)
        self._seen[pid] = now
        self._spent[SPENT.index(self._kinds[pid])] += user + system
        if self._kinds[pid] == "workers":
            self._spent[-2:] += system, pages

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
            return self.popen(
                number, argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def watch(self, until: threading.Event) -> None:
        """Note at many times."""
        while not until.wait(0.1):
            self.note()

    def spent_at(self, moment: float) -> np.ndarray:
        """What had been spent at a moment (time.time), between two notes."""
        moments, spent = (
            np.array([at for at, _ in self.noted]),
            np.array([own for _, own in self.noted]),
        )
        return np.array([np.interp(moment, moments, column) for column in spent.T])


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
    """What `count` hosts cost: start and idle time of a host; start and a row of every stage."""
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
                marks = list(marks_of(driver))
            finally:
                ended.set()
                watcher.join()
        if driver.returncode:
            logs = "\n".join(
                (hosts.disk(number) / "ray.log").read_text() for number in hosts.numbers
            )
            raise RuntimeError(
                f"the driver ended with status {driver.returncode}; Ray said:\n{logs}"
            )
        os.rename(hosts.shared / "data", folder / "data")
    return {"hosts": count, **figures(count, marks, cluster)}


def marks_of(driver: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What the driver says when it comes to a mark, with the time."""
    assert driver.stdin is not None
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith("{"):
            yield {"at": time.time(), **json.loads(line)}
            # so that it is noted
            time.sleep(0.3)
            print("on", file=driver.stdin, flush=True)


@dataclass(frozen=True)
class Span:
    """What was spent in some seconds for some rows, and in the start before."""

    spent: np.ndarray
    seconds: float
    rows: float
    start: float

    def __sub__(self, other: "Span") -> "Span":
        return Span(
            self.spent - other.spent,
            self.seconds - other.seconds,
            self.rows - other.rows,
            self.start,
        )


def figures(count: int, marks: list[dict[str, Any]], cluster: Cluster) -> dict[str, Any]:
    """Results from the marks: microseconds of a row, seconds of starts."""

    def span(after: dict[str, Any], before: float) -> Span:
        began, ended = after["between"]
        start, end = cluster.spent_at(began), cluster.spent_at(ended)
        return Span(
            end - start, ended - began, after["rows"], (start - cluster.spent_at(before))[0]
        )

    spans = {
        after["mark"]: span(after, before["at"]) for before, after in itertools.pairwise(marks)
    }
    idle = spans["idle"].spent / spans["idle"].seconds
    result: dict[str, Any] = {
        "start of a host": cluster.spent_at(marks[0]["at"])[0] / count,
        "idle of a host": named(idle / count),
    }
    for name, many in spans.items():
        stage, _, size = name.partition(" ")
        if size == "many":
            more = many - spans[f"{stage} few"] if f"{stage} few" in spans else many
            result[stage] = {
                "row": named(more.spent / more.rows * 1e6),
                "row less idle": named((more.spent - idle * more.seconds) / more.rows * 1e6),
                "start": many.start,
                "seconds": many.seconds,
            }
    return result


def named(spent: np.ndarray) -> dict[str, float]:
    return dict(zip(SPENT, spent.tolist(), strict=True))


def drive(args: argparse.Namespace) -> None:
    """The driver, on host 1: says where it is, and waits for an answer before it goes on."""
    import ray

    while not ray.is_initialized():
        # the head is not up yet
        with contextlib.suppress(ConnectionError):
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        time.sleep(0.5)
    (count,) = args.hosts
    while sum(node["Alive"] for node in ray.nodes()) < count:
        time.sleep(0.2)
    # workers that Ray starts ahead come up
    time.sleep(5)
    began = time.time()
    mark("up")
    time.sleep(args.idle)
    mark("idle", 0, (began, time.time()))
    for stage in args.stages:
        if stage == "trajectories":
            mark(f"{stage} many", *score(f"{args.drive}/scored", count))
            continue
        for size in ("warm", "few", "many"):
            mark(f"{stage} {size}", *make(stage, f"{args.drive}/rows-", size, count, args.rounds))


def mark(name: str, rows: float = 0, between: tuple[float, float] = (0, 0)) -> None:
    print(json.dumps({"mark": name, "rows": rows, "between": between}), flush=True)
    sys.stdin.readline()


def make(
    stage: str, places: str, size: str, count: int, rounds: int
) -> tuple[int, tuple[float, float]]:
    """Run a stage; returns its rows, and from when until when it worked on them."""
    from s2l_ray.edge import session
    from s2l_ray.stages.clusters import make as clusters
    from s2l_ray.stages.subset import make as subset

    work = work_of(stage, f"{places}{'few' if size == 'warm' else size}", count, size, rounds)
    session.connect(work.config.scaling)
    module: Any = {"clusters": clusters, "subset": subset}[stage]
    module.make(work)
    ended = time.time()
    work.artifact.delete("")
    assert work.began is not None
    return work.manifests["trajectories"].rows, (work.began, ended)


def work_of(stage: str, place: str, count: int, name: str, rounds: int) -> Work:
    wanted = {"clusters": ["trajectories"], "subset": ["examples", "trajectories", "clusters"]}[
        stage
    ]
    inputs = {name: Artifact(Store(place), name, synthetic.NAME) for name in wanted}
    manifests = {name: artifact.manifest() for name, artifact in inputs.items()}
    config = config_of(place, k=100, rounds=rounds, shards=count)
    return Work(
        config,
        Artifact(Store(place), stage, f"{count}-{name}"),
        inputs,
        manifests,
        "bench",
        request=Request("actors", count, all_at_once=True),
    )


def score(place: str, count: int) -> tuple[float, tuple[float, float]]:
    """Score with an actor on every host.

    Returns the rows done while all of them worked, and when that was.
    """
    from s2l_ray.edge import parts, session

    config = config_of(place, k=2, rounds=1, shards=count)
    session.connect(config.scaling)
    store = Store(place)
    inputs = {name: Artifact(store, name, synthetic.NAME) for name in ("examples", "proxy")}
    manifests = {name: artifact.manifest() for name, artifact in inputs.items()}
    work = Work(
        config,
        Artifact(store, "trajectories", f"scored-{count}"),
        inputs,
        manifests,
        "bench",
        request=Request("actors", count),
    )
    jobs = {part.index: {"part": to_json(part.for_reading)} for part in manifests["examples"].parts}
    made = parts.parts_by_actors(work, jobs, timed(manifests["proxy"]))
    nodes = {part.node for part in made}
    if len(nodes) < count:
        raise RuntimeError(f"only {len(nodes)} of {count} hosts scored: raise --scored")
    # the first part of an actor includes what a process does only once (first calls of kernels,
    # pages), so it belongs to the actor's start
    up = max(min(part.stats["ended"] for part in made if part.node == node) for node in nodes)
    ended = min(max(part.stats["ended"] for part in made if part.node == node) for node in nodes)
    rows = 0.0
    for part in made:
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
            "scaling": {"local_cpus": 2},
        }
    )


def show_hosts(results: list[dict[str, Any]]) -> None:
    for stage in [
        name for name, own in results[0].items() if isinstance(own, dict) and "row" in own
    ]:
        columns, rows = ["hosts", *(str(result["hosts"]) for result in results)], []
        for what in ("row", "row less idle"):
            all_own = [result[stage][what] for result in results]
            for kind in SPENT if what == "row" else ("all", "workers"):
                rows.append([f"{what}: {kind}", *(own[kind] for own in all_own)])
            for kind in ("all", "workers"):
                first = all_own[0][kind]
                rows.append(
                    [f"{what}: {kind}, beside the first", *(own[kind] / first for own in all_own)]
                )
        for name in ("start", "seconds"):
            rows.append([f"{name}, s", *(result[stage][name] for result in results)])
        frame.show(f"{stage}: processor us of a row, of all hosts together", columns, rows)
    rows = [
        ["a second idle: " + kind, *(result["idle of a host"][kind] for result in results)]
        for kind in SPENT[:-2]
    ]
    rows.insert(0, ["start", *(result["start of a host"] for result in results)])
    frame.show("a host of Ray: processor s", columns, rows)


# ----------------------------------------------------------------------------------------- messages


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
    """What the driver sends and receives in a round, with and without a tree."""
    from s2l_ray.edge import reduction

    settings = [(shards, args.parts[0], k) for shards in args.shards for k in args.k]
    settings += [(args.shards[0], parts, args.k[0]) for parts in args.parts[1:]]
    results = []
    for shards, parts, k in settings:
        with tempfile.TemporaryDirectory() as place:
            synthetic.build(place, parts * 600, 600, 13, statistics=())
            for fan_in in (args.fan_in or reduction.FAN_IN, NO_TREE):
                reduction.FAN_IN = fan_in
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
    frame.show(
        "a round, seen by the driver", names, [[result[name] for name in names] for result in shown]
    )
    return results


def rounds_of(place: str, shards: int, k: int, rounds: int = 6) -> dict[str, Any]:
    """Medians over the rounds after the first."""
    from s2l_ray.core.kmeans.process_rows import InView
    from s2l_ray.core.kmeans.queries import LloydStep
    from s2l_ray.core.kmeans.sources import fit_source
    from s2l_ray.stages.clusters.shards import ShardActors

    seen: list[dict[str, Any]] = []

    class Noting(InView[Any]):
        """A query that notes the answers that the driver itself merges."""

        def merge(self, answers: Iterable[Any]) -> Any:
            came = list(answers)
            seen[-1] |= {
                "messages": len(came),
                "received_bytes": sum(len(pickle.dumps(answer, protocol=5)) for answer in came),
            }
            return super().merge(came)

        def __reduce__(self) -> Any:
            # Elsewhere it is the plain query.
            return InView, (self.view, self.query)

    def ask(query: InView[Any]) -> Any:
        size = len(pickle.dumps(query, protocol=5))
        step = isinstance(query.query, LloydStep)
        began, cpu = time.perf_counter(), time.process_time()
        seen.append({"step": step, "sent_bytes": size, "began": began, "cpu": cpu})
        return own.ask(Noting(query.view, query.query))

    config = config_of(place, k, rounds, shards)
    store = Store(place)
    inputs = {"trajectories": Artifact(store, "trajectories", synthetic.NAME)}
    work = Work(
        config,
        Artifact(store, "clusters", "m"),
        inputs,
        {"trajectories": inputs["trajectories"].manifest()},
        "",
        request=Request("actors", shards, all_at_once=True),
    )
    times: list[tuple[float, float]] = []
    with ShardActors(work, [None]) as own:
        fit_source(
            ask,
            0,
            config.clusters,
            on_round=lambda _: times.append((time.perf_counter(), time.process_time())),
        )
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


# -------------------------------------------------------------------------------------------- plain


class Plain:
    """The shard actors of clusters as processes without Ray and without a tree.

    Counts processor seconds by what is asked.
    """

    def __init__(self, work: Work, count: int) -> None:
        from s2l_ray.edge.parts import part_context

        context, made = (
            multiprocessing.get_context("spawn"),
            [part.for_reading for part in work.manifests["trajectories"].parts],
        )
        steps = work.manifests["trajectories"].info["steps"]
        self.parts = [made[number::count] for number in range(count)]
        self.seconds: Counter[str] = Counter()
        self.pipes, self.processes = [], []
        for mine in self.parts:
            pipe, other = context.Pipe()
            self.pipes.append(pipe)
            self.processes.append(
                context.Process(
                    target=plain_actor, args=(other, part_context(work), mine, [None], steps)
                )
            )
            self.processes[-1].start()

    def ask(self, query: Any) -> Any:
        """See ShardActors.ask."""
        name = type(query.query).__name__
        return query.merge(self.call(name, "answer", [(query,)] * len(self.pipes)))

    def call(self, name: str, method: str, args: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Have all processes call a method of theirs at once; seconds are counted by the name."""
        for pipe, own in zip(self.pipes, args, strict=True):
            pipe.send((method, own))
        for pipe in self.pipes:
            answer, seconds = pipe.recv()
            self.seconds[name] += seconds
            yield answer

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(("", ()))
            process.join()


def plain_actor(pipe: Any, *args: Any) -> None:
    """Answer with what a shard actor does, and the processor seconds that it took."""
    # before numpy multiplies for the first time
    os.environ["OMP_NUM_THREADS"] = "1"
    from s2l_ray.stages.clusters.shards import ShardActor

    actor = ShardActor.__ray_metadata__.modified_class(*args)  # type: ignore[attr-defined]
    while (call := pipe.recv())[0]:
        began = time.process_time()
        answer = getattr(actor, call[0])(*call[1])
        pipe.send((answer, time.process_time() - began))


def plain(count: int, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Processor microseconds of a row of clusters in so many processes, by what they do."""
    few, many = (
        plain_seconds(count, f"{folder}/data/rows-{size}", args.rounds) for size in ("few", "many")
    )
    of_row = {name: 1e6 * (many[name] - few[name]) / (args.rows[1] - args.rows[0]) for name in many}
    return {"processes": count, "all": sum(of_row.values()), **of_row}


def plain_seconds(count: int, place: str, rounds: int) -> Counter[str]:
    """What clusters.make has its actors do; they read when first asked, for the summary."""
    from s2l_ray.core.kmeans.process_rows import View, in_view
    from s2l_ray.core.kmeans.queries import SquaredDeviations
    from s2l_ray.core.kmeans.sources import fit_source

    work = work_of("clusters", place, count, "plain", rounds)
    shards = Plain(work, count)
    found = fit_source(shards.ask, 0, work.config.clusters)
    in_view(shards.ask, View(0))(SquaredDeviations(found.centroids))
    list(
        shards.call(
            "write", "write", [(range(len(mine)), [found.centroids]) for mine in shards.parts]
        )
    )
    shards.end()
    work.artifact.delete("")
    return shards.seconds


# -------------------------------------------------------------------------------------------- parts


def driver_costs(count: int) -> dict[str, float]:
    """Seconds that `count` parts without work take of the driver.

    Ray's are also given by this process's processor alone.
    """
    from s2l_ray.edge import parts, session, tasks

    costs: dict[str, float] = {"parts": count}

    def watch(name: str, act: Callable[[], Any]) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        result = act()
        costs[name], costs[f"{name}, processor"] = (
            time.perf_counter() - began,
            time.process_time() - cpu,
        )
        return result

    with tempfile.TemporaryDirectory() as place:
        artifact = Artifact(Store(place), "trajectories", "f")
        work = Work(config_of(place, 2, 1, 1), artifact, {}, {}, "bench")
        session.connect(work.config.scaling)
        jobs: dict[int, dict[str, Any]] = {
            number: {"part": {"rows": 16_384}} for number in range(count)
        }
        most, parts.MOST_TASKS = parts.MOST_TASKS, count // 8
        watch("parts, 8 a task", lambda: parts.parts_by_tasks(work, jobs, write_nothing))
        parts.MOST_TASKS = most
        artifact.delete("receipts")
        made = watch("parts", lambda: parts.parts_by_tasks(work, jobs, write_nothing))
        watch("list finished", artifact.finished_parts)
        manifest = watch("commit", lambda: commit(artifact, Outcome(made)))
        data = watch("to JSON", manifest.to_bytes)
        watch("from JSON", lambda: Manifest.from_bytes(data, "the manifest"))
        costs["MB of JSON"] = len(data) / 1e6
    watch(
        "tasks",
        lambda: sum(1 for _ in tasks.bounded(nothing(), [(number,) for number in range(count)])),
    )
    return costs


def write_nothing(context: Any, jobs: list[dict[str, Any]]) -> Iterator[Part]:
    stats = {"sources": {f"source {number}": 1170 for number in range(14)}, "examples": "0" * 64}
    for job in jobs:
        yield context.write(job["index"], 16_384, {"data": (".parquet", b"")}, stats)


def nothing() -> Any:
    import ray

    return ray.remote(lambda number: number)


if __name__ == "__main__":
    main()
