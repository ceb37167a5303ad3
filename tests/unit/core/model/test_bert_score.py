"""BERTScore beside its formula over single tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from s2l_ray.config import Model
from s2l_ray.core.model.bert_score import BertScore
from s2l_ray.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights, and a tokenizer that adds tokens around a text."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    made = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (made / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={word: n for n, word in enumerate(words)}).save_pretrained(made)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(made)
    return made


def by_hand(scorer: BertScore, answer: str, gold: str, layer: int) -> float:
    def states(text: str) -> list[Any]:
        ids = scorer.tokenizer(text, return_tensors="pt")
        hidden = scorer.model(**ids, output_hidden_states=True).hidden_states[layer][0, 1:-1]
        return list(hidden.detach())

    one, other = states(answer), states(gold)
    table = [[torch.cosine_similarity(a, b, dim=0).item() for b in other] for a in one]
    precision = sum(map(max, table)) / len(one)
    recall = sum(map(max, zip(*table, strict=True))) / len(other)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [None, 1])
def test_scores_are_those_of_the_formula(folder: Path, layer: int | None) -> None:
    scorer = BertScore(Model(path=str(folder)), layer, "cpu")
    answers, golds = ["a b c", "d e", "a", ""], ["a c", "d e", "f g h a b", "a"]
    found = scorer.f1(answers, golds)
    wanted = [by_hand(scorer, *pair, layer or 2) for pair in zip(answers[:3], golds, strict=False)]
    assert found == pytest.approx([*wanted, 0.0], abs=1e-5)
    assert found[1] == pytest.approx(1.0, abs=1e-5)


def test_a_model_or_layer_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 layers"):
        BertScore(Model(path=str(folder)), 3, "cpu")
    with pytest.raises(UserError, match=r"loading evaluation.bert_model"):
        BertScore(Model(path=str(tmp_path)), None, "cpu")
