"""The training loop beside a bare torch loop on the same batches: tokens a second on one worker, in this process.

    OMP_NUM_THREADS=1 python tests/bench/bench_training.py --steps 4 --dtype fp32

Sides, in turn, step by step: `ours`, core.training (DeepSpeed); `bare`, forward, backward and torch's AdamW with the loss of learned tokens
only, which is the floor; `labels`, the same with the model's own loss over all logits, as one would write it. Micro-batches are equal.
Seconds are of the processor. The share of waiting for data needs the real feed: see `wait_seconds` of a run's proxy.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.core.encoding import Encoded, pad  # noqa: E402
from s2l_ray.core.losses import token_losses  # noqa: E402
from s2l_ray.core.models import build  # noqa: E402
from s2l_ray.core.training import TrainingPlan, train  # noqa: E402
from tests.bench.bench_scoring import DTYPES, examples, pythia  # noqa: E402
from tests.bench.frame import finish, ratio, show  # noqa: E402


def main() -> None:
    """Train by all sides, a step each in turn, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4, help="of each side, after one that is not measured")
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = examples((args.steps + 1) * args.global_batch)
    seconds, tokens = measured(args, rows)
    table = [
        [name, sum(tokens) / sum(times), ratio(times, seconds["bare"])] for name, times in seconds.items()
    ]
    show(
        f"{args.dtype}, {args.threads} thread(s), {args.global_batch} rows a step",
        ["side", "tokens/s", "x seconds of bare"],
        table,
    )
    finish("training", **vars(args), seconds=seconds, tokens=tokens)


def measured(args: argparse.Namespace, rows: list[Encoded]) -> tuple[dict[str, list[float]], list[int]]:
    """Processor seconds of every step by side, and the tokens of each step; the first step is left out."""
    sides = {
        "bare": Bare(args, lambda model, ids_BL, learned_BL: token_losses(model, ids_BL, learned_BL).sum()),
        "labels": Bare(args, _own_loss),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *sides)}
    began = 0.0
    shares = [rows[first : first + args.global_batch] for first in range(0, len(rows), args.global_batch)]

    def batches(_: int) -> Iterator[list[Encoded]]:
        nonlocal began
        for share in shares:
            for name, side in sides.items():
                began = time.process_time()
                side.step(share)
                seconds[name].append(time.process_time() - began)
            began = time.process_time()
            yield share

    def on_step(_: dict[str, float]) -> None:
        seconds["ours"].append(time.process_time() - began)

    plan = TrainingPlan(
        total_steps=len(shares),
        checkpoint_steps=(len(shares),),
        global_batch=args.global_batch,
        micro_batch=args.micro_batch,
        learning_rate=1e-4,
        dtype=args.dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        train(
            lambda: build(pythia()),
            None,
            plan,
            batches,
            Folder(Path(folder)),
            0,
            1,
            torch.device("cpu"),
            on_step,
        )
        torch.distributed.destroy_process_group()
    tokens = [sum(len(row.input_ids) for row in share) for share in shares[1:]]
    return {name: times[1:] for name, times in seconds.items()}, tokens


Loss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


class Bare:
    """Forward, backward and AdamW, and nothing else."""

    def __init__(self, args: argparse.Namespace, loss: Loss) -> None:
        self.model, self.loss, self.size = build(pythia(), args.dtype).train(), loss, args.micro_batch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, share: Sequence[Encoded]) -> None:
        by_length = sorted(share, key=lambda row: len(row.input_ids))
        learned = sum(int(row.learned.sum()) for row in share)
        for first in range(0, len(by_length), self.size):
            arrays = pad(by_length[first : first + self.size], 0)
            (self.loss(self.model, *map(torch.from_numpy, arrays)) / learned).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _own_loss(model: Any, ids_BL: torch.Tensor, learned_BL: torch.Tensor) -> torch.Tensor:
    labels_BL = ids_BL.masked_fill(~learned_BL, -100)
    return model(input_ids=ids_BL, labels=labels_BL, use_cache=False).loss * learned_BL.sum()


class Folder:
    """Files of an artifact in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, data: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def list(self, folder: str) -> list[str]:
        return os.listdir(self.root / folder) if (self.root / folder).is_dir() else []

    def delete(self, folder: str) -> None:
        shutil.rmtree(self.root / folder)


if __name__ == "__main__":
    main()
