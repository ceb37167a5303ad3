"""Rows a second from raw JSON lines to tokens with labels, beside the `datasets` library.

    python tests/bench/bench_prepare.py --rows 1000000

Writes short alpaca-like rows as JSONL and trains a small BPE tokenizer on some of them. Then both
run in turns, with the same tokenizer and two processes each. Ours hashes and cuts the files, reads
the parts into conversations, and encodes them; theirs is `load_dataset("json")` and a batched
`map`. Both end with Arrow files of token ids and of what is learned. Theirs finds what is learned
by the faster of the two usual methods, which are measured first: from the offsets of the tokens, or
by tokenising the prompt alone (which may be wrong by a token). The tokens are compared. Prints a
table, and one last line of JSON: medians, and ours to theirs from the same run.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# One thread in each of the processes that share the machine.
os.environ.update({"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402

from s2l_ray.config import Columns  # noqa: E402
from s2l_ray.core.data.find import find_files  # noqa: E402
from s2l_ray.core.data.parts import PartRange, part_ranges  # noqa: E402
from s2l_ray.core.data.read import index_file, read_part  # noqa: E402
from s2l_ray.core.text.encoding import Encoded, Encoder  # noqa: E402
from s2l_ray.core.text.headings import STYLES  # noqa: E402
from tests.bench.frame import finish  # noqa: E402

PROCESSES = 2
MAX_LENGTH = 512
IGNORED = -100


def texts(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Instructions of 5 to 25 words, an input for a third of them, and outputs of 1 to 60 words.

    Words are about as frequent as in English (Zipf's law).
    """
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    words = [
        "".join(draw.choices(letters, k=draw.randint(1, 3) + draw.randint(0, 7)))
        for _ in range(20_000)
    ]
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, cum_weights=weights, k=draw.randint(low, high))) + "."

    for _ in range(count):
        yield {
            "instruction": text(5, 25),
            "input": text(3, 20) if draw.random() < 1 / 3 else "",
            "output": text(1, 60),
        }


