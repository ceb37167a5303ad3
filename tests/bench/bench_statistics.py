"""What statistics cost at score time, relative to losses alone.

    python tests/bench/bench_statistics.py --rows 64 --length 128 --vocabulary 50304

Scores rows of different lengths with a small GPT-NeoX on one thread. Prints a table of processor
seconds (other work on the machine matters less), best of several passes taken in turn, and one last
line of JSON.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from s2l_ray.core.model.architecture import build  # noqa: E402
from s2l_ray.core.model.cost import scoring_flops  # noqa: E402
from s2l_ray.core.model.scoring import score_statistics  # noqa: E402
from s2l_ray.core.text.encoding import Encoded  # noqa: E402
from tests.bench.frame import finish  # noqa: E402

CHOICES: list[tuple[str, ...]] = [
    (),
    ("mean_probability", "min_probability"),
    ("el2n",),
    ("grand",),
    ("answer_loss",),
    ("mean_probability", "min_probability", "el2n", "grand", "answer_loss"),
]


class Marks:
    """As much of an encoder as scoring looks at."""

    bos, end, pad = None, 0, 0


def main() -> None:
    """Time every choice of statistics, and print what came."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64, help="rows to score")
    parser.add_argument(
        "--length", type=int, default=128, help="longest row, in tokens; the shortest has a quarter"
    )
    parser.add_argument("--vocabulary", type=int, default=50_304, help="V")
    parser.add_argument("--width", type=int, default=256, help="H")
    parser.add_argument("--layers", type=int, default=6, help="layers of the body")
    parser.add_argument(
        "--tokens-per-batch", type=int, default=4_096, help="padded tokens of a pass"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="passes of each choice; the best counts"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the forward pass"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, rows = model_of(args), examples(args)
    best = dict.fromkeys(CHOICES, float("inf"))
    for _ in range(args.repeats):
        for names in CHOICES:
            began = time.process_time()
            score_statistics(
                [model], rows, names, Marks(), args.tokens_per_batch, torch.device("cpu")
            )  # type: ignore[arg-type]
            best[names] = min(best[names], time.process_time() - began)
    results = [result(names, seconds, best[()], model, rows) for names, seconds in best.items()]
    print(f"{'statistics':58}  seconds  rows/s  time  FLOPs (relative to losses alone)")
    for one in results:
        print(
            f"{', '.join(one['statistics']) or 'losses alone':58}  {one['seconds']:7.2f}"
            f"  {one['rows_per_second']:6.1f}  {one['time']:4.2f}  {one['flops']:5.2f}"
        )
    finish("statistics", **vars(args), results=results)


def result(
    names: tuple[str, ...], seconds: float, plain: float, model: Any, rows: list[Encoded]
) -> dict[str, Any]:
    size = sum(parameter.numel() for parameter in model.parameters())
    shape = tuple(model.get_output_embeddings().weight.shape)
    lengths, learned = (
        [len(row.input_ids) for row in rows],
        [int(row.learned.sum()) for row in rows],
    )
    return {
        "statistics": names,
        "seconds": round(seconds, 3),
        "rows_per_second": round(len(rows) / seconds, 1),
        "time": round(seconds / plain, 3),
        "flops": round(
            scoring_flops(size, shape, lengths, learned, names)
            / scoring_flops(size, shape, lengths, learned, ()),
            3,
        ),
    }


def model_of(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        max_position_embeddings=args.length,
    )
    return build(config, args.dtype).eval()


def examples(args: argparse.Namespace) -> list[Encoded]:
    """Rows whose second half is learned, as answers to prompts are."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(args.rows):
        length = int(draw.integers(args.length // 4, args.length + 1))
        ids = draw.integers(0, args.vocabulary, length).astype(np.int32)
        made.append(Encoded(number, ids, np.arange(length) >= max(1, length // 2)))
    return made


if __name__ == "__main__":
    main()
