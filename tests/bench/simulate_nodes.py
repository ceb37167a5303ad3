"""How long 10^9 examples take on 16, 64 and 256 nodes, and what limits each stage.

    python tests/bench/bench_out_of_core.py --rows 262144 1048576 262144 1048576 10000000 > LOG
    python tests/bench/simulate_nodes.py --check LOG
    python tests/bench/simulate_nodes.py --nodes 16 64 256

The model. A stage takes its start, then the longest of what goes on at once, then what only the
driver does:

    seconds = start + max(cores, storage of the busiest node, storage of all,
                          network of the busiest node, driver while it runs) + driver alone

* cores: rows of the busiest core x seconds of a row. Work comes in whole parts (chunks for
  `subset`), so the busiest core has ceil(parts / cores) of them; k-means has one shard a core.
  Cores do not slow each other down.
* storage: bytes read and written by a node / its bandwidth, and of all nodes / the storage's. Each
  file adds a latency; every node has `threads` of them at once.
* network between nodes: bytes that leave or enter the busiest one. The driver's node sends the
  centroids to one node, from which others may fetch them. It receives the answers of those right
  below it.
* driver: seconds of a task that goes through Ray Data, of a part in it, of a plain task, of one
  that asks keys, of a message to a shard, of a byte that it adds up. A level of the tree of shards,
  or of the tasks that merge answers of `subset`, is one hop more. Answers below 100 kB come to the
  driver with the message that a task is done, and go on from it. Its memory is that of all
  manifests a stage has, and of the one it writes. All of them were measured (bench_nodes;
  manifests: --manifest). Growth is linear except where `wait` says otherwise.
* `subset` reads the parts of a chunk one after another, a latency each. Its tasks run where the
  keys lie, so keys do not travel.
* rounds follow one another: a round is its cores' time + messages. An answer of the start sample
  has at most START_ROWS rows.

Nothing fails in the model, nobody else uses the storage, and nodes are alike. `proxy` reads a data
set of its own size (--proxy-rows) and is data parallel over all nodes, with a ring all-reduce of
its gradients every step. Times of training and scoring on CPUs are those of a GPT-NeoX of 70
million parameters and rows of 276 tokens (bench_scoring, bench_training); with --accelerators they
are floating-point operations over --accelerator-flops, which is an assumption and not measured.

MEASURED has the parameters with where they are from; --measured FILE.json replaces some.
`calibration` are small runs of bench_out_of_core: costs of a row in `clusters` and `subset` are the
slope between its two sizes, starts what is left. --check takes a log of that bench: it calibrates
on the two smallest sizes (the mean of their runs, none above 2 million rows) and predicts the
others.
"""

import argparse
import json
import math
import statistics
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.core.kmeans.lloyd import START_ROWS  # noqa: E402
from s2l_ray.core.selection.draw import GATHERED, SAMPLE  # noqa: E402
from s2l_ray.core.storage.manifest import FileEntry, Manifest, Part  # noqa: E402
from s2l_ray.edge.parts import MOST_TASKS  # noqa: E402
from s2l_ray.edge.reduction import FAN_IN  # noqa: E402
from s2l_ray.stages.subset.search import ROWS_PER_TASK, rows_per_task  # noqa: E402
from tests.bench import frame  # noqa: E402

