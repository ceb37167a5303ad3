"""Look at data and write a first job for it.

    python -m s2l_ray.init /data/mixture                                  a small proxy made here
    python -m s2l_ray.init /data/mixture --model EleutherAI/pythia-70m    a proxy of the Hub
    python -m s2l_ray.init /data/mixture --examples.columns.output=reply  with any field of a job

It reads the files once, as a run does, and some of their rows. What it writes fits the data and
this machine. Nothing is trained.
"""

import argparse
import functools
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml

from s2l_ray import api, config
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.data.read import read_part
from s2l_ray.core.storage.store import Store
from s2l_ray.display import say
from s2l_ray.errors import UsageError
from s2l_ray.pipeline.estimate import num_gpus, print_plan
from s2l_ray.run import bare_parser, exit_status, leave, set_up_logging

# Parts that are read for the lengths and sources of rows.
PARTS_READ = 8
# Mean characters of a token of English text in the vocabularies of current models.
CHARACTERS_PER_TOKEN = 4
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
# The paper's epochs, and the default global batch.
EPOCHS, BATCH = 3, 128


@dataclass(frozen=True)
class Data:
    """What was seen of the user's files.

    Attributes:
        rows, files: of all files.
        characters: of each row that was read, int64 [n].
        sources: rows of each source, among those that were read.
        whole_conversations: rows are lists of turns.
    """

    rows: int
    files: int
    characters: np.ndarray
    sources: Counter[str]
    whole_conversations: bool


def main(arguments: list[str] | None = None) -> int:
    """Look, write the job, print its plan. Exit status 0 when the job could be run as it is."""
    parser = bare_parser(__doc__ or "", prog="python -m s2l_ray.init")
    parser.add_argument("data", nargs="+", help="files, folders or globs")
    parser.add_argument("--model", help="the proxy: org/name on the Hugging Face Hub, or a folder")
    parser.add_argument("--out", default="job.yaml", metavar="FILE", help="job.yaml")
    args, overrides = parser.parse_known_args(arguments)
    set_up_logging()
    return exit_status(functools.partial(_init, args, overrides))


def _init(args: argparse.Namespace, overrides: list[str]) -> None:
    path = Path(args.out)
    if path.exists():
        raise UsageError(f"writing {path}: it is there already. Remove it, or name another --out.")
    given = config.with_overrides({"examples": {"files": args.data}}, overrides)
    # Any model and length will do to look at the rows.
    some = config.merge({"proxy": {"model": {"hub": "none/none"}, "epochs": 1}}, given)
    data = look(api.load(some).first)
    job = config.merge(proposed(data, args.model, os.cpu_count() or 1, num_gpus()), given)
    plan = api.plan(api.load(job), "subset", assume=args.model is not None)
    path.write_text(text_of(job, data), encoding="utf-8")
    print_plan(plan)
    say(f"wrote {path}: look at it, then\n  python -m s2l_ray.run --config {path} --until subset")


def look(first: config.Config) -> Data:
    """Find and index the files of a job, and read some rows of them.

    Raises:
        UserError: files that are missing or damaged, columns that fit no schema, a bad row.
    """
    raw = RawFiles(Store(first.run.storage), assume=False)
    section = first.examples
    ranges = raw.ranges(section, "examples")
    chosen = ranges[:: math.ceil(len(ranges) / PARTS_READ)]
    tables = [
        read_part(part, section.columns, section.on_bad_row, section.ignore).table
        for part in chosen
    ]
    characters, sources = [np.empty(0, np.int64)], Counter[str]()
    for table in tables:
        turns = table["messages"].combine_chunks()
        lengths = pc.utf8_length(turns.flatten().field("content")).to_numpy(zero_copy_only=False)
        ends = turns.offsets.to_numpy() - turns.offsets[0].as_py()
        characters.append(np.diff(np.concatenate([[0], np.cumsum(lengths)])[ends]))
        sources.update(table["source"].to_pylist())
    uses = [use for of_file in raw.uses["examples"].values() for use in of_file]
    whole = any(use.becomes == "messages" for use in uses) or any(
        pc.max(pc.list_value_length(table["messages"])).as_py() > 2 for table in tables
    )
    files = len({part.file.uri for part in ranges})
    rows = sum(part.rows for part in ranges)
    return Data(rows, files, np.concatenate(characters), sources, whole)


