"""Tiny data, models and jobs for the tests; nothing is downloaded."""

import json
import random
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


GPT_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "max_position_embeddings": 256,
}


def save_tokenizer(folder: Path) -> Path:
    """A small byte-level BPE tokenizer that joins letters, so that its tokens are not those of
    `bytes`.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    texts = [f"{row['instruction']}\n{row['output']}" for row in rows(400, seed=7)]
    trained.train_from_iterator(texts, vocab_size=300, min_frequency=2, special_tokens=["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Alpaca rows of three unequal sources, with a column of their own."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        source = draw.choices(["copy", "upper", "sum"], [6, 3, 1])[0]
        word = "".join(draw.choices("abcdefgh", k=draw.randint(1, 8)))
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        text, answer = {
            "copy": (f"copy {word}", word),
            "upper": (f"upper {word}", word.upper()),
            "sum": (f"sum {a} {b}", str(a + b)),
        }[source]
        made.append(
            {
                "id": f"row-{number}",
                "source": source,
                "instruction": text,
                "input": "",
                "output": answer,
            }
        )
    return made


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def job(folder: Path, count: int = 300, **sections: Any) -> dict[str, Any]:
    """A whole job on a few hundred rows: 2 parts files, T = 3, K = 5, 60 of the rows chosen."""
    half = count // 2
    content = rows(count)
    write_jsonl(folder / "raw" / "a.jsonl", content[:half])
    write_jsonl(folder / "raw" / "b.jsonl", content[half:])
    write_jsonl(folder / "heldout" / "h.jsonl", rows(30, seed=1))
    training = {
        "model": {"config": LLAMA},
        "tokenizer": "bytes",
        "prompt": "plain",
        "max_length": 64,
        "global_batch": 16,
        "learning_rate": 3e-3,
        "dtype": "fp32",
        "state_every": 5,
    }
    base: dict[str, Any] = {
        "run": {"name": "tiny", "storage": str(folder / "storage")},
        "examples": {"files": [str(folder / "raw")], "rows_per_part": 64},
        "proxy": {**training, "epochs": 1, "checkpoints": 3},
        "trajectories": {"dtype": "fp32", "tokens_per_batch": 2048},
        "clusters": {"k": 5, "max_rounds": 20},
        "subset": {"budget": 60, "rows_per_file": 25},
        "target": {**training, "steps": 6, "deepspeed": "zero2"},
        "evaluation": {"files": [str(folder / "heldout")], "max_new_tokens": 8},
        "scaling": {
            "proxy": {"micro_batch": 8},
            "trajectories": {"workers": 1},
            "target": {"micro_batch": 8},
            "evaluation": {"workers": 1},
            "local_cpus": 2,
            "local_object_store": 100_000_000,
        },
    }
    for section, changes in sections.items():
        base[section] = changes if changes is None else {**base.get(section, {}), **changes}
    return {name: value for name, value in base.items() if value is not None}