NO_TREE = 10**9
# bytes of an answer from which on Ray leaves it in the object store
IN_MESSAGE = 100_000
# of a run that the model is calibrated on
MOST_ROWS = 2 * 10**6
MEASURED: dict[str, Any] = {
    # bench_out_of_core --rows 262144 1000000, shards of 2 cores that read anew every round: seconds
    "calibration": {
        "rows": [262_144, 1_000_000], "clusters s": [2.6, 5.6], "round s": [0.0724, 0.2708],
        "subset s": [3.0, 4.8],
        "k": 100, "rounds": 6, "cores": 2, "rows_per_part": 131_072,
    },
    # bench_kmeans: seconds of a core for a row in a round of shards that hold their rows, by K; 10
    # to 20 rounds with the first
    "round of a held row": {"100": 0.107e-6, "1000": 0.217e-6},
    # bench_prepare: reading, checking and tokenising; `examples` alone takes less
    "examples of a row": 183e-6,
    # bench_scoring, bf16, 2,048 tokens a batch: one checkpoint
    "score of a row": 1 / 17.24,
    # bench_training: tokens a second of a core, fp32
    "training of a token": 1 / 448,
    "parameters": 70e6, "tokens": 276,
    # bytes of a row as stored: of a part of tests/synthetic.py with 13 losses, and of its clusters;
    # of a read round (bench_out_of_core)
    "bytes": {"trajectories": 80, "read a round": 60, "clusters": 9},
    # bench_nodes: seconds of the driver's processor
    "driver": {
        "message": 0.0006, "message through the store": 0.0011, "added byte": 3.5e-10,
        "sample byte": 5.7e-9, "hop": 0.003,
        "task through Ray Data": 0.0072, "part of a task": 0.0004, "task": 0.00053,
        # bench_rules --rules s2l --rows-per-task 16384: its argument lies in the object store
        "question": 0.0010,
        "manifest of a part": 25e-6, "read manifest of a part": 18e-6, "base bytes": 266e6,
        # waiting one by one for calls that were all sent at once: seconds x calls^2
        "wait": 1.1e-7,
    },
    # bench_rules --rules random, 4 million rows less 1 million: seconds of a core for a row, in the
    # part of `subset` before rows are written
    "find of a row": 0.6e-6,
    # --manifest 61036: bytes of the driver
    "bytes of a part": {"held": 1_860, "written": 1_190, "descriptor": 440},
    "start": {"examples": 5.0, "proxy": 20.0, "trajectories": 20.0},
}  # fmt: skip


@dataclass(frozen=True)
class Nodes:
    """The hardware: bandwidths in bytes a second, memory in bytes, seconds of a request to the
    storage.
    """

    count: int
    cores: int
    memory: float
    network: float
    node_storage: float
    all_storage: float
    latency: float
    threads: int
    # of all accelerators of a node; 0: none
    flops: float

    def storage_seconds(self, moved: float, files: float) -> dict[str, float]:
        """For bytes and files, spread evenly."""
        return {
            "storage of a node": moved / self.count / self.node_storage
            + files / self.count / self.threads * self.latency,
            "storage of all": moved / self.all_storage,
        }


@dataclass(frozen=True)
class Job:
    rows: int
    rows_per_part: int
    bytes_of_row: float
    checkpoints: int
    k: int
    rounds: int
    budget: float
    proxy_rows: float
    proxy_epochs: int
    global_batch: int
    fan_in: int
    # shard or part: what one call to a shard writes
    write_calls: str
    # None: where memory is short
    streamed: bool | None = None
    # of subset; None: as the stage does
    rows_per_chunk: int | None = None
    most_tasks: int = MOST_TASKS

    @property
    def parts(self) -> int:
        return math.ceil(self.rows / self.rows_per_part)

    @property
    def parts_of_task(self) -> int:
        return math.ceil(self.parts / self.most_tasks)

    def made(self, costs: Mapping[str, float]) -> float:
        """Seconds of the driver while all parts are made by tasks of Ray Data."""
        tasks = math.ceil(self.parts / self.parts_of_task)
        return tasks * costs["task through Ray Data"] + self.parts * costs["part of a task"]


@dataclass(frozen=True)
class Stage:
    """Seconds and what they are made of, bytes read, written and sent between nodes, and what the
    driver receives and holds.
    """

    seconds: float
    together: dict[str, float]
    driver: float
    read: float
    written: float
    sent: float
    received: float
    memory: float

    @property
    def limit(self) -> str:
        name = max(self.together, key=lambda one: self.together[one])
        return name if self.together[name] >= self.driver else "driver alone"


@dataclass(frozen=True)
class Rows:
    """Seconds of one core for a row of `clusters` and `subset`, and their starts, from two sizes of
    bench_out_of_core.
    """

    step: float
    other: float
    choose: float
    clusters_start: float
    subset_start: float
    round_start: float


def calibrated(small: dict[str, Any]) -> Rows:
    """Slopes over the rows of the busiest of two shards, and what is left of the smaller size."""
    busiest = [_busiest(rows, small["rows_per_part"], small["cores"]) for rows in small["rows"]]
    # with the assignment after the last round
    steps = small["rounds"] + 1
    more = busiest[1] - busiest[0]
    slope = {
        name: (small[name][1] - small[name][0]) / more
        for name in ("clusters s", "round s", "subset s")
    }
    start = {name: small[name][0] - slope[name] * busiest[0] for name in slope}
    return Rows(
        step=slope["round s"],
        other=slope["clusters s"] - steps * slope["round s"],
        choose=slope["subset s"],
        clusters_start=start["clusters s"],
        subset_start=start["subset s"],
        round_start=start["round s"],
    )