def proposed(data: Data, model: str | None, cpus: int, gpus: int) -> dict[str, Any]:
    """A job for these data on a machine with so many CPUs and GPUs."""
    # A power of two, so that its micro-batches divide the global batch.
    trainers = 1 << int(math.log2(min(max(1, gpus), BATCH)))
    dtype = "bf16" if gpus else "fp32"
    per_token = 1 if model is None else CHARACTERS_PER_TOKEN
    long = float(np.quantile(data.characters, 0.95)) / per_token if len(data.characters) else 0
    length = next((each for each in LENGTHS if each >= long), LENGTHS[-1])
    if model is None:
        length = min(length, 1024)
    return {
        "run": {"name": "first"},
        "examples": {"files": []},
        "proxy": {
            **_model(model, length),
            "prompt": "plain" if data.whole_conversations or model is None else "alpaca",
            "max_length": length,
            "epochs": EPOCHS,
            "learning_rate": 2e-3 if model is None else 2e-5,
            "dtype": dtype,
        },
        "trajectories": {"dtype": dtype},
        "subset": {"budget": 0.11},
        "scaling": {
            "proxy": {
                "workers": trainers,
                "gpus": min(1, gpus),
                "micro_batch": min(16, BATCH // trainers),
            },
            "trajectories": {"workers": gpus or cpus, "gpus": min(1, gpus)},
            "clusters": {"workers": min(2, cpus)},
        },
    }


def _model(model: str | None, length: int) -> dict[str, Any]:
    if model is not None:
        return {"model": {"path" if Path(model).is_dir() else "hub": model}}
    made = {
        "model_type": "gpt_neox",
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": length,
    }
    return {"model": {"config": made}, "tokenizer": "bytes"}


def text_of(job: dict[str, Any], data: Data) -> str:
    """The job as YAML, a comment above each section."""
    sources = ", ".join(f"{name} ({rows:,})" for name, rows in data.sources.most_common(5))
    more = f" and {len(data.sources) - 5} more" if len(data.sources) > 5 else ""
    mean = data.characters.mean() if len(data.characters) else 0
    comments = {
        "run": f"Written by s2l_ray.init for {data.files:,} files with {data.rows:,} rows; "
        f"{mean:,.0f} characters a row.\nSources among the rows that were read: {sources}{more}.\n"
        "What is not set here (see --help all) is scaled down where the data are few, and it is "
        "said.",
        "examples": "A bad row stops the run; on_bad_row: reject lists and counts it instead.",
        "proxy": "The small model whose losses are recorded. "
        + (
            "It is made here, with random weights and bytes as tokens, so its\nlosses say what is "
            "easy to learn. --model EleutherAI/pythia-70m takes the paper's instead."
            if "config" in job["proxy"]["model"]
            else "max_length holds 95 % of the rows.\nWith a chat template: prompt: chat."
        ),
        "trajectories": "Losses of every row at every checkpoint; sample: 0.25 takes a quarter.",
        "subset": "A share of the rows, or a count. The paper takes 11 % of MathInstruct.",
        "scaling": "What this machine has. It never changes which rows are chosen.",
    }
    pieces = []
    for name, section in job.items():
        comment = "".join(f"# {line}\n" for line in comments.get(name, "").splitlines())
        pieces.append(comment + yaml.safe_dump({name: section}, sort_keys=False, width=100))
    return "\n".join(pieces)


if __name__ == "__main__":
    leave(main())
