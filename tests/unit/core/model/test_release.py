"""The files beside the weights of a target, for whoever uses the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2l_ray.config import Model, Training
from s2l_ray.core.model.release import base_name, release_files
from tests import one_worker, tiny

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def files(**fields: Any) -> dict[str, bytes]:
    section: Training = one_worker.setup(**fields).section
    return release_files(section, "0123abcd", 61)


def test_the_card_names_the_subset_and_the_base_model(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    card = files(tokenizer=str(tmp_path))["README.md"].decode()
    assert "`subset/0123abcd`, 61 rows" in card
    assert "llama, random weights" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Model(hub="org/name@main"), "org/name@main"),
        (Model(path="/models/`a | b`\n# c/"), "/models/ a b # c".rpartition("/")[2]),
    ],
)
def test_a_name_in_the_card_is_no_markup(model: Model, name: str) -> None:
    assert base_name(model) == name


def test_generation_ends_at_the_end_token_that_was_learned(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    written = json.loads(files(tokenizer=str(tmp_path))["generation_config.json"])
    tokens = json.loads(files(tokenizer=str(tmp_path))["tokenizer.json"])["added_tokens"]
    assert written["eos_token_id"] == [t["id"] for t in tokens if t["content"] == "<|end|>"]


def test_the_template_that_was_trained_with_is_stored(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    made = files(tokenizer=str(tmp_path), prompt="chat", template=str(tmp_path / "own.jinja"))
    assert made["chat_template.jinja"].decode() == TEMPLATE
