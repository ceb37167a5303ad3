"""Scoring beside the authors' way and beside floors: a GPT-NeoX of the shape of Pythia-70M, rows of 40 to 512 tokens, half learned.

    OMP_NUM_THREADS=1 python tests/bench/bench_scoring.py --dtypes fp32 bf16
    python tests/bench/bench_scoring.py --dtypes bf16 --scorers 1x2 2x1

Sides, in turn, on the same rows, each in a process of its own, which no other's memory or settings reach: `authors`, one example per
forward pass, all logits, the loss fetched after each (their way, written anew); `ours`, core.scoring.score; `family`, the base model of
transformers over our batches and nothing but the product of the output layer for learned tokens: what no scorer that leaves the
family's own code as it is can pass; `kernels`, the products and, once each, torch's kernels for what else the model needs, on pieces
that stay in the cache: attention, layer norms, GELU, additions, exponentials of the loss (no rotations, no biases, no padding): what
no scorer made of torch's kernels can pass; `floor`, nothing but the matrix products that are needed, at the model's own shapes and
dtype: the body's for every token, the output layer's for learned tokens, and of attention its FLOPs at the rate of the body's. The
rows are every n-th batch of a part, so that a short run pads as a whole part does. Seconds are of the processor.

With `--scorers`, NxM means N scorers of M threads, each with all of the rows; seconds are of the clock, so the machine has to be quiet.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.core.allocation import keep_freed_memory  # noqa: E402
from s2l_ray.core.encoding import Encoded, pad  # noqa: E402
from s2l_ray.core.models import build  # noqa: E402
from s2l_ray.core.scoring import score, scoring_batches  # noqa: E402
from tests.bench.frame import finish, in_turn, ratio, show  # noqa: E402

SHORTEST, LONGEST = 40, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What a process runs, and on what: so many rows in the part, about so many tokens of it scored at a time."""

    side: str
    dtype: str
    tokens_per_batch: int
    part: int
    tokens: int
    threads: int

    def batches(self) -> list[list[Encoded]]:
        return sampled(examples(self.part), self.tokens_per_batch, self.tokens)

    def own_tokens(self) -> int:
        return sum(len(row.input_ids) for batch in self.batches() for row in batch)


def main() -> None:
    """Measure every precision, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--tokens-per-batch",
        nargs="+",
        type=int,
        default=[16_384],
        help="one side for each; the first one's rows are those of the other sides",
    )
    parser.add_argument("--part", type=int, default=1_024, help="rows of the part")
    parser.add_argument("--tokens", type=int, default=16_384, help="about how many of them to score")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scorers", nargs="+", default=[], help="only compare these, such as 1x2 2x1")
    args = parser.parse_args()
    how = scorers if args.scorers else measured
    results = [how(args, dtype) for dtype in args.dtypes]
    finish("scoring", **vars(args), results=results)


def measured(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """One precision: seconds and ratios of all sides, each on its own sample of the part, per token that is not padding."""
    sizes = args.tokens_per_batch
    first = Job("ours", dtype, sizes[0], args.part, args.tokens, args.threads)
    jobs = {
        "authors": replace(first, side="authors"),
        **{f"ours, {size:,}": replace(first, tokens_per_batch=size) for size in sizes},
        "family": replace(first, side="family"),
        "kernels": replace(first, side="kernels"),
        "floor": replace(first, side="floor"),
    }
    sides = {name: Apart([job]) for name, job in jobs.items()}
    seconds = timed(sides, args.repeats, by_clock=False)
    each = {name: [took / jobs[name].own_tokens() for took in times] for name, times in seconds.items()}
    rows = sum(len(batch) for batch in first.batches())
    per_row = first.own_tokens() / rows
    table = {
        name: {
            "rows_per_second": 1 / statistics.median(times) / per_row,
            "times_authors": ratio(each["authors"], times),
            "share_of_family": ratio(each["family"], times),
            "share_of_floor": ratio(each["floor"], times),
            "padding": padding(jobs[name]) if jobs[name].side in ("ours", "family") else 0.0,
        }
        for name, times in each.items()
    }
    show(
        f"{dtype}, {args.threads} thread(s), {rows} rows, {first.own_tokens()} tokens",
        ["side", "rows/s", "x authors", "share of family", "share of floor", "padding %"],
        [[name, *list(one.values())[:-1], 100 * one["padding"]] for name, one in table.items()],
    )
    return {"dtype": dtype, "sides": table, "seconds": seconds}


def scorers(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Rows a second of all scorers together, by how many there are and their threads."""
    sides, rows = {}, {}
    for name in args.scorers:
        count, threads = map(int, name.split("x"))
        job = Job("ours", dtype, args.tokens_per_batch[0], args.part, args.tokens, threads)
        sides[name] = Apart([job] * count)
        rows[name] = count * sum(len(batch) for batch in job.batches())
    seconds = timed(sides, args.repeats, by_clock=True)
    rates = {name: rows[name] / statistics.median(times) for name, times in seconds.items()}
    show(f"{dtype}, scorers x threads", ["side", "rows/s"], [[name, rate] for name, rate in rates.items()])
    return {"dtype": dtype, "rows_per_second": rates, "seconds": seconds}