def write(folder: Path, rows: int) -> None:
    """The rows in two files, so that both can be read with two processes."""
    for number in range(PROCESSES):
        count = rows // PROCESSES + (number < rows % PROCESSES)
        with (folder / f"{number}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in texts(count, number))


def trained_tokenizer(folder: Path) -> Any:
    """A byte-level BPE with 8,000 tokens, in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8_000, initial_alphabet=alphabet, show_progress=False)
    seen = texts(5_000, seed=99)
    tokenizer.train_from_iterator(
        (STYLES["alpaca"].opening + " ".join(row.values()) for row in seen), trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


# ---- ours


def ours(raw: Path, tokenizer: Any, rows_per_part: int, out: Path) -> list[Path]:
    """Hash, cut, read, encode and write every part; the files in the order of the rows."""
    encoder = Encoder(tokenizer, "alpaca", MAX_LENGTH)
    files = find_files([str(raw)], None)
    with ProcessPoolExecutor(
        PROCESSES, multiprocessing.get_context("fork"), initializer=_give, initargs=(encoder, out)
    ) as pool:
        indexes = list(pool.map(index_file, files, itertools.repeat(rows_per_part)))
        return list(pool.map(_encode_part, part_ranges(files, indexes)))


def _give(encoder: Encoder, out: Path) -> None:
    # What a worker process keeps.
    global GIVEN
    GIVEN = (encoder, out)


def _encode_part(part: PartRange) -> Path:
    encoder, out = GIVEN
    encoded = encoder.examples(read_part(part, Columns()).table)
    path: Path = out / f"{part.index:06d}.arrow"
    table = _columns(encoded)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def _columns(encoded: list[Encoded]) -> pa.Table:
    ends = pa.array(np.cumsum([0, *(len(example.input_ids) for example in encoded)]), pa.int32())
    ids, learned = (
        np.concatenate([getattr(example, name) for example in encoded])
        for name in ("input_ids", "learned")
    )
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(ends, ids),
            "learned": pa.ListArray.from_arrays(ends, pa.array(learned)),
        }
    )


# ---- theirs


def theirs(raw: Path, tokenizer: Any, encode: Callable[..., Any], cache: Path) -> Any:
    """What a script with the `datasets` library does; every run with a cache of its own."""
    from datasets import load_dataset

    files = [str(path) for path in sorted(raw.iterdir())]
    rows = load_dataset(
        "json", data_files=files, split="train", cache_dir=str(cache), num_proc=PROCESSES
    )
    options = {"tokenizer": tokenizer}
    return rows.map(
        encode,
        batched=True,
        num_proc=PROCESSES,
        remove_columns=rows.column_names,
        fn_kwargs=options,
    )


def prompts(rows: dict[str, list[str]]) -> list[str]:
    """The paper's prompt of each row."""
    style = STYLES["alpaca"]
    return [
        (
            f"{style.opening_with_input}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
            if input
            else f"{style.opening}\n\n### Instruction:\n{instruction}"
        )
        + "\n\n### Response:"
        for instruction, input in zip(rows["instruction"], rows["input"], strict=True)
    ]


def by_offsets(rows: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    """Labels from the offsets of the tokens of the whole text."""
    asked = prompts(rows)
    whole = [prompt + output for prompt, output in zip(asked, rows["output"], strict=True)]
    made = tokenizer(
        whole,
        truncation=True,
        max_length=MAX_LENGTH - 1,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    ids = [[*row, tokenizer.eos_token_id] for row in made["input_ids"]]
    labels = [
        [
            *(
                token if end > len(prompt) else IGNORED
                for token, (_, end) in zip(row, offsets, strict=True)
            ),
            tokenizer.eos_token_id,
        ]
        for row, offsets, prompt in zip(
            made["input_ids"], made["offset_mapping"], asked, strict=True
        )
    ]
    return {"input_ids": ids, "labels": labels}


def by_prompts(rows: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    """Labels from the length of the prompt tokenised alone."""
    asked = prompts(rows)
    whole = [prompt + output for prompt, output in zip(asked, rows["output"], strict=True)]
    alone = tokenizer(
        asked, truncation=True, max_length=MAX_LENGTH - 1, return_attention_mask=False
    )["input_ids"]
    made = tokenizer(
        whole, truncation=True, max_length=MAX_LENGTH - 1, return_attention_mask=False
    )["input_ids"]
    ids = [[*row, tokenizer.eos_token_id] for row in made]
    labels = [
        [IGNORED] * len(prompt) + row[len(prompt) :] for prompt, row in zip(alone, ids, strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


# ---- side by side


def main() -> None:
    """Write the rows, run both in turns, compare what they make, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows")
    parser.add_argument("--repeats", type=int, default=3, help="times that each runs")
    parser.add_argument("--rows-per-part", type=int, default=16_384, help="rows of a part of ours")
    args = parser.parse_args()
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch_:
        scratch = Path(scratch_)
        for name in ("raw", "few", "tokenizer"):
            (scratch / name).mkdir()
        write(scratch / "raw", args.rows)
        write(scratch / "few", 10_000)
        tokenizer = trained_tokenizer(scratch / "tokenizer")
        tried = {
            method: seconds(partial(theirs, scratch / "few", tokenizer, method), scratch)[0]
            for method in (by_offsets, by_prompts)
        }
        encode = min(tried, key=lambda method: tried[method].wall)
        took: dict[str, list[Seconds]] = {"ours": [], "theirs": []}
        for _ in range(args.repeats):
            mine, parts = seconds(
                partial(ours, scratch / "raw", tokenizer, args.rows_per_part), scratch
            )
            other, rows = seconds(partial(theirs, scratch / "raw", tokenizer, encode), scratch)
            took["ours"].append(mine)
            took["theirs"].append(other)
        different = compare(parts, rows)
    by_name = {method.__name__: one for method, one in tried.items()}
    report(args.rows, took, by_name, different)


class Seconds(NamedTuple):
    """How long one run took, and the processors' time of all its processes."""

    wall: float
    processor: float


def seconds(make: Callable[[Path], Any], scratch: Path) -> tuple[Seconds, Any]:
    """What one run takes in an empty folder of its own, and what it made."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    began, before = time.monotonic(), processor_seconds()
    made = make(folder)
    return Seconds(time.monotonic() - began, processor_seconds() - before), made


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compare(parts: list[Path], rows: Any) -> dict[str, int]:
    """Number of rows with other tokens, and with other marks, of the first 20,000."""
    mine = pa.concat_tables([pa.ipc.open_file(path).read_all() for path in parts]).slice(0, 20_000)
    other = rows.select(range(mine.num_rows)).to_dict()
    different = {"tokens": 0, "marks": 0}
    for ids, learned, their_ids, labels in zip(
        *mine.to_pydict().values(), other["input_ids"], other["labels"], strict=True
    ):
        different["tokens"] += ids != their_ids
        different["marks"] += learned != [label != IGNORED for label in labels]
    return different


def report(
    rows: int, took: dict[str, list[Seconds]], tried: dict[str, Seconds], different: dict[str, int]
) -> None:
    """A table for people and one line for machines."""
    for name, runs in took.items():
        wall, processor = (statistics.median(times) for times in zip(*runs, strict=True))
        print(
            f"{name:8} {rows / wall:10,.0f} rows/s {wall:8.1f} s {processor:8.1f} s of processors' "
            "time"
        )
    pairs = list(zip(took["theirs"], took["ours"], strict=True))
    ratios = {
        field: round(statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs), 3)
        for field in Seconds._fields
    }
    method = min(tried, key=lambda name: tried[name].wall)
    print(
        f"ours is {ratios['wall']:.2f} x theirs, {ratios['processor']:.2f} x by processors' time "
        f"(labels {method}); rows that differ: {different}"
    )
    result = {
        "rows": rows,
        "processes": PROCESSES,
        "rows_per_second": {
            name: round(rows / statistics.median(run.wall for run in runs))
            for name, runs in took.items()
        },
        "ours_to_theirs": ratios,
        "labels": method,
        "tried": {name: round(one.wall, 2) for name, one in tried.items()},
        "different": different,
        "runs": {
            name: [[round(one, 2) for one in run] for run in runs] for name, runs in took.items()
        },
    }
    finish("prepare", **result)


if __name__ == "__main__":
    main()
