"""What makes a checkpoint a model folder that others can use: tokenizer, chat template, how to
generate, and a card that says what it was made from.
"""

import json
import os
import re
import tempfile
from typing import Any

from s2l_ray.config import Model, Training
from s2l_ray.core.model.loading import load_tokenizer, template_text
from s2l_ray.core.model.places import pretrained


def release_files(section: Training, subset: str, rows: int) -> dict[str, bytes]:
    """Contents of the files beside the weights and config.json, by name.

    Args:
        subset: fingerprint of the rows that it was trained on.
        rows: how many these are.
    """
    tokenizer = load_tokenizer(section)
    template = template_text(section)
    if template is not None:
        tokenizer.chat_template = template
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        _generation_config(section.model, tokenizer).save_pretrained(scratch)
        for name in sorted(os.listdir(scratch)):
            with open(os.path.join(scratch, name), "rb") as file:
                found[name] = file.read()
    return {**found, "README.md": _card(section, subset, rows).encode()}


def _generation_config(model: Model, tokenizer: Any) -> Any:
    """That of the base model, ending where the tokenizer's end token is learned too."""
    from transformers import GenerationConfig

    made = GenerationConfig()
    if model.config is None:
        place, options = pretrained(model)
        try:
            made = GenerationConfig.from_pretrained(place, **options)
        except OSError:
            # Not every model has one.
            made = GenerationConfig()
    ends = made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]
    made.eos_token_id = sorted({*ends, tokenizer.eos_token_id} - {None})
    if made.pad_token_id is None:
        own = tokenizer.pad_token_id
        made.pad_token_id = tokenizer.eos_token_id if own is None else own
    return made


def _card(section: Training, subset: str, rows: int) -> str:
    """The model card: what Hugging Face reads of it, then words for people."""
    model = section.model
    base = base_name(model)
    facts = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["s2l_ray", *([] if section.adapter is None else [section.adapter.kind])],
    }
    if model.hub is not None:
        facts["base_model"] = model.hub.partition("@")[0]
    # JSON is YAML too, and quotes what a name holds.
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in facts.items())
    length = f"{section.epochs} epochs" if section.epochs else f"{section.steps} steps"
    way = "" if section.adapter is None else f" with {section.adapter.kind} (merged)"
    return f"""---
{head}
---
# Fine-tuned on a subset chosen by s2l_ray

| | |
| --- | --- |
| base model | `{base}` |
| subset | `subset/{subset}`, {rows} rows |
| training | {length}{way}, {section.global_batch} rows a step, peak learning rate \
{section.learning_rate:g}, seed {section.seed} |
| prompt | {section.prompt} |
"""


def base_name(model: Model) -> str:
    """What to call the base model, in one line without marks of Markdown."""
    path = (model.path or "").rstrip("/").rpartition("/")[2]
    name = model.hub or path or f"{(model.config or {}).get('model_type')}, random weights"
    return re.sub(r"[`|\s]+", " ", name)