def _busiest(rows: int, rows_per_part: int, workers: int) -> int:
    """Rows of the worker that has most, where whole parts go round."""
    return min(rows, math.ceil(math.ceil(rows / rows_per_part) / workers) * rows_per_part)


# ------------------------------------------------------------------------------------------- stages


def simulate(job: Job, nodes: Nodes, measured: dict[str, Any]) -> dict[str, Stage]:
    """All stages of a job."""
    return {
        "examples": _examples(job, nodes, measured),
        "proxy": _proxy(job, nodes, measured),
        "trajectories": _trajectories(job, nodes, measured),
        "clusters": _clusters(job, nodes, measured),
        "subset": _subset(job, nodes, measured),
    }


def _stage(
    job: Job,
    nodes: Nodes,
    measured: dict[str, Any],
    start: float,
    together: dict[str, float],
    manifests: int,
    **amounts: float,
) -> Stage:
    """A stage that reads some manifests and writes one, with the driver's seconds for these added
    to those it has alone.
    """
    costs = measured["driver"]
    alone = amounts.pop("alone", 0.0) + job.parts * (
        costs["manifest of a part"] + manifests * costs["read manifest of a part"]
    )
    # a receipt with every part
    files = {"read": manifests * job.parts, "written": 2 * job.parts}
    together = together | nodes.storage_seconds(
        amounts["read"] + amounts["written"], files["read"] + files["written"]
    )
    together["network"] = (
        amounts["sent"] / nodes.count / nodes.network + amounts["received"] / nodes.network
    )
    held = (manifests + 1) * measured["bytes of a part"]["held"] + measured["bytes of a part"][
        "written"
    ]
    memory = costs["base bytes"] + job.parts * held + amounts.pop("held", 0.0)
    return Stage(start + max(together.values()) + alone, together, alone, memory=memory, **amounts)


def _examples(job: Job, nodes: Nodes, measured: dict[str, Any]) -> Stage:
    own = _busiest(job.rows, job.rows_per_part * job.parts_of_task, nodes.count * nodes.cores)
    data = job.rows * job.bytes_of_row
    together = {
        "cores": own * measured["examples of a row"],
        "driver": job.made(measured["driver"]),
    }
    amounts = {"read": data, "written": data / 2, "sent": 0.0, "received": job.parts * 1e3}
    return _stage(job, nodes, measured, measured["start"]["examples"], together, 0, **amounts)


def _proxy(job: Job, nodes: Nodes, measured: dict[str, Any]) -> Stage:
    rows = job.proxy_rows * job.proxy_epochs
    tokens, steps = rows * measured["tokens"], rows / job.global_batch
    if nodes.flops:
        work = 6 * measured["parameters"] * tokens / nodes.flops / nodes.count
    else:
        work = tokens * measured["training of a token"] / nodes.cores / nodes.count
    # of a step, all nodes together
    gradients = 2 * 4 * measured["parameters"] * (nodes.count - 1)
    # one after the other with the work of a step
    reduce = steps * gradients / nodes.count / nodes.network
    amounts = {
        "read": rows * job.bytes_of_row / 2,
        "written": 4.0 * measured["parameters"] * job.checkpoints,
    }
    return _stage(
        job, nodes, measured, measured["start"]["proxy"], {"cores and gradients": work + reduce},
        1, sent=0.0, received=0.0, **amounts,
    )  # fmt: skip


def _trajectories(job: Job, nodes: Nodes, measured: dict[str, Any]) -> Stage:
    together = {"driver": job.made(measured["driver"])}
    if nodes.flops:
        flops = 2 * measured["parameters"] * measured["tokens"] * job.checkpoints
        together["accelerators"] = job.rows * flops / nodes.flops / nodes.count
    else:
        own = _busiest(job.rows, job.rows_per_part, nodes.count * nodes.cores)
        together["cores"] = own * measured["score of a row"] * job.checkpoints
    amounts = {
        "read": job.rows * job.bytes_of_row / 2,
        "written": float(job.rows * measured["bytes"]["trajectories"]),
        "sent": 0.0,
        "received": job.parts * 1e3,
    }
    return _stage(job, nodes, measured, measured["start"]["trajectories"], together, 2, **amounts)


