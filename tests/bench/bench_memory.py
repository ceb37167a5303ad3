"""Planned memory of a training worker, beside what its tensors hold and what its process takes.

    python tests/bench/bench_memory.py                              every ZeRO stage, a small model
    python tests/bench/bench_memory.py --hidden 1024 --layers 20    a model of 320M parameters

Each setting is trained for two steps in processes of its own. `planned` is
core/model/footprint.py; `tensors` is the most that the storages of tensors held
(torch.distributed._tools.mem_tracker); `process` is the peak of the resident memory above that of a
worker before it builds its model. Expectation: planned within 10 % of tensors, and of the process
for models from 300M parameters.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from tests.bench.frame import finish, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--presets", nargs="+", default=["zero1", "zero2", "zero3"])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        _train(json.loads(args.one))
        return
    rows = []
    for preset, dtype, workers in itertools.product(args.presets, args.dtypes, args.workers):
        setting = {**vars(args), "preset": preset, "dtype": dtype, "workers": workers}
        found = _measure({**setting, "traced": True})
        # The tracker itself takes memory.
        found["process"] = _measure({**setting, "traced": False})["process"]
        rows.append({"preset": preset, "dtype": dtype, "workers": workers, **found})
    columns = ["preset", "dtype", "workers", "planned", "tensors", "process"]
    show(
        "memory of a training worker, MiB",
        [*columns, "planned / tensors", "planned / process"],
        [
            [
                *(row[name] if name in columns[:3] else f"{row[name]:,.0f}" for name in columns),
                f"{row['planned'] / row['tensors']:.2f}",
                f"{row['planned'] / row['process']:.2f}",
            ]
            for row in rows
        ],
    )
    finish("memory", rows=rows)


def _measure(setting: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.bench_memory", "--one"]
        processes = [
            subprocess.Popen(
                [*command, json.dumps({**setting, "rank": rank, "folder": folder})],
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[2],
            )
            for rank in range(setting["workers"])
        ]
        said = [process.communicate()[0] for process in processes]
    return json.loads(said[0].splitlines()[-1])


class _Nowhere:
    """Files of a training that stores nothing."""

    def write(self, path: str, data: bytes) -> None: ...
    def read(self, path: str) -> bytes:
        raise KeyError(path)

    def list(self, folder: str) -> list[str]:
        return []

    def delete(self, folder: str) -> None: ...


def _train(setting: dict[str, Any]) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    from s2l_ray.config import Training, TrainingWorkers
    from s2l_ray.core.memory import keep_freed_memory
    from s2l_ray.core.model import training
    from s2l_ray.core.model.architecture import build, load_config
    from s2l_ray.core.model.footprint import footprint
    from s2l_ray.core.model.schedule import TrainingSetup
    from s2l_ray.core.model.tensors import DTYPES
    from s2l_ray.core.model.workers import Worker
    from s2l_ray.core.text.encoding import Encoded

    rank, workers = setting["rank"], setting["workers"]
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(setting["folder"], "store"), workers)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    hidden, rows, tokens = (setting[name] for name in ("hidden", "rows", "tokens"))
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": setting["layers"], "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "vocab_size": setting["vocabulary"],
    }  # fmt: skip
    section = Training(
        model={"config": config}, tokenizer="bytes", steps=2, max_length=tokens,
        global_batch=2 * rows * workers, dtype=setting["dtype"], deepspeed=setting["preset"],
    )  # fmt: skip
    scaling = TrainingWorkers(
        workers=workers, micro_batch=rows, activation_checkpointing=setting["checkpointing"]
    )
    planned = footprint(section, scaling, tokens)
    assert planned is not None
    loaded = load_config(section.model)
    with torch.device("meta"):
        shapes = dict(build(loaded).state_dict())

    def batches(first_step: int) -> Iterator[list[Encoded]]:
        for _ in range(first_step, 2):
            ids = np.arange(tokens, dtype=np.int32) % 256
            yield [Encoded(row, ids, np.arange(tokens) > 0) for row in range(2 * rows)]

    # What is measured is the training: checkpoints and the trial of the model are not.
    training.save_checkpoint = lambda *_, **__: None  # type: ignore[assignment]
    training.check_causal = lambda *_, **__: None  # type: ignore[assignment]
    keep_freed_memory()
    tracker = MemTracker()
    if setting["traced"]:
        plain = training.token_losses

        def token_losses(*args: Any, **kwargs: Any) -> torch.Tensor:
            tracker.reset_mod_stats()
            return plain(*args, **kwargs)

        training.token_losses = token_losses  # type: ignore[assignment]
        tracker.__enter__()
    idle = _status("VmRSS")
    training.train(
        lambda: build(loaded, dropout=False),
        lambda name: torch.zeros(shapes[name].shape, dtype=DTYPES[setting["dtype"]]),
        TrainingSetup(section, 2, (2,), scaling),
        batches,
        _Nowhere(),
        Worker(rank, workers, torch.device("cpu")),
        lambda entry: None,
    )
    peak = tracker.get_tracker_snapshot("peak") if setting["traced"] else {}
    tensors = sum(
        size for kinds in peak.values() for kind, size in kinds.items() if kind == "Total"
    )
    mib = {"planned": planned.peak, "tensors": tensors, "process": _status("VmHWM") - idle}
    print(json.dumps({name: size / 2**20 for name, size in mib.items()}), flush=True)
    distributed.destroy_process_group()


def _status(field: str) -> int:
    """Bytes that /proc says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
