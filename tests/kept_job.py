"""A small job with the same numbers on every computer, and what its artifacts hold as plain values.

Its models are built so that every loss is a whole number over a number of tokens: embeddings of
+1 and -1, layers that add nothing, and an output layer so sharp that all probabilities are exactly
0 or 1.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy

from s2l_ray.core.storage.store import Store
from tests import tiny

VOCABULARY, WIDTH, SHARPNESS = 260, 32, 16
BYTE_END = 256
DIGITS = 4
# Of a manifest's info and an artifact's files: what depends on the clock.
OF_THE_CLOCK = {"train_seconds", "wait_seconds"}


def save_model(folder: Path, after: dict[int, int], stride: int = 1) -> Path:
    """A llama that continues token t by after[t], or else by t + stride modulo the vocabulary."""
    signs = np.random.Generator(np.random.PCG64(12)).integers(0, 2, (VOCABULARY, WIDTH)) * 2.0 - 1
    following = [after.get(token, (token + stride) % VOCABULARY) for token in range(VOCABULARY)]
    output = np.full((VOCABULARY, WIDTH), -0.25)
    first_others = sorted(range(VOCABULARY), key=lambda token: token in after)
    output[np.array(following)[first_others]] = signs[first_others]
    none = np.zeros((WIDTH, WIDTH))
    layer = {f"self_attn.{name}_proj": none for name in "qkvo"}
    layer |= {f"mlp.{name}_proj": none for name in ("gate", "up", "down")}
    layer |= {name: np.ones(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}
    weights = {
        "lm_head": SHARPNESS * output,
        "model.embed_tokens": signs,
        "model.norm": np.ones(WIDTH),
        **{f"model.layers.0.{name}": value for name, value in layer.items()},
    }
    config = {
        **tiny.LLAMA,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "rms_norm_eps": 0.0,
        "eos_token_id": BYTE_END,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}.weight": value.astype(np.float32) for name, value in weights.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def write_rows(folder: Path) -> None:
    """Two raw files: rows of three sources, some bad or long, and conversations with tools."""
    rows: list[dict[str, Any]] = tiny.rows(60)
    for number, row in enumerate(rows):
        row["grade"] = number
        row["output"] *= 1 + number % 3
    rows[20]["output"] = "a very long answer " * 9
    rows[30]["instruction"] = "a very long question " * 9
    rows[40] = {"source": "copy", "instruction": "no answer"}
    tiny.write_jsonl(folder / "raw" / "a.jsonl", rows)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    talks = [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": str(number)},
            ],
            "tools": [tool],
        }
        for number in range(6)
    ]
    tiny.write_jsonl(folder / "raw" / "talks.jsonl", talks)
    answers = ["7", " 7 ", "77", "6", "<think>\n\n</think>\n\n7", "7\n", "7."]
    heldout = [
        {"source": f"s{number % 2}", "instruction": "b" * (number + 1), "output": answer}
        for number, answer in enumerate(answers)
    ]
    tiny.write_jsonl(folder / "heldout" / "h.jsonl", heldout)


def exact_job(folder: Path) -> dict[str, Any]:
    """Three proxies and a target that learn nothing, and subsets by several rules."""
    write_rows(folder)
    training = {
        "tokenizer": "bytes",
        "prompt": "plain",
        "max_length": 96,
        "steps": 1,
        "global_batch": 8,
        "learning_rate": 1e-30,
        "dtype": "fp32",
    }
    models = [str(save_model(folder / f"model-{stride}", {}, stride)) for stride in (0, 1, 3)]
    newline, space, seven = (ord(letter) for letter in "\n 7")
    speaker = save_model(folder / "speaker", {newline: space, space: seven, seven: BYTE_END})
    statistics = ["mean_probability", "min_probability", "el2n", "grand", "answer_loss"]
    return {
        "run": {"name": "kept", "storage": str(folder / "storage")},
        "examples": {
            "files": [str(folder / "raw")],
            "rows_per_part": 25,
            "on_bad_row": "reject",
        },
        "proxy": {
            **training,
            "model": {"path": models[0]},
            "checkpoints": 1,
            "members": [{"model": {"path": path}} for path in models],
        },
        "trajectories": {
            "dtype": "fp32",
            "tokens_per_batch": 256,
            "sample": 0.9,
            "statistics": statistics,
        },
        "clusters": {"k": 4, "max_rounds": 4},
        "subset": {"budget": 20, "rows_per_file": 15},
        "scaling": {"proxy": {"micro_batch": 8}, "target": {"micro_batch": 8}},
        "variants": {
            "s2l": {
                "target": {**training, "model": {"path": str(speaker)}},
                "evaluation": {
                    "files": [str(folder / "heldout")],
                    "max_new_tokens": 4,
                    "scores": ["exact", "published", "numeric"],
                    "sets": {"s1": "gsm8k"},
                },
            },
            "within": {
                "clusters": {"k": 2, "within": "source"},
                "subset": {"rule": "s2l_within_sources", "small_last": 2},
            },
            "medoid": {"subset": {"rule": "medoid"}},
            "middle": {
                "subset": {
                    "rule": {"group": "source", "score": "at(loss)", "take": "middle"},
                    "at": "early",
                }
            },
            "covering": {"subset": {"rule": "facility_location"}},
        },
    }


def trained_job(folder: Path) -> dict[str, Any]:
    """A proxy that learns for six steps, whose checkpoints are compared to a few digits."""
    job = exact_job(folder)
    del job["variants"], job["proxy"]["members"]
    job["proxy"] |= {
        "steps": 6,
        "checkpoints": 2,
        "learning_rate": 0.125,
        "warmup_ratio": 0.3,
        "weight_decay": 0.5,
        "adam_epsilon": 0.5,
        "state_every": 3,
        "gradient_clipping": 8.0,
    }
    return job


def artifacts(storage: str, stage: str) -> Iterator[tuple[str, Any]]:
    """The name of each committed artifact of a stage, and what it holds."""
    store = Store(storage)
    for name in sorted(entry.name for entry in Path(storage, stage).iterdir()):
        manifest = json.loads(store.read(f"{stage}/{name}/manifest.json"))

        def read(entry: dict[str, Any], name: str = name) -> Any:
            return _content(entry["name"], store.read(f"{stage}/{name}/{entry['name']}"))

        parts = [
            {
                "index": part["index"],
                "rows": part["rows"],
                "files": {role: read(entry) for role, entry in part["files"].items()},
                "stats": part["stats"],
            }
            for part in manifest["parts"]
        ]
        files = {entry["name"]: read(entry) for entry in manifest["files"]}
        yield name, rounded({"parts": parts, "files": files, "info": manifest["info"]})


def _content(name: str, data: bytes) -> Any:
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data))
        return [[str(field) for field in table.schema], table.to_pylist()]
    if name.endswith(".safetensors"):
        tensors = safetensors.numpy.load(data)
        return {
            key: [list(t.shape), t.sum(), t.ravel()[::37].tolist()]
            for key, t in sorted(tensors.items())
        }
    if "tokenizer" in name or name.endswith("config.json"):
        # what other libraries write of a model changes with their versions
        return None
    return data.decode()


def rounded(value: Any) -> Any:
    """The same value with DIGITS digits after the point, and without what depends on the clock."""
    if isinstance(value, dict):
        return {name: rounded(own) for name, own in value.items() if name not in OF_THE_CLOCK}
    if isinstance(value, list):
        return [rounded(own) for own in value]
    if isinstance(value, float | np.floating):
        return round(float(value), DIGITS) + 0.0
    return value