def _clusters(job: Job, nodes: Nodes, measured: dict[str, Any]) -> Stage:
    costs, rows = measured["driver"], calibrated(measured["calibration"])
    shards = min(nodes.count * nodes.cores, job.parts)
    own = _busiest(job.rows, job.rows_per_part, shards)
    values = job.checkpoints - 1
    streamed = (
        job.streamed if job.streamed is not None else own * 62 * nodes.cores > nodes.memory / 2
    )
    steps = job.rounds + 1
    round_ = own * (rows.step if streamed else _of_k(measured["round of a held row"], job.k))
    answer, sample = job.k * (values + 1) * 8, min(START_ROWS, own) * (16 + 4 * values)
    exchange = _exchange(shards, job.fan_in, answer, costs, "added byte")
    start_sample = _exchange(shards, job.fan_in, sample, costs, "sample byte")
    asked = min(shards, job.fan_in)
    calls = shards if job.write_calls == "shard" else job.parts
    wait = costs["wait"] * calls**2 if job.write_calls == "part" else 0.0
    together = {
        "cores": own * rows.other + steps * round_,
        "driver": (steps + 4) * exchange + start_sample + calls * costs["message"] + wait,
    }
    # rounds wait for their answers: exchanges do not go on beside the work
    together = {"cores and driver": sum(together.values()), **together}
    passes = 6 + (steps if streamed else 0)
    amounts = {
        "read": float(job.rows * (passes if streamed else 2) * measured["bytes"]["read a round"]),
        "written": float(job.rows * measured["bytes"]["clusters"]),
        "sent": steps * shards * (answer + 2 * job.k * values * 4.0) + shards * sample,
        "received": asked * (steps * answer + sample),
        "held": 2.0 * sample + 3 * answer + (asked * sample if job.fan_in == NO_TREE else 0),
    }
    start = rows.clusters_start if shards <= 2 else rows.clusters_start + shards * costs["message"]
    return _stage(job, nodes, measured, start, together, 1, **amounts)


def _exchange(shards: int, fan_in: int, answer: float, costs: dict[str, float], byte: str) -> float:
    """Seconds until one question to all shards has come back, less their work."""
    seconds, left = 0.0, shards
    while left > 0:
        width = min(left, fan_in)
        seconds += width * _message(answer, costs, byte) + costs["hop"]
        left = math.ceil((left - width) / fan_in)
    return seconds


def _message(answer: float, costs: Mapping[str, float], byte: str) -> float:
    """Of the driver's seconds, with what is done with each byte of the answer.

    Ray keeps answers from 100 kB on in the object store.
    """
    way = "message" if answer < IN_MESSAGE else "message through the store"
    return costs[way] + answer * costs[byte]


def _of_k(by_k: dict[str, float], k: int) -> float:
    """Seconds between and beyond the measured numbers of clusters, on a line."""
    (small, a), (large, b) = sorted((int(name), value) for name, value in by_k.items())
    return a + (b - a) * (k - small) / (large - small)


