"""Scores of an answer against the gold one, by name (but bert_score, which needs a model)."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from s2l_ray.core.answers import numeric, published
from s2l_ray.core.answers.verified import Verifier
from s2l_ray.core.text.turns import without_thought
from s2l_ray.errors import UserError

# Scores that say right or wrong of mathematics; rows about which they differ are told.
RULES = ("published", "numeric", "math_verify")
# What a score imports that not everybody has.
NEEDED = {"math_verify": "math_verify", "rouge_l": "rouge_score", "bleu": "sacrebleu"}


def check_installed(names: Sequence[str]) -> None:
    """Refuse scores whose packages are not there."""
    for name in names:
        if name in NEEDED and importlib.util.find_spec(NEEDED[name]) is None:
            raise UserError(
                f"preparing evaluation.scores: {name} needs the package {NEEDED[name]}, which is "
                "not installed. Install it (pip install 's2l_ray[evaluation]'), or leave the score "
                "out."
            )


def equal_text(answer: str, gold: str) -> bool:
    """Whether two answers are the same text but for thoughts before them and space around them."""
    return without_thought(answer) == without_thought(gold)


class Scorer:
    """Scores answers by the named scores.

    Args:
        sets: which of the six sets a source is, where its name does not say it.
    """

    def __init__(self, names: Sequence[str], sets: Mapping[str, str]) -> None:
        check_installed(names)
        self.names, self.sets = [name for name in names if name != "bert_score"], sets
        self.verifier = Verifier()
        self._rouge: Any = None
        self._bleu: Any = None
        if "rouge_l" in names:
            from rouge_score.rouge_scorer import RougeScorer

            self._rouge = RougeScorer(["rougeL"], use_stemmer=True)
        if "bleu" in names:
            from sacrebleu.metrics import BLEU

            self._bleu = BLEU(effective_order=True)

    def set_of(self, source: str) -> str | None:
        name = self.sets.get(source, source)
        return name if name in published.SETS else None

    def is_empty(self, source: str, answer: str) -> bool:
        """Whether an answer gives nothing, so that it is asked for again."""
        name = self.set_of(source)
        return not (published.answer_of(name, answer) if name else answer.strip())

    def scores(self, source: str, answer: str, gold: str) -> dict[str, bool | float | None]:
        """Every score of one answer; `published` is None for what is none of the six sets."""
        return {name: self._score(name, source, answer, gold) for name in self.names}

    def _score(self, name: str, source: str, answer: str, gold: str) -> bool | float | None:
        if name == "exact":
            return equal_text(answer, gold)
        answer, gold = without_thought(answer), without_thought(gold)
        if name == "published":
            own = self.set_of(source)
            return published.correct(own, answer, gold) if own else None
        if name == "numeric":
            return numeric.correct(answer, gold)
        if name == "math_verify":
            return self.verifier.correct(answer, gold)
        if name == "rouge_l":
            return float(self._rouge.score(gold, answer)["rougeL"].fmeasure)
        return float(self._bleu.sentence_score(answer, [gold]).score) / 100
