r"""Scoring with our code, with the authors' method, and lower bounds of the time.

    OMP_NUM_THREADS=1 python tests/bench/bench_scoring.py --dtypes fp32 bf16
    python tests/bench/bench_scoring.py --dtypes bf16 --scorers 1x2 2x1
    # eight models in one pass, and in eight
    python tests/bench/bench_scoring.py --dtypes bf16 --checkpoints 8
    # on a GPU
    python tests/bench/bench_scoring.py --device cuda --dtypes bf16 \
        --tokens-per-batch 16384 131072 --tokens 2000000 \
        --authors-tokens 20000 --checkpoints 4 --profile FOLDER

The model is a GPT-NeoX of the shape of Pythia-70M; rows have 40 to 512 tokens, half of them
learned. All sides score the same rows in turn, each in a process of its own:

* `authors`: one example per forward pass, all logits, the loss fetched after each pass (their
  method, rewritten).
* `ours`: core.scoring.score.
* `family`: the base model of transformers over our batches, and only the product of the output
  layer for learned tokens. No scorer that keeps the family's own code can be faster.
* `kernels`: the products and, once each, torch's kernels for what else the model needs, on pieces
  that stay in the cache: attention, layer norms, GELU, additions, exponentials of the loss (no
  rotations, no biases, no padding). No scorer made of torch's kernels can be faster.
* `floor`: only the necessary matrix products, at the model's own shapes and dtype: the body's for
  every token, the output layer's for learned tokens, and the FLOPs of attention at the rate of the
  body's.

The rows are every n-th batch of a part, so that a short run pads as a whole part does. Seconds are
of the processor; on a GPU they are of the clock, after all work has ended. --profile writes a table
of the operations of `ours` and their time.

With `--scorers`, NxM means N scorers of M threads, each with all of the rows; seconds are of the
clock, so the machine has to be quiet.
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

from s2l_ray.core.memory import keep_freed_memory  # noqa: E402
from s2l_ray.core.model.architecture import build  # noqa: E402
from s2l_ray.core.model.scoring import score  # noqa: E402
from s2l_ray.core.text.batching import dense_batches, pad  # noqa: E402
from s2l_ray.core.text.encoding import Encoded  # noqa: E402
from tests.bench.frame import finish, in_turn, ratio, show  # noqa: E402

SHORTEST, LONGEST = 40, 512
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Job:
    """What a process runs, the rows of its part, and about how many tokens it scores."""

    side: str
    dtype: str
    tokens_per_batch: int
    part: int
    tokens: int
    threads: int
    device: str
    checkpoints: int = 1

    def batches(self) -> list[list[Encoded]]:
        return sampled(examples(self.part), self.tokens_per_batch, self.tokens)

    def own_tokens(self) -> int:
        return sum(len(row.input_ids) for batch in self.batches() for row in batch)

    def now(self) -> float:
        """Seconds, when the device has done all that was asked of it."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """Measure every precision, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--tokens-per-batch",
        nargs="+",
        type=int,
        default=[16_384],
        help="one side for each; the first one's rows are those of the other sides",
    )
    parser.add_argument("--part", type=int, default=1_024, help="rows of the part")
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="about how many of them to score"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--scorers", nargs="+", default=[], help="only compare these, such as 1x2 2x1"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--authors-tokens",
        type=int,
        help="about how many the authors' way scores; default: as many",
    )
    parser.add_argument(
        "--checkpoints", type=int, default=1, help="score so many models in one pass and in as many"
    )
    parser.add_argument(
        "--profile", metavar="FOLDER", help="where to leave what takes the time of ours"
    )
    args = parser.parse_args()
    how = scorers if args.scorers else measured
    results = [how(args, dtype) for dtype in args.dtypes]
    finish("scoring", **vars(args), results=results)