def _subset(job: Job, nodes: Nodes, measured: dict[str, Any]) -> Stage:
    costs, rows = measured["driver"], calibrated(measured["calibration"])
    cores = nodes.count * nodes.cores
    parts_of_chunk = max(1, (job.rows_per_chunk or rows_per_task(job.rows)) // job.rows_per_part)
    chunks = math.ceil(job.parts / parts_of_chunk)
    seconds, sent, received, held = _search(job, chunks, nodes, costs)
    find = _busiest(job.rows, parts_of_chunk * job.rows_per_part, cores) * measured["find of a row"]
    wait = math.ceil(chunks / cores) * parts_of_chunk * 2 * nodes.latency
    write = _busiest(job.rows, job.rows_per_part, cores) * (rows.choose - measured["find of a row"])
    together = {
        "cores": find + wait + write,
        "driver": job.parts * job.budget * costs["task through Ray Data"],
    }
    amounts = {
        "read": job.rows * (job.bytes_of_row / 2 + 2.0 * measured["bytes"]["trajectories"]),
        "written": 2 * job.rows * job.budget * job.bytes_of_row,
        "sent": sent,
        "received": received,
        "held": held + 3.0 * job.parts * measured["bytes of a part"]["descriptor"],
        "alone": seconds,
    }
    return _stage(job, nodes, measured, rows.subset_start, together, 3, **amounts)


def _search(
    job: Job, chunks: int, nodes: Nodes, costs: Mapping[str, float]
) -> tuple[float, float, float, float]:
    """Seconds of the search for the last keys of k groups, bytes sent between nodes, and those that
    the driver receives and holds.

    Asked are the sizes (by the tasks that read), `between` and `ranks` until few keys are left,
    `between` and the count; a sample of so many keys leaves of each group one interval between two
    of them.
    """
    sample, gathered = max(SAMPLE, 4 * job.k), max(GATHERED, 4 * job.k)
    left, passes = float(job.rows), 0
    while left > gathered:
        left, passes = left * job.k / sample, passes + 1
    questions = [
        Question(1, 0, 8.0 * job.k),
        Question(passes, 48.0 * job.k, 24.0 * sample / chunks, joins=True),
        Question(passes, 24.0 * sample, 8.0 * sample),
        Question(1, 48.0 * job.k, 24.0 * gathered / chunks, joins=True),
        Question(1, 48.0 * job.k, 8.0 * job.parts / chunks, is_merged=False),
    ]
    asked = [question.asked(chunks, job.fan_in, nodes.count, costs) for question in questions]
    seconds, sent, received = (sum(one) for one in zip(*asked, strict=True))
    held = 8.0 * sample * min(chunks, job.fan_in) + 3 * 24 * max(sample, gathered)
    return seconds, sent, received, held


@dataclass(frozen=True)
class Question:
    """One that is put to all chunks some times: bytes of its argument and of a chunk's answer, and
    whether answers that are merged get longer by that."""

    times: int
    argument: float
    answer: float
    joins: bool = False
    is_merged: bool = True

    def asked(
        self, chunks: int, fan_in: int, nodes: int, costs: Mapping[str, float]
    ) -> tuple[float, float, float]:
        """Seconds, bytes sent between nodes and bytes received by the driver."""
        left, answer = chunks, self.answer
        seconds, sent, received = chunks * costs["question"], nodes * self.argument, 0.0
        while self.is_merged and left > fan_in:
            sent += left * answer
            received += left * answer if answer < IN_MESSAGE else 0.0
            answer *= fan_in if self.joins else 1
            left = math.ceil(left / fan_in)
            seconds += left * costs["question"] + costs["hop"]
        received += left * answer
        seconds += left * (_message(answer, costs, "added byte") - costs["message"])
        return self.times * seconds, self.times * sent, self.times * received


# ------------------------------------------------------------------------------------------- report


def main() -> None:
    """Check the model, or print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10**9, help="examples")
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=[16, 64, 256], help="numbers of nodes"
    )
    parser.add_argument("--cores", type=int, default=16, help="cores of a node")
    parser.add_argument("--memory", type=float, default=64e9, help="bytes of a node")
    parser.add_argument(
        "--network", type=float, default=1.25e9, help="bytes a second of a node, to other nodes"
    )
    parser.add_argument(
        "--node-storage",
        type=float,
        default=0.5e9,
        help="bytes a second between a node and the storage",
    )
    parser.add_argument(
        "--all-storage", type=float, default=20e9, help="bytes a second of the storage"
    )
    parser.add_argument(
        "--latency", type=float, default=0.03, help="seconds of a request to the storage"
    )
    parser.add_argument(
        "--accelerator-flops", type=float, default=1.5e14, help="that one accelerator does a second"
    )
    parser.add_argument(
        "--accelerators",
        type=int,
        default=0,
        help="of a node; 0: training and scoring on its cores",
    )
    parser.add_argument("--rows-per-part", type=int, default=16_384)
    parser.add_argument("--bytes-of-row", type=float, default=1_500, help="of a raw row")
    parser.add_argument("--k", type=int, default=1000, help="clusters")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of k-means")
    parser.add_argument("--checkpoints", type=int, default=13, help="T + 1")
    parser.add_argument(
        "--proxy-rows", type=float, default=262_000, help="that the proxy is trained on"
    )
    parser.add_argument(
        "--manifest",
        type=int,
        metavar="PARTS",
        help="measure what a part takes of the driver's memory",
    )
    parser.add_argument("--measured", type=Path, help="JSON that replaces parts of MEASURED")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="LOG",
        help="of bench_out_of_core, of which the last line is read",
    )
    args = parser.parse_args()
    measured = merged(MEASURED, json.loads(args.measured.read_text()) if args.measured else {})
    if args.check:
        return check(json.loads(args.check.read_text().splitlines()[-1]), measured)
    if args.manifest:
        return frame.finish(
            "simulate_nodes_manifest",
            parts=args.manifest,
            bytes_of_a_part=manifest_bytes(args.manifest),
        )
    results = [tables(args, count, measured) for count in args.nodes]
    frame.finish("simulate_nodes", **{**vars(args), "measured": measured}, results=results)


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """base, with values of the same names inside it replaced.

    A name that it does not have is an error.
    """
    unknown = sorted(change.keys() - base.keys())
    if unknown:
        raise SystemExit(f"--measured: expected some of {sorted(base)}, got {unknown}")
    return {
        name: merged(value, change.get(name, {}))
        if isinstance(value, dict)
        else change.get(name, value)
        for name, value in base.items()
    }


def check(bench: dict[str, Any], measured: dict[str, Any]) -> None:
    """Large runs of bench_out_of_core, predicted from its small ones: seconds predicted and
    measured, and how far apart.
    """
    small = calibration_of(bench)
    measured = merged(measured, {"calibration": small})
    rows = []
    for result in bench["results"]:
        if result["rows"] not in small["rows"]:
            predicted = out_of_core(result["rows"], measured)
            rows += [
                [
                    f"{result['rows']:,}",
                    name,
                    seconds,
                    float(result[name]),
                    seconds / result[name] - 1,
                ]
                for name, seconds in predicted.items()
            ]
    frame.show(
        "predicted from smaller runs", ("rows", "what", "predicted", "measured", "off"), rows
    )
    frame.finish("simulate_nodes_check", calibration=small, rows=rows)


def calibration_of(bench: dict[str, Any]) -> dict[str, Any]:
    """The two smallest sizes of a bench_out_of_core, each the mean of its runs."""
    sizes = sorted({result["rows"] for result in bench["results"]})[:2]
    if len(sizes) < 2 or sizes[1] > MOST_ROWS:
        raise SystemExit(
            f"--check: expected two sizes up to {MOST_ROWS:,} rows to calibrate on, got {sizes}"
        )
    runs = [[result for result in bench["results"] if result["rows"] == size] for size in sizes]
    names = ("clusters s", "round s", "subset s")
    return {
        "rows": sizes,
        **{name: [statistics.mean(run[name] for run in some) for some in runs] for name in names},
        **{name: bench[name] for name in ("k", "rounds", "rows_per_part")},
    }


def out_of_core(size: int, measured: dict[str, Any]) -> dict[str, float]:
    """What bench_out_of_core would say: one node of two cores, its storage in memory."""
    small = measured["calibration"]
    free = 1e15
    nodes = Nodes(1, small["cores"], 1e9, free, free, free, 0.0, 16, 0.0)
    job = Job(
        rows=size, rows_per_part=small["rows_per_part"], bytes_of_row=32, checkpoints=13,
        k=small["k"], rounds=small["rounds"],
        budget=0.11, proxy_rows=0, proxy_epochs=1, global_batch=1, fan_in=FAN_IN,
        write_calls="shard", streamed=True,
    )  # fmt: skip
    rows = calibrated(small)
    own = _busiest(size, small["rows_per_part"], small["cores"])
    return {
        "round s": rows.round_start + own * rows.step,
        "clusters s": _clusters(job, nodes, measured).seconds,
        "subset s": _subset(job, nodes, measured).seconds,
    }


def manifest_bytes(count: int) -> dict[str, float]:
    """Of the driver's memory for a part with 14 sources: while its manifest is held, more at the
    most while one is written, and while a stage keeps what tasks need of it."""
    files = [
        {"data": FileEntry(f"data/{number:06d}-0123abcd.parquet", 10**6 + number, f"{number:064x}")}
        for number in range(count)
    ]
    stats = [
        {"sources": {f"source {source}": 1000 + number + source for source in range(14)}}
        for number in range(count)
    ]
    parts = [
        Part(
            number,
            16_384,
            files[number],
            f"node-{number % 256}/10.0.0.1",
            "0123456789ab",
            stats[number],
        )
        for number in range(count)
    ]
    written = Manifest(1, "examples", "", {}, {}, parts, [], {}, 0.0, "", "", {}, {}).to_bytes()
    del files, stats, parts
    tracemalloc.start()
    manifest = Manifest.from_bytes(written, "a manifest")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    manifest.to_bytes()
    writing = tracemalloc.get_traced_memory()[1] - held
    before = tracemalloc.get_traced_memory()[0]
    descriptors = [part.for_reading for part in manifest.parts]
    of_descriptors = tracemalloc.get_traced_memory()[0] - before
    assert len(descriptors) == count
    return {"held": held / count, "written": writing / count, "descriptor": of_descriptors / count}


def tables(args: argparse.Namespace, count: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Print what so many nodes take, and what it would be without what was made for many nodes."""
    nodes = Nodes(
        count, args.cores, args.memory, args.network, args.node_storage, args.all_storage,
        args.latency, 16,
        args.accelerators * args.accelerator_flops,
    )  # fmt: skip
    plain = Job(
        rows=args.rows, rows_per_part=args.rows_per_part, bytes_of_row=args.bytes_of_row,
        checkpoints=args.checkpoints, k=args.k,
        rounds=args.rounds, budget=0.11, proxy_rows=args.proxy_rows, proxy_epochs=3,
        global_batch=128, fan_in=FAN_IN,
        write_calls="shard",
    )  # fmt: skip
    stages = simulate(plain, nodes, measured)
    columns = (
        "stage",
        "seconds",
        "limit",
        "driver alone s",
        "read GB",
        "written GB",
        "sent GB",
        "to driver GB",
        "driver GB",
    )
    rows = [
        [
            name,
            s.seconds,
            s.limit,
            s.driver,
            *(x / 1e9 for x in (s.read, s.written, s.sent, s.received, s.memory)),
        ]
        for name, s in stages.items()
    ]
    frame.show(f"{args.rows:,} examples on {count} nodes of {args.cores} cores", columns, rows)
    flat = simulate(Job(**(vars(plain) | {"fan_in": NO_TREE})), nodes, measured)
    by_part = simulate(Job(**(vars(plain) | {"write_calls": "part"})), nodes, measured)["clusters"]
    bigger = simulate(Job(**(vars(plain) | {"rows_per_part": 131_072})), nodes, measured)
    apart = simulate(Job(**(vars(plain) | {"most_tasks": NO_TREE})), nodes, measured)
    small = {"rows_per_chunk": ROWS_PER_TASK}
    subsets = {
        "subset as it is": stages["subset"],
        "subset without merging": flat["subset"],
        "subset, chunks of 131,072 rows": simulate(Job(**(vars(plain) | small)), nodes, measured)[
            "subset"
        ],
        "subset, both (as it was)": simulate(
            Job(**(vars(plain) | small | {"fan_in": NO_TREE})), nodes, measured
        )["subset"],
    }
    whole = sum(stage.seconds for stage in stages.values())
    choices: list[list[Any]] = [
        ["examples as it is", stages["examples"].seconds, stages["examples"].limit],
        ["examples, parts of 131,072 rows", bigger["examples"].seconds, bigger["examples"].limit],
        ["examples with a task for every part", apart["examples"].seconds, apart["examples"].limit],
        ["clusters as it is", stages["clusters"].seconds, stages["clusters"].limit],
        ["clusters without a tree", flat["clusters"].seconds, flat["clusters"].limit],
        ["clusters with a call for every part written", by_part.seconds, by_part.limit],
        *([name, stage.seconds, stage.limit] for name, stage in subsets.items()),
        ["all stages", whole, max(stages, key=lambda name: stages[name].seconds)],
    ]
    frame.show(f"with and without, {count} nodes", ("what", "seconds", "limit"), choices)
    frame.show(
        "the driver of subset",
        ("what", "alone s", "to driver GB", "sent GB"),
        [[name, s.driver, s.received / 1e9, s.sent / 1e9] for name, s in subsets.items()],
    )
    keys = [bytes_ * args.rows / count / 1e9 for bytes_ in (9, 17)]
    print(
        f"keys of subset in a node's object store: {keys[0]:.2f} GB, with a score "
        f"{keys[1]:.2f} GB, of {0.3 * args.memory / 1e9:.0f} GB"
    )
    return {
        "nodes": count,
        "stages": {name: vars(stage) for name, stage in stages.items()},
        "choices": choices,
    }


if __name__ == "__main__":
    main()
