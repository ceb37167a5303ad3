r"""What Ray costs: the share of training that waits for data, and of scoring between parts.

    OMP_NUM_THREADS=1 python tests/bench/bench_feed.py --workers 1
    OMP_NUM_THREADS=1 python tests/bench/bench_feed.py --rows 2400 --hidden 128 --layers 2 \
        --training-only

Runs a small job on a local Ray until its proxy is trained, and reads how long its first worker
waited for data: before the first step, which includes the start of the readers, and in all others.
Then `parts_by_actors` scores the same parts with one actor and records when each part began and
ended. The time between parts is Ray's, whatever else the machine does. The table also has the
processor seconds of a part there and in this process.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.config import load  # noqa: E402
from s2l_ray.contract.stage import Request  # noqa: E402
from s2l_ray.contract.work import Work  # noqa: E402
from s2l_ray.core.model.scoring import files_of  # noqa: E402
from s2l_ray.core.storage.artifact import Artifact  # noqa: E402
from s2l_ray.core.storage.manifest import Manifest, Part  # noqa: E402
from s2l_ray.core.storage.records import to_json  # noqa: E402
from s2l_ray.core.storage.store import Store  # noqa: E402
from s2l_ray.stages.training.metrics import read_metrics  # noqa: E402
from s2l_ray.stages.training.place import Place  # noqa: E402
from tests.bench.frame import finish, show  # noqa: E402


def main() -> None:
    """Train, score, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rows-per-part", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="that train the proxy")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--training-only", action="store_true")
    args = parser.parse_args()
    os.environ["RAY_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory() as folder:
        path = job(Path(folder), args)
        command = [sys.executable, "-m", "s2l_ray.run", "--config", path, "--until", "proxy"]
        subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, stdout=sys.stderr
        )
        result = waiting(folder)
        if not args.training_only:
            result |= scoring(path, folder)
    show(
        "what Ray costs",
        ["figure", "value"],
        [[name, float(value)] for name, value in result.items()],
    )
    finish("feed", **vars(args), result=result)


def waiting(folder: str) -> dict[str, float]:
    """Seconds of the training, and how many of them the first step and the others waited."""
    steps = read_metrics(Place(only(folder, "proxy"), "member-0/"))
    first, others = steps[0], steps[1:]
    seconds = sum(step["seconds"] for step in others)
    return {
        "first_step_seconds": first["seconds"],
        "first_step_waiting": first["wait_seconds"],
        "steps_after": len(others),
        "seconds_after": seconds,
        "share_of_waiting_after": sum(step["wait_seconds"] for step in others) / seconds,
        "longest_waiting_after": max(step["wait_seconds"] for step in others),
        "tokens_per_second_after": sum(step["tokens"] for step in others) / seconds,
    }


def job(folder: Path, args: argparse.Namespace) -> str:
    """A job on rows of 40 to 500 bytes, the second half an answer; returns its path."""
    model = {
        "model_type": "gpt_neox",
        "vocab_size": 8_192,
        "hidden_size": args.hidden,
        "intermediate_size": 4 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    draw = random.Random(0)
    rows = []
    for _ in range(args.rows):
        text = "".join(draw.choices("abcdefgh ", k=draw.randint(40, 500)))
        rows.append({"instruction": text[: len(text) // 2], "output": text[len(text) // 2 :]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "run": {"name": "feed", "storage": f"{folder}/storage"},
        "examples": {"files": [f"{folder}/rows.jsonl"], "rows_per_part": args.rows_per_part},
        "proxy": {
            "model": {"config": model},
            "tokenizer": "bytes",
            "prompt": "plain",
            "max_length": 512,
            "global_batch": 16,
            "learning_rate": 1e-3,
            "dtype": "fp32",
            "epochs": 1,
            "checkpoints": 1,
        },
        "trajectories": {"dtype": "fp32"},
        "subset": {"budget": args.rows // 4},
        "clusters": {"k": 2},
        "scaling": {
            "proxy": {"workers": args.workers, "micro_batch": 4},
            "trajectories": {"workers": 1},
            "local_cpus": 2,
        },
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "job.yaml")


def only(folder: str, stage: str) -> Artifact:
    """The one artifact of a stage in the storage."""
    store = Store(f"{folder}/storage")
    (name,) = [
        name for name in store.folders(stage) if store.exists(f"{stage}/{name}/manifest.json")
    ]
    return Artifact(store, stage, name)


def scoring(path: str, folder: str) -> dict[str, float]:
    """Gaps between parts, and processor seconds of a part, with Ray and without."""
    from s2l_ray.edge import parts, session

    inputs = {stage: only(folder, stage) for stage in ("examples", "proxy")}
    manifests = {stage: artifact.manifest() for stage, artifact in inputs.items()}
    config = load(path, []).first
    place = Artifact(Store(f"{folder}/storage"), "trajectories", "0" * 32)
    work = Work(config, place, inputs, manifests, "bench", request=Request("actors", 1))
    session.connect(config.scaling)
    jobs = {part.index: {"part": to_json(part.for_reading)} for part in manifests["examples"].parts}
    loader = timed(manifests["proxy"])
    made = parts.parts_by_actors(work, jobs, loader)
    make = loader(parts.part_context(work))
    bare = [make(job).stats["cpu"] for job in jobs.values()]
    times = sorted((part.stats["began"], part.stats["ended"]) for part in made)
    inside = sum(ended - began for began, ended in times)
    return {
        "gaps": (times[-1][1] - times[0][0]) / inside - 1,
        "cpu_of_part_with_ray": statistics.median(part.stats["cpu"] for part in made),
        "cpu_of_part_bare": statistics.median(bare),
    }


def timed(proxy: Manifest) -> Callable[[Any], Callable[[dict[str, Any]], Part]]:
    """As stages.trajectories loads its scorer, with a watch around every part."""
    members = [
        {name: member[name] for name in ("steps", "folders", "parameters")}
        for member in proxy.info["members"]
    ]
    files = files_of(proxy)

    def loader(context: Any) -> Callable[[dict[str, Any]], Part]:
        from s2l_ray.stages.trajectories.make import Scorer

        scorer = Scorer(context, members, files)

        def make(descriptor: dict[str, Any]) -> Part:
            began, cpu = time.time(), time.process_time()
            part = scorer.make_part(descriptor)
            part.stats.update(began=began, ended=time.time(), cpu=time.process_time() - cpu)
            return part

        return make

    return loader


if __name__ == "__main__":
    main()
