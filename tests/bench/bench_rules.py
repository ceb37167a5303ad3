r"""Seconds that the stage's own code takes to find the draw of every selection rule.

    python tests/bench/bench_rules.py --rows 1000000
    python tests/bench/bench_rules.py --rows 100000 --rules facility_location
    python tests/bench/bench_rules.py --rows 1000000 --rules s2l el2n --rows-per-task 16384 \
        --fan-in 4 1000                                                        # 62 chunks

Makes trajectories of 12 steps with all statistics and clusters in a temporary folder, then draws
11 % with each rule on a local Ray with 2 CPUs, with each fan-in in turn. Prints seconds, processor
seconds of the driver, the number and bytes of the answers that reached it, and one last line of
JSON. Writing the chosen rows' text is not part of it.
"""

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.update({"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)})
os.environ.setdefault("OMP_NUM_THREADS", "1")

from s2l_ray.config import RULES, Config  # noqa: E402
from s2l_ray.contract.work import Work  # noqa: E402
from s2l_ray.core.query import Query  # noqa: E402
from s2l_ray.core.storage.artifact import Artifact  # noqa: E402
from s2l_ray.core.storage.store import Store  # noqa: E402
from tests import synthetic  # noqa: E402
from tests.bench.frame import finish, show  # noqa: E402


def main() -> None:
    """Build once, draw with every rule, print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of stored trajectories")
    parser.add_argument(
        "--steps", type=int, default=12, help="stored steps of a row, step 0 included"
    )
    parser.add_argument("--k", type=int, default=100, help="number of clusters")
    parser.add_argument("--sources", type=int, default=14, help="number of sources")
    parser.add_argument("--rules", nargs="+", default=list(RULES), help="names of rules")
    parser.add_argument("--repeats", type=int, default=1, help="draws with each rule and fan-in")
    parser.add_argument(
        "--rows-per-task", type=int, help="of a chunk, exactly; default: as the stage does"
    )
    parser.add_argument(
        "--fan-in", type=int, nargs="+", help="answers that one task merges; default: as it is"
    )
    args = parser.parse_args()
    from s2l_ray.edge import reduction, session
    from s2l_ray.stages.subset import search

    if args.rows_per_task:
        search.rows_per_task = lambda total: args.rows_per_task
    with tempfile.TemporaryDirectory() as storage:
        began = time.monotonic()
        sources = [f"source {number}" for number in range(args.sources)]
        synthetic.build(storage, args.rows, steps=args.steps, sources=sources, clusters=args.k)
        print(f"built {args.rows:,} rows in {time.monotonic() - began:.0f} s", flush=True)
        session.connect(config_of(storage, "random").scaling)
        # starts the workers, which a run has long done by then
        draw_seconds(storage, "random")
        results = []
        for rule, _, fan_in in itertools.product(
            args.rules, range(args.repeats), args.fan_in or [reduction.FAN_IN]
        ):
            reduction.FAN_IN = fan_in
            results.append({"rule": rule, "fan-in": fan_in, **draw_seconds(storage, rule)})
    total = round(sum(result["s"] for result in results), 2)
    show("rules", list(results[0]), [list(result.values()) for result in results])
    print(f"all {total:.2f} s")
    finish("rules", rows=args.rows, steps=args.steps, total=total, results=results)


def config_of(storage: str, rule: str) -> Config:
    return Config.model_validate(
        {
            "run": {"storage": storage},
            "examples": {"files": ["none"]},
            "proxy": {
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": "bytes",
                "epochs": 1,
            },
            "trajectories": {"statistics": synthetic.STATISTICS},
            "subset": {"rule": rule},
            "scaling": {"local_cpus": 2},
        }
    )


def draw_seconds(storage: str, rule: str) -> dict[str, Any]:
    """Find the draw of one rule, and time it."""
    from s2l_ray.core.selection.rules import by_cluster
    from s2l_ray.stages.subset import make as subset
    from s2l_ray.stages.subset.rows import row_reader

    config, store = config_of(storage, rule), Store(storage)
    stages = ["examples", "trajectories"]
    stages += ["clusters"] if by_cluster(config.subset) else []
    inputs = {stage: Artifact(store, stage, synthetic.NAME) for stage in stages}
    manifests = {stage: artifact.manifest() for stage, artifact in inputs.items()}
    work = Work(config, Artifact(store, "subset", rule), inputs, manifests, "bench")
    budget = int(0.11 * manifests["trajectories"].info["scored"])
    with answers_received() as received:
        began, cpu_began = time.monotonic(), time.process_time()
        choice = subset.choose(work, row_reader(work), budget)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu_began
    return {
        "rows": sum(choice.rows_of_part),
        "s": round(seconds, 3),
        "driver s": round(cpu, 3),
        "answers": len(received),
        "MB": round(sum(received) / 1e6, 3),
    }


class Watched:
    """A query that counts the bytes of the answers it merges, in the process that made it."""

    def __init__(self, query: Query[Any, Any], received: list[int]) -> None:
        self.query, self.received = query, received

    def of(self, shard: Any) -> Any:
        return self.query.of(shard)

    def merge(self, answers: Iterable[Any]) -> Any:
        answers = list(answers)
        for answer in answers:
            columns = [answer] if isinstance(answer, np.ndarray) else answer
            self.received.append(sum(column.nbytes for column in columns))
        return self.query.merge(answers)


@contextlib.contextmanager
def answers_received() -> Iterator[list[int]]:
    """Bytes of every answer that the driver receives while this is open."""
    from s2l_ray.stages.subset import search

    received: list[int] = []
    reduced = search.reduced
    search.reduced = lambda query, answers: reduced(Watched(query, received), answers, None)
    try:
        yield received
    finally:
        search.reduced = reduced


if __name__ == "__main__":
    main()
