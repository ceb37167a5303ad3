r"""The training loop beside a bare torch loop on the same batches, with one worker and two.

    OMP_NUM_THREADS=1 python tests/bench/bench_training.py --model small --global-batch 64 \
        --micro-batch 8

Sides, in turn, step by step, each in processes of its own: `bare`, forward, backward and torch's
AdamW in one process with the loss of learned tokens only, which is the floor; `labels`, the same
with the model's own loss over all logits and memory as the C library handles it, as one would write
it; `ours, N`, core.training (DeepSpeed) with N workers. Micro-batches are equal. Tokens a second
are by the clock, so they need a quiet machine; processor seconds of all workers together do not.
The share of waiting for data needs the real feed: see bench_feed.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.config import Model, Training, TrainingWorkers  # noqa: E402
from s2l_ray.core.memory import keep_freed_memory  # noqa: E402
from s2l_ray.core.model.architecture import build  # noqa: E402
from s2l_ray.core.model.losses import token_losses  # noqa: E402
from s2l_ray.core.model.schedule import TrainingSetup  # noqa: E402
from s2l_ray.core.model.training import train  # noqa: E402
from s2l_ray.core.model.workers import Worker  # noqa: E402
from s2l_ray.core.text.batching import pad  # noqa: E402
from s2l_ray.core.text.encoding import Encoded  # noqa: E402
from tests.bench.bench_scoring import DTYPES, examples, pythia  # noqa: E402
from tests.bench.frame import finish, ratio, show  # noqa: E402

SMALL: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 8_192,
    "hidden_size": 384,
    "intermediate_size": 1_536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}


def main() -> None:
    """Train by all sides, a step each in turn, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="of each side, after one that is not measured"
    )
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument(
        "--model", choices=["pythia", "small"], default="pythia", help="70M or 17M parameters"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    tokens = [
        sum(len(row.input_ids) for row in share) for share in shares(args)[1 : args.steps + 1]
    ]
    with tempfile.TemporaryDirectory() as folder:
        sides = {"bare": Side(args, "bare", 1, folder), "labels": Side(args, "labels", 1, folder)}
        sides |= {f"ours, {count}": Side(args, "ours", count, folder) for count in args.workers}
        for _ in range(args.steps + 1):
            for side in sides.values():
                side.step()
        for side in sides.values():
            side.end()
    spent = {name: side.spent[1:] for name, side in sides.items()}
    clock = {name: side.clock[1:] for name, side in sides.items()}
    show(
        f"{args.model}, {args.dtype}, {args.global_batch} rows a step, {sum(tokens)} tokens",
        ["side", "tokens/s", "processor s a step", "x processor s of bare"],
        [
            [
                name,
                sum(tokens) / sum(clock[name]),
                sum(times) / args.steps,
                ratio(times, spent["bare"]),
            ]
            for name, times in spent.items()
        ],
    )
    finish("training", **vars(args), processor_seconds=spent, seconds=clock, tokens=tokens)


def model_config(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    return pythia() if args.model == "pythia" else AutoConfig.for_model(**SMALL)


def shares(args: argparse.Namespace) -> list[list[Encoded]]:
    """The rows of each step.

    One step more than is run, so that no training ends and writes a checkpoint.
    """
    size, vocabulary = args.global_batch, model_config(args).vocab_size
    rows = [
        Encoded(row.example_id, (row.input_ids % vocabulary).astype(np.int32), row.learned)
        for row in examples((args.steps + 2) * size)
    ]
    return [rows[first : first + size] for first in range(0, len(rows), size)]


class Side:
    """One way to train, in processes of its own that take a step on request.

    Attributes:
        spent, clock: processor seconds of all its processes, and seconds, of every step.
    """

    def __init__(self, args: argparse.Namespace, way: str, workers: int, folder: str) -> None:
        self.spent: list[float] = []
        self.clock: list[float] = []
        self.pipes, self.processes = [], []
        context = multiprocessing.get_context("spawn")
        for rank in range(workers):
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, args, way, rank, workers, folder))
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def step(self) -> None:
        began = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(None)
        self.spent.append(sum(pipe.recv() for pipe in self.pipes))
        self.clock.append(time.perf_counter() - began)

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def serve(
    pipe: Any, args: argparse.Namespace, way: str, rank: int, workers: int, folder: str
) -> None:
    """Report readiness, then take a step on every request and send its processor seconds."""
    torch.set_num_threads(args.threads)

    def told() -> Iterator[list[Encoded]]:
        pipe.send(None)
        for share in shares(args):
            pipe.recv()
            began = time.process_time()
            own = len(share) // workers
            yield share[rank * own : (rank + 1) * own]
            pipe.send(time.process_time() - began)

    if way == "ours":
        train_ours(args, told, rank, workers, Path(folder) / f"ours-{workers}")
        return
    if way == "bare":
        keep_freed_memory()
    bare = Bare(args, _learned_only if way == "bare" else _own_loss)
    for share in told():
        bare.step(share)


def train_ours(
    args: argparse.Namespace,
    told: Callable[[], Iterator[list[Encoded]]],
    rank: int,
    workers: int,
    folder: Path,
) -> None:
    folder.mkdir(exist_ok=True)
    steps = args.steps + 2
    section = Training(
        model=Model(config=SMALL),
        tokenizer="bytes",
        steps=steps,
        global_batch=args.global_batch,
        learning_rate=1e-4,
        warmup_ratio=0.0,
        gradient_clipping=0.0,
        dtype=args.dtype,
        state_every=steps,
    )
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers
    )
    config = model_config(args)
    train(
        lambda: build(config),
        None,
        TrainingSetup(section, steps, (steps,), TrainingWorkers(micro_batch=args.micro_batch)),
        lambda _: told(),
        Folder(folder / "artifact"),
        Worker(rank, workers, torch.device("cpu")),
        lambda _: None,
    )


Loss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


class Bare:
    """Forward, backward and AdamW, and nothing else."""

    def __init__(self, args: argparse.Namespace, loss: Loss) -> None:
        self.model, self.loss, self.size = (
            build(model_config(args), args.dtype).train(),
            loss,
            args.micro_batch,
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True
        )

    def step(self, share: Sequence[Encoded]) -> None:
        by_length = sorted(share, key=lambda row: len(row.input_ids))
        learned = sum(int(row.learned.sum()) for row in share)
        for first in range(0, len(by_length), self.size):
            arrays = pad(by_length[first : first + self.size], 0)
            (self.loss(self.model, *map(torch.from_numpy, arrays)) / learned).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _learned_only(model: Any, ids_BL: torch.Tensor, learned_BL: torch.Tensor) -> torch.Tensor:
    return token_losses(model, ids_BL, learned_BL).sum()


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