class Apart:
    """A side in processes of its own; a call has all of them run once, together.

    Attributes:
        spent: processor seconds of all calls.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.spent = 0.0
        self.pipes, self.processes = [], []
        context = multiprocessing.get_context("spawn")
        for job in jobs:
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, job))
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)

    def __call__(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        self.spent += sum(pipe.recv() for pipe in self.pipes)

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def timed(sides: dict[str, Apart], repeats: int, by_clock: bool) -> dict[str, list[float]]:
    """in_turn, after which the processes end; seconds of the clock, or of their processors."""
    try:
        clock = time.perf_counter if by_clock else lambda: sum(side.spent for side in sides.values())
        return in_turn(sides, repeats, clock=clock)
    finally:
        for side in sides.values():
            side.end()


def serve(pipe: Any, job: Job) -> None:
    """Run a side whenever told to, and tell the processor seconds."""
    torch.set_num_threads(job.threads)
    if job.side != "authors":
        keep_freed_memory()
    side = made(job)
    while True:
        pipe.recv()
        began = time.process_time()
        side()
        pipe.send(time.process_time() - began)


def made(job: Job) -> Callable[[], Any]:
    model, batches = build(pythia(), job.dtype).eval(), job.batches()
    rows = [row for batch in batches for row in batch]
    if job.side == "authors":
        return lambda: authors(model, rows)
    if job.side == "ours":
        return lambda: ours(model, batches, job.tokens_per_batch)
    if job.side == "kernels":
        return Kernels(model, rows, DTYPES[job.dtype])
    floor = Floor(model, rows, DTYPES[job.dtype])
    return floor if job.side == "floor" else lambda: family(model, batches, floor)


def pythia() -> Any:
    """The shape of Pythia-70M."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    return AutoConfig.for_model(
        "gpt_neox",
        vocab_size=50_304,
        hidden_size=512,
        intermediate_size=2_048,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2_048,
        rotary_pct=0.25,
    )


def examples(count: int) -> list[Encoded]:
    """Rows whose second half is learned, as answers to prompts are."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, count)
    return [
        Encoded(number, draw.integers(0, 50_304, n).astype(np.int32), np.arange(n) >= n // 2)
        for number, n in enumerate(lengths)
    ]


def sampled(part: Sequence[Encoded], tokens_per_batch: int, tokens: int) -> list[list[Encoded]]:
    """Batches of the part as they are cut, evenly spread over their lengths, with about so many tokens in all."""
    batches = scoring_batches([len(row.input_ids) for row in part], tokens_per_batch)
    share = tokens / sum(len(row.input_ids) for row in part)
    count = max(1, min(len(batches), round(share * len(batches))))
    return [
        [part[row] for row in batches[round((n + 0.5) * len(batches) / count - 0.5)]] for n in range(count)
    ]


def padding(job: Job) -> float:
    """Padded tokens of a whole part beside its own, minus 1."""
    lengths = [len(row.input_ids) for row in examples(job.part)]
    batches = scoring_batches(lengths, job.tokens_per_batch)
    return sum(len(one) * max(lengths[row] for row in one) for one in batches) / sum(lengths) - 1


@torch.no_grad()
def authors(model: Any, rows: Sequence[Encoded]) -> list[float]:
    """One example per forward pass, logits of all positions, the loss fetched after each."""
    losses = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(row.learned)[None], -100)
        losses.append(model(input_ids=ids, labels=labels).loss.cpu().item())
    return losses


def ours(model: Any, batches: Sequence[Sequence[Encoded]], tokens_per_batch: int) -> None:
    for batch in batches:
        score([model], batch, 0, tokens_per_batch, CPU)


@torch.no_grad()
def family(model: Any, batches: Sequence[Sequence[Encoded]], floor: "Floor") -> None:
    """The base model, as transformers has it, over padded batches, and the output layer's product."""
    for batch in batches:
        model.base_model(input_ids=torch.from_numpy(pad(batch, 0)[0]), use_cache=False)
    floor.output_layer()


