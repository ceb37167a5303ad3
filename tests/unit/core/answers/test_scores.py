"""Scores by name, beside their packages used by themselves."""

import pytest

from s2l_ray.core.answers import scores
from s2l_ray.core.answers.scores import Scorer, check_installed
from s2l_ray.errors import UserError


def test_summaries_are_scored_by_rouge_and_bleu() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_bleu

    scorer = Scorer(["rouge_l", "bleu"], {})
    gold, answer = "the patient reports mild pain", "the patient has mild pains today"
    found = scorer.scores("s", answer, gold)
    wanted = RougeScorer(["rougeL"], use_stemmer=True).score(gold, answer)["rougeL"].fmeasure
    assert found["rouge_l"] == wanted
    assert found["bleu"] == pytest.approx(sentence_bleu(answer, [gold]).score / 100)
    assert scorer.scores("s", gold, gold) == {"rouge_l": 1.0, "bleu": pytest.approx(1.0)}
    assert scorer.scores("s", "", gold) == {"rouge_l": 0.0, "bleu": 0.0}


def test_thoughts_do_not_count() -> None:
    found = Scorer(["exact", "numeric"], {}).scores("s", "<think>8</think> 7", "7")
    assert found == {"exact": True, "numeric": True}


def test_a_score_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scores.NEEDED, "bleu", "no_such_package")
    check_installed(["exact", "rouge_l"])
    with pytest.raises(UserError, match="bleu needs the package no_such_package"):
        check_installed(["exact", "bleu"])
