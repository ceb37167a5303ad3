"""What the order of training does, and what it costs.

    OMP_NUM_THREADS=1 python tests/bench/bench_order.py [--rows 65536] [--seeds 3]

First: 24 files of 60 rows that are equally hard, each a source of its own. A proxy is trained on
them for one epoch in several orders, and its trajectories are clustered. The normalised mutual
information of cluster and source says how much of the clusters is the order of reading. By chance
it is not 0, as there are few rows a source; what it is then stands beside it.

Second: an epoch reads each part PASSES times. Processor seconds of reading all rows of an epoch in
its order, beside those of cutting them into tokens once.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score

sys.path.insert(0, str(Path(__file__).parents[2]))
import s2l_ray
from s2l_ray import config, pipeline
from s2l_ray.core.model import order as order_module
from s2l_ray.core.model.loading import make_encoder
from s2l_ray.core.model.order import Order
from s2l_ray.stages.training.feed import Rows
from tests import inline_ray, tiny
from tests.bench.frame import finish, show

FILES, ROWS_OF_FILE = 24, 60
# Rows of a window, passes over the parts in an epoch, and whether rows are shuffled beforehand.
ORDERS = {
    "one file after the other": (ROWS_OF_FILE, 1, False),
    "windows of eight files, one pass": (8 * ROWS_OF_FILE, 1, False),
    "as it is": (None, order_module.PASSES, False),
    "as it is, rows shuffled beforehand": (None, order_module.PASSES, True),
}


@contextmanager
def passes(number: int) -> Iterator[None]:
    """An epoch reads each part so often."""
    before, order_module.PASSES = order_module.PASSES, number
    try:
        yield
    finally:
        order_module.PASSES = before


def mutual_information(folder: Path, name: str, seed: int) -> float:
    """Of cluster and source, after a training in one of ORDERS."""
    window, number, shuffled = ORDERS[name]
    draw = random.Random(0)
    rows = [
        {"instruction": f"copy {word}", "output": word, "source": f"s{file:02d}"}
        for file in range(FILES)
        for word in ("".join(draw.choices("abcdefgh", k=6)) for _ in range(ROWS_OF_FILE))
    ]
    if shuffled:
        random.Random(seed).shuffle(rows)
    for file in range(FILES):
        own = rows[file * ROWS_OF_FILE : (file + 1) * ROWS_OF_FILE]
        tiny.write_jsonl(folder / "small" / f"f{file:02d}.jsonl", own)
    tree = tiny.job(folder, evaluation=None, target=None)
    tree["examples"]["files"] = [str(folder / "small")]
    tree["proxy"] |= {"seed": seed, "checkpoints": 12, "learning_rate": 1e-2}
    if window is not None:
        tree["proxy"]["shuffle_window"] = window
    tree["clusters"]["k"] = FILES
    with passes(number), inline_ray.used():
        pipeline.run(pipeline.plan(config.load(None, [], tree), "clusters"))
    stored = s2l_ray.open(str(folder / "storage"))
    clusters = stored.latest("clusters").arrow(["cluster"])["cluster"].to_numpy()
    sources = stored.latest("trajectories").arrow(["source"])["source"].to_pylist()
    return float(normalized_mutual_info_score(sources, clusters))


def reading(folder: Path, count: int) -> dict[str, float]:
    """Processor seconds of an epoch: of reading by passes, and of tokens."""
    draw = random.Random(0)
    text = "".join(draw.choices("abcdefgh ", k=20_000))
    starts = (draw.randrange(len(text) - 800) for _ in range(count))
    rows = [{"instruction": text[n : n + 300], "output": text[n + 300 : n + 600]} for n in starts]
    path = tiny.write_jsonl(folder / "large" / "x.jsonl", rows)
    tree: dict[str, Any] = tiny.job(folder / "large", evaluation=None, target=None)
    # More parts than a window holds: a part whose shares come together is read once.
    tree["examples"] = {"files": [str(path)], "rows_per_part": count // 32}
    tree["proxy"]["shuffle_window"] = count // 8
    job = config.load(None, [], tree)
    with inline_ray.used():
        (done,) = pipeline.run(pipeline.plan(job, "examples"))
    held = Rows(done.node.artifact, done.manifest.parts, "data")
    section, found = job.first.proxy, {}
    encoder = make_encoder(section)
    for number in (1, 2, 4, 8):
        with passes(number):
            order = Order.of([part.rows for part in held.parts], section)
            began = time.process_time()
            taken = sum(
                len(table)
                for window in order.windows()
                for table in held.take(order.rows_of(window))
            )
            found[f"reading, {number} passes"] = time.process_time() - began
            assert taken == count
    began = time.process_time()
    for part in held.parts:
        encoder.examples(held.read(part))
    found["tokens"] = time.process_time() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = {}
    for name in ORDERS:
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder) / str(seed) for seed in range(args.seeds)]
            values = [mutual_information(place, name, n) for n, place in enumerate(places)]
        shared[name] = float(np.mean(values))
    draw, sources = np.random.default_rng(0), np.repeat(np.arange(FILES), ROWS_OF_FILE)
    shared["by chance"] = float(
        np.mean(
            [
                normalized_mutual_info_score(sources, draw.integers(0, FILES, len(sources)))
                for _ in range(9)
            ]
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        seconds = reading(Path(folder), args.rows)
    for title, values in (("mutual information", shared), ("processor seconds", seconds)):
        show(title, ["", title], [[name, f"{value:.3g}"] for name, value in values.items()])
    finish("order", mutual_information=shared, seconds=seconds)


if __name__ == "__main__":
    main()
