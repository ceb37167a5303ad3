r"""Loss curves of every way to train the same rows with the same seed, beside plain torch.

    OMP_NUM_THREADS=1 python tests/bench/bench_curves.py --steps 50 --dtype fp32

Each way trains in processes of its own, one worker and two. The table has the largest relative
difference of any step's loss from that of plain torch, one row a pass, in the same dtype (and from
ZeRO-1 with one worker). `--state` compares state in fp32 and in bf16 over more steps instead.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.core.model.architecture import build, load_config  # noqa: E402
from s2l_ray.core.model.engine import parameter_groups  # noqa: E402
from s2l_ray.core.model.losses import token_losses  # noqa: E402
from s2l_ray.core.model.schedule import TrainingSetup, learning_rate_at  # noqa: E402
from s2l_ray.core.model.workers import Worker  # noqa: E402
from s2l_ray.core.text.batching import pad  # noqa: E402
from s2l_ray.core.text.encoding import Encoded  # noqa: E402
from tests import one_worker  # noqa: E402
from tests.bench.frame import finish, show  # noqa: E402

MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Way -> fields of the section, fields of scaling.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero1": ({}, {}),
    "zero2": ({"deepspeed": "zero2"}, {}),
    "zero3": ({"deepspeed": "zero3"}, {}),
    "zero3_offload": ({"deepspeed": "zero3_offload"}, {}),
    "zero1, checkpointing": ({}, {"activation_checkpointing": True}),
    "zero3, checkpointing": ({"deepspeed": "zero3"}, {"activation_checkpointing": True}),
    "zero1, packing": ({}, {"packing": True}),
    "zero3, packing": ({"deepspeed": "zero3"}, {"packing": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--state", action="store_true", help="state in fp32 and bf16, one worker")
    args = parser.parse_args()
    if args.state:
        compare_states(args)
        return
    plain = plain_torch(setup_of(args, {}, {}))
    curves = {
        (way, workers): curve(setup_of(args, *fields), workers)
        for workers in args.workers
        for way, fields in WAYS.items()
    }
    first = curves["zero1", args.workers[0]]
    show(
        f"{args.steps} steps in {args.dtype}: largest relative difference of a step's loss",
        ["way", "workers", "from plain torch", "from zero1"],
        [
            [way, str(workers), apart(found, plain), apart(found, first)]
            for (way, workers), found in curves.items()
        ],
    )
    finish(
        "curves",
        **vars(args),
        plain=plain,
        curves={f"{way}, {workers}": found for (way, workers), found in curves.items()},
    )


def setup_of(
    args: argparse.Namespace, section: dict[str, Any], scaling: dict[str, Any]
) -> TrainingSetup:
    return one_worker.setup(
        scaling,
        model={"config": MODEL},
        steps=args.steps,
        dtype=args.dtype,
        learning_rate=args.learning_rate,
        warmup_ratio=0.1,
        max_length=64,
        **section,
    )


def rows(count: int) -> list[Encoded]:
    """Something to learn: a token follows from the one before it, but for one in ten.

    About half of the tokens are learned.
    """
    draw, made = np.random.default_rng(0), []
    for example_id in range(count):
        ids = draw.integers(1, MODEL["vocab_size"], int(draw.integers(8, 64)))
        for place in np.flatnonzero(draw.random(len(ids)) < 0.9):
            ids[place] = (5 * ids[place - 1] + 3) % MODEL["vocab_size"] if place else ids[0]
        learned = draw.random(len(ids)) < 0.5
        learned[:2] = False, True
        made.append(Encoded(example_id, ids.astype(np.int32), learned))
    return made


def apart(found: list[float], expected: list[float]) -> str:
    far = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    return f"{far:.1e}"


def curve(setup: TrainingSetup, workers: int) -> list[float]:
    """The loss of every step, by processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (workers, setup, folder), nprocs=workers)
        return json.loads((Path(folder) / "losses.json").read_text())


def work(rank: int, workers: int, setup: TrainingSetup, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers
    )
    examples = rows(setup.total_steps * one_worker.BATCH)
    found = one_worker.losses(setup, Worker(rank, workers, torch.device("cpu")), examples=examples)
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


def plain_torch(setup: TrainingSetup) -> list[float]:
    """The same by torch alone: fp32 weights and AdamW, a forward pass in the training's dtype."""
    section = setup.section
    torch.manual_seed(section.seed)
    model = build(load_config(section.model), dropout=False).train()
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(torch.bfloat16 if section.dtype == "bf16" else torch.float32)
    own = {id(p): m.requires_grad_() for p, m in zip(model.parameters(), masters, strict=True)}
    groups = [
        {**group, "params": [own[id(parameter)] for parameter in group["params"]]}
        for group in parameter_groups(model, section.weight_decay)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(section.adam_beta1, section.adam_beta2))
    examples, losses = rows(setup.total_steps * one_worker.BATCH), []
    for step in range(setup.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, setup)
        batch = examples[step * one_worker.BATCH : (step + 1) * one_worker.BATCH]
        learned, total = sum(int(e.learned.sum()) for e in batch), 0.0
        for master in masters:
            master.grad = torch.zeros_like(master)
        for example in batch:
            arrays = (torch.from_numpy(array) for array in pad([example], 0))
            loss = token_losses(model, *arrays).sum()
            (loss / learned).backward()
            total += loss.item()
            for parameter, master in zip(model.parameters(), masters, strict=True):
                master.grad += parameter.grad.float()
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, section.gradient_clipping)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True):
                parameter.copy_(master)
        losses.append(total / learned)
    return losses


def compare_states(args: argparse.Namespace) -> None:
    """Mean loss of the last tenth of the steps, with state in fp32 and in bf16."""
    args.dtype = "bf16"
    last = max(1, args.steps // 10)
    rows, curves = [], {}
    for rate in (args.learning_rate, args.learning_rate / 10):
        args.learning_rate = rate
        for state in ("fp32", "bf16"):
            found = curve(setup_of(args, {"state_dtype": state}, {}), 1)
            curves[f"{state}, {rate}"] = found
            rows.append([f"{rate:g}", state, found[0], sum(found[-last:]) / last])
    show(
        f"{args.steps} steps in bf16",
        ["learning rate", "state", "first loss", f"mean of the last {last}"],
        rows,
    )
    finish("curves", **vars(args), curves=curves)


if __name__ == "__main__":
    main()