class Floor:
    """The products that are needed to score rows, without anything between them.

    Products run on 1,024 rows at a time, which is where they are fastest here, and the output layer's in the faster of two ways: whole,
    and in blocks of 512 tokens of the vocabulary, whose logits stay in the cache.
    """

    def __init__(self, model: Any, rows: Sequence[Encoded], dtype: torch.dtype, at_once: int = 1_024) -> None:
        head, width = model.get_output_embeddings(), model.config.hidden_size
        lengths, learned = [len(row.input_ids) for row in rows], [int(row.learned.sum()) for row in rows]
        self.body = [
            module for module in model.modules() if isinstance(module, nn.Linear) and module is not head
        ]
        self.blocks, self.learned_blocks = _blocks(sum(lengths), at_once), _blocks(sum(learned), at_once)
        self.inputs = {
            size: torch.randn(at_once, size).to(dtype) for size in {m.in_features for m in self.body}
        }
        # scores and their use, of the lower triangle only: 2 products of n^2 / 2 pairs, 2 FLOPs each, in every layer
        attention = sum(2.0 * n * n * width for n in lengths) * model.config.num_hidden_layers
        products = sum(2.0 * m.weight.numel() for m in self.body) * sum(lengths)
        self.more = attention / products
        self.parts = head.weight.detach().split(512)
        ways: list[Callable[[torch.Tensor], Any]] = [
            lambda x: nn.functional.linear(x, head.weight),
            lambda x: [nn.functional.linear(x, part) for part in self.parts],
        ]
        with torch.no_grad():
            self.head = min(ways, key=lambda way: _best(lambda: way(self.inputs[width])))
        self.width = width

    @torch.no_grad()
    def __call__(self) -> None:
        began = time.process_time()
        self.products()
        until = time.process_time() + self.more * (time.process_time() - began)
        while time.process_time() < until:
            pass
        self.output_layer()

    def products(self) -> None:
        for count in self.blocks:
            for module in self.body:
                module(self.inputs[module.in_features][:count])

    @torch.no_grad()
    def output_layer(self) -> None:
        for count in self.learned_blocks:
            self.head(self.inputs[self.width][:count])


class Kernels(Floor):
    """The products, and once each what else is needed; attention is torch's own and not reckoned by its FLOPs."""

    def __init__(self, model: Any, rows: Sequence[Encoded], dtype: torch.dtype, at_once: int = 1_024) -> None:
        super().__init__(model, rows, dtype, at_once)
        config = model.config
        self.layers = config.num_hidden_layers
        self.lengths = [len(row.input_ids) for row in rows]
        shape = (1, config.num_attention_heads, max(self.lengths), self.width // config.num_attention_heads)
        self.heads = [torch.randn(shape).to(dtype) for _ in range(3)]
        self.wide = self.inputs[config.intermediate_size]
        self.norm = torch.ones(self.width, dtype=dtype)

    @torch.no_grad()
    def __call__(self) -> None:
        self.products()
        for length in self.lengths:
            queries, keys, values = (states[:, :, :length] for states in self.heads)
            for _ in range(self.layers):
                nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        for count in self.blocks:
            narrow, wide = self.inputs[self.width][:count], self.wide[:count]
            for _ in range(self.layers):
                for _ in range(2):
                    nn.functional.layer_norm(narrow, [self.width], self.norm, self.norm)
                    _ = narrow + narrow
                nn.functional.gelu(wide)
        for count in self.learned_blocks:
            for part in self.parts:
                nn.functional.linear(self.inputs[self.width][:count], part).float().exp_().sum(1)


def _blocks(rows: int, at_once: int) -> list[int]:
    return [min(at_once, rows - first) for first in range(0, rows, at_once)]


def _best(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


if __name__ == "__main__":
    main()