def measured(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Seconds and ratios of all sides at one precision, per token that is not padding.

    Each side runs on its own sample of the part.
    """
    sizes = args.tokens_per_batch
    first = Job("ours", dtype, sizes[0], args.part, args.tokens, args.threads, args.device)
    several = replace(first, checkpoints=args.checkpoints)
    jobs = {
        "authors": replace(first, side="authors", tokens=args.authors_tokens or args.tokens),
        **{f"ours, {size:,}": replace(first, tokens_per_batch=size) for size in sizes},
        **({f"{args.checkpoints} in one pass": several} if args.checkpoints > 1 else {}),
        **(
            {f"{args.checkpoints} passes": replace(several, side="passes")}
            if args.checkpoints > 1
            else {}
        ),
        "family": replace(first, side="family"),
        "kernels": replace(first, side="kernels"),
        "floor": replace(first, side="floor"),
    }
    sides = {name: Apart([job]) for name, job in jobs.items()}
    seconds = timed(sides, args.repeats, by_clock=False)
    work = {name: job.own_tokens() * job.checkpoints for name, job in jobs.items()}
    each = {name: [took / work[name] for took in times] for name, times in seconds.items()}
    rows = sum(len(batch) for batch in first.batches())
    per_row = first.own_tokens() / rows
    table = {
        name: {
            "rows_per_second": 1 / statistics.median(times) / per_row,
            "times_authors": ratio(each["authors"], times),
            "share_of_family": ratio(each["family"], times),
            "share_of_floor": ratio(each["floor"], times),
            "padding": padding(jobs[name])
            if jobs[name].side in ("ours", "passes", "family")
            else 0.0,
        }
        for name, times in each.items()
    }
    show(
        f"{dtype}, {args.threads} thread(s), {rows} rows, {first.own_tokens()} tokens",
        ["side", "rows/s", "x authors", "share of family", "share of floor", "padding %"],
        [[name, *list(one.values())[:-1], 100 * one["padding"]] for name, one in table.items()],
    )
    if args.profile:
        profile(first, Path(args.profile, f"{dtype}.txt"))
    return {"dtype": dtype, "sides": table, "seconds": seconds}


def profile(job: Job, file: Path) -> None:
    """Leave a table of what a side spends its time in."""
    side = made(job)
    side()
    with torch.profiler.profile() as profiled:
        side()
        job.now()
    order = "self_cpu_time_total" if job.device == "cpu" else "self_device_time_total"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(profiled.key_averages().table(sort_by=order, row_limit=40))


def scorers(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Rows a second of all scorers together, by how many there are and their threads."""
    sides, rows = {}, {}
    for name in args.scorers:
        count, threads = map(int, name.split("x"))
        job = Job(
            "ours", dtype, args.tokens_per_batch[0], args.part, args.tokens, threads, args.device
        )
        sides[name] = Apart([job] * count)
        rows[name] = count * sum(len(batch) for batch in job.batches())
    seconds = timed(sides, args.repeats, by_clock=True)
    rates = {name: rows[name] / statistics.median(times) for name, times in seconds.items()}
    show(
        f"{dtype}, scorers x threads",
        ["side", "rows/s"],
        [[name, rate] for name, rate in rates.items()],
    )
    return {"dtype": dtype, "rows_per_second": rates, "seconds": seconds}


class Apart:
    """A side in processes of its own; a call has all of them run once, together.

    Attributes:
        spent: seconds of all calls, see Job.now.
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
        clock = (
            time.perf_counter if by_clock else lambda: sum(side.spent for side in sides.values())
        )
        return in_turn(sides, repeats, clock=clock)
    finally:
        for side in sides.values():
            side.end()


def serve(pipe: Any, job: Job) -> None:
    """Run a side on every request, and send the seconds."""
    torch.set_num_threads(job.threads)
    if job.side != "authors":
        keep_freed_memory()
    side = made(job)
    while True:
        pipe.recv()
        began = job.now()
        side()
        pipe.send(job.now() - began)


def made(job: Job) -> Callable[[], Any]:
    models, batches = (
        [build(pythia(), job.dtype).to(job.device).eval() for _ in range(job.checkpoints)],
        job.batches(),
    )
    model = models[0]
    rows = [row for batch in batches for row in batch]
    if job.side == "authors":
        return lambda: authors(model, rows)
    if job.side == "ours":
        return lambda: ours(models, batches, job)
    if job.side == "passes":
        return lambda: [ours([one], batches, job) for one in models]
    if job.side == "kernels":
        return Kernels(model, rows, job)
    floor = Floor(model, rows, job)
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
    """Batches of the part with about `tokens` tokens in all, evenly spread over their lengths."""
    batches = dense_batches([len(row.input_ids) for row in part], tokens_per_batch)
    share = tokens / sum(len(row.input_ids) for row in part)
    count = max(1, min(len(batches), round(share * len(batches))))
    return [
        [part[row] for row in batches[round((n + 0.5) * len(batches) / count - 0.5)]]
        for n in range(count)
    ]


def padding(job: Job) -> float:
    """Padded tokens of a whole part beside its own, minus 1."""
    lengths = [len(row.input_ids) for row in examples(job.part)]
    batches = dense_batches(lengths, job.tokens_per_batch)
    return sum(len(one) * max(lengths[row] for row in one) for one in batches) / sum(lengths) - 1


@torch.no_grad()
def authors(model: Any, rows: Sequence[Encoded]) -> list[float]:
    """One example per forward pass, logits of all positions, the loss fetched after each."""
    losses = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()[None].to(model.device)
        labels = ids.masked_fill(~torch.from_numpy(row.learned)[None].to(model.device), -100)
        losses.append(model(input_ids=ids, labels=labels).loss.cpu().item())
    return losses


def ours(models: Sequence[Any], batches: Sequence[Sequence[Encoded]], job: Job) -> None:
    for batch in batches:
        score(models, batch, 0, job.tokens_per_batch, torch.device(job.device))


@torch.no_grad()
def family(model: Any, batches: Sequence[Sequence[Encoded]], floor: "Floor") -> None:
    """The base model of transformers over padded batches, and the output layer's product."""
    for batch in batches:
        model.base_model(
            input_ids=torch.from_numpy(pad(batch, 0)[0]).to(model.device), use_cache=False
        )
    floor.output_layer()


class Floor:
    """The products that are needed to score rows, without anything between them.

    Products run on 1,024 rows at a time, which is fastest on a CPU (on a GPU a batch at a time).
    The output layer's product is the faster of two: whole, or in blocks of 512 tokens of the
    vocabulary, whose logits stay in the cache.
    """

    def __init__(self, model: Any, rows: Sequence[Encoded], job: Job) -> None:
        self.job, at_once = job, 1_024 if job.device == "cpu" else job.tokens_per_batch
        head, width = model.get_output_embeddings(), model.config.hidden_size
        lengths, learned = (
            [len(row.input_ids) for row in rows],
            [int(row.learned.sum()) for row in rows],
        )
        self.body = [
            module
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        self.blocks, self.learned_blocks = (
            _blocks(sum(lengths), at_once),
            _blocks(sum(learned), at_once),
        )
        self.inputs = {
            size: torch.randn(at_once, size).to(head.weight)
            for size in {m.in_features for m in self.body}
        }
        # scores and their use, of the lower triangle only: 2 products of n^2 / 2 pairs, 2 FLOPs
        # each, in every layer
        attention = sum(2.0 * n * n * width for n in lengths) * model.config.num_hidden_layers
        products = sum(2.0 * m.weight.numel() for m in self.body) * sum(lengths)
        self.more = attention / products
        self.parts = head.weight.detach().split(512)
        ways: list[Callable[[torch.Tensor], Any]] = [
            lambda x: nn.functional.linear(x, head.weight),
            lambda x: [nn.functional.linear(x, part) for part in self.parts],
        ]
        with torch.no_grad():
            self.head = min(ways, key=lambda way: _best(lambda: way(self.inputs[width]), job))
        self.width = width

    @torch.no_grad()
    def __call__(self) -> None:
        began = self.job.now()
        self.products()
        ended = self.job.now()
        while self.job.now() - ended < self.more * (ended - began):
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
    """The products, and once each what else is needed.

    Attention runs torch's own kernel instead of products of equal FLOPs.
    """

    def __init__(self, model: Any, rows: Sequence[Encoded], job: Job) -> None:
        super().__init__(model, rows, job)
        config = model.config
        self.layers = config.num_hidden_layers
        self.lengths = [len(row.input_ids) for row in rows]
        shape = (
            1,
            config.num_attention_heads,
            max(self.lengths),
            self.width // config.num_attention_heads,
        )
        self.heads = [torch.randn(shape).to(self.parts[0]) for _ in range(3)]
        self.wide = self.inputs[config.intermediate_size]
        self.norm = torch.ones(self.width).to(self.parts[0])

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


def _best(call: Callable[[], Any], job: Job) -> float:
    times = []
    for _ in range(3):
        began = job.now()
        call()
        times.append(job.now() - began)
    return min(times)


if __name__ == "__main__":
    main()
