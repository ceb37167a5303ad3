"""Held-out rows to results: answers asked for, programs run, scores, and means over sources."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.config import Evaluation
from s2l_ray.core.answers.programs import Ran
from s2l_ray.core.model.decoding import Generation
from s2l_ray.core.storage.info import EvaluationInfo
from s2l_ray.core.storage.schemas import evaluation_schema
from s2l_ray.core.text.encoding import Encoded
from s2l_ray.errors import UserError
from s2l_ray.stages.evaluation import make
from s2l_ray.stages.evaluation.answering import Answering

SCORES = ["exact", "published", "numeric"]


def rows_of(*rows: tuple[str, str, str]) -> pa.Table:
    """Of (source, question, gold answer)."""
    talks = [
        [
            {"role": "user", "content": asked, "input": None, "extra": None, "masked": False},
            {"role": "assistant", "content": gold, "input": None, "extra": None, "masked": False},
        ]
        for _, asked, gold in rows
    ]
    return pa.table(
        {
            "example_id": range(len(rows)),
            "source": [source for source, _, _ in rows],
            "messages": talks,
        }
    )


class Model:
    """What a model answers to a question, and with which text behind it; notes what was asked."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.asked = answers, list[tuple[list[str], str]]()

    def __call__(self, rows: pa.Table, asking: str) -> list[Generation]:
        questions = [talk[0]["content"] for talk in rows["messages"].to_pylist()]
        self.asked.append((questions, asking))
        return [Generation(self.answers[q + asking], q == "long") for q in questions]


def answering(monkeypatch: pytest.MonkeyPatch, **section: Any) -> Answering:
    """With a sandbox that "runs" programs of the form print(text)."""
    monkeypatch.setattr("s2l_ray.core.answers.programs.Sandbox.check", lambda _: None)
    made = Answering(Evaluation(scores=SCORES, program_prompt=" P", **section))

    def run(program: str) -> Ran:
        text = program.splitlines()[-1].removeprefix("print(").removesuffix(")")
        return Ran("", "error") if text == "1/0" else Ran(text, "well")

    monkeypatch.setattr(made.sandbox, "run", run)
    return made


def test_words_are_scored_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(("gsm8k", "a", "7.0"), ("other", "b", "7"), ("gsm8k", "long", "7"))
    made = answering(monkeypatch)
    columns = made.columns(rows, Model({"a": "The answer is 7", "b": "7", "long": "it is 7"}))
    assert columns["exact"] == [False, True, False]
    # The authors' rules are about their six sets only.
    assert columns["published"] == [True, None, True]
    assert columns["numeric"] == [True, True, True]
    assert columns["asked"] == ["chain"] * 3
    assert columns["gold"] == ["7.0", "7", "7"]
    assert made.counts(columns) == {"came to max_new_tokens": 1}


def test_another_name_of_a_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = answering(monkeypatch, sets={"my math": "math"})
    columns = made.columns(rows_of(("my math", "a", "2")), Model({"a": "The answer is 2.5"}))
    assert (columns["published"], columns["numeric"]) == ([True], [False])


def test_programs_answer_with_what_they_print(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(("gsm8k", "a", "7"), ("gsm8k", "b", "7"), ("gsm8k", "c", "7"))
    model = Model({"a P": "x = 1\nprint(7)", "b P": "print(1/0)", "c P": "It is 7"})
    made = answering(monkeypatch, answers="program")
    columns = made.columns(rows, model)
    assert columns["answer"] == ["The answer is 7", "", "It is 7"]
    assert columns["program"] == ["well", "error", None]
    assert columns["published"] == columns["numeric"] == [True, False, True]
    assert model.asked == [(["a", "b", "c"], " P")]
    assert made.counts(columns) == {"programs ended: well": 1, "programs ended: error": 1}


def test_an_empty_program_answer_is_asked_again_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(("gsm8k", "a", "7"), ("gsm8k", "b", "7"), ("gsm8k", "c", "7"))
    model = Model(
        {"a P": "print(8)", "b P": "print(1/0)", "b": "The answer is 7", "c P": "none", "c": "7"}
    )
    made = answering(monkeypatch, answers="hybrid")
    columns = made.columns(rows, model)
    # A wrong answer is an answer.
    assert model.asked == [(["a", "b", "c"], " P"), (["b", "c"], "")]
    assert columns["asked"] == ["program", "chain", "chain"]
    assert columns["first_generated"] == [None, "print(1/0)", "none"]
    assert columns["generated"] == ["print(8)", "The answer is 7", "7"]
    assert columns["numeric"] == [False, True, True]
    assert made.counts(columns)["asked again in words"] == 2


def info_of_rows(
    monkeypatch: pytest.MonkeyPatch, tables: list[pa.Table], scores: list[str]
) -> EvaluationInfo:
    counts = {"came to max_new_tokens": 2}
    parts = [SimpleNamespace(stats={"counts": counts}, table=table) for table in tables]
    monkeypatch.setattr(make, "parts_by_actors", lambda *_: parts)
    read = lambda part, columns=None: part.table.select(columns) if columns else part.table  # noqa: E731
    work: Any = SimpleNamespace(
        manifests={"target": SimpleNamespace(files=[])},
        info=lambda *_: SimpleNamespace(model="model"),
        ranges=[],
        artifact=SimpleNamespace(read_part=read),
        config=SimpleNamespace(evaluation=SimpleNamespace(scores=scores)),
    )
    info: Any = make.make(work).info
    return info


def evaluated(rows: list[dict[str, Any]], scores: list[str]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=evaluation_schema(scores))


def test_the_mean_over_sources_weighs_each_source_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(example_id: int, source: str, loss: float, exact: bool | None) -> dict[str, Any]:
        return {"example_id": example_id, "source": source, "loss": loss, "exact": exact}

    first = [row(0, "many", 1, True), row(1, "many", 1, True), row(2, "one", 4, False)]
    second = [row(3, "many", 2, True), row(4, "many", 4, False)]
    tables = [evaluated(rows, ["exact"]) for rows in (first, second)]
    info = info_of_rows(monkeypatch, tables, ["exact"])
    assert {name: own.rows for name, own in info.by_source.items()} == {"many": 4, "one": 1}
    means = {name: own.metrics["loss"].mean for name, own in info.by_source.items()}
    assert means == {"many": 2.0, "one": 4.0}
    assert info.macro.metrics["loss"].mean == 3.0
    assert info.macro.metrics["exact"].mean == 0.375
    assert info.counts == {"came to max_new_tokens": 4}


def test_what_was_not_generated_has_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"example_id": 0, "source": "a", "loss": 1.0, "exact": None}]
    info = info_of_rows(monkeypatch, [evaluated(rows, ["exact"])], ["exact"])
    assert info.macro.metrics.keys() == info.by_source["a"].metrics.keys() == {"loss"}


def test_rows_about_which_rules_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(example_id: int, published: bool | None, numeric: bool) -> dict[str, Any]:
        texts = {"source": "s", "gold": "7", "answer": f"answer {example_id}", "loss": 1.0}
        verdicts = {"exact": False, "published": published, "numeric": numeric}
        return {"example_id": example_id, **texts, **verdicts}

    rows = [row(0, True, True), row(1, True, False), row(2, None, True), row(3, False, True)]
    more = [row(4, False, True), row(5, False, True)]
    info = info_of_rows(monkeypatch, [evaluated(r, SCORES) for r in (rows, more)], SCORES)
    assert info.differ == 4
    assert [own.example_id for own in info.differing] == [1, 3, 4]
    told = info.differing[0]
    assert (told.answer, told.right, told.wrong) == ("answer 1", ["published"], ["numeric"])


@pytest.mark.parametrize("max_new_tokens", [8, 0])
def test_a_row_that_is_too_long_for_its_loss_is_answered_all_the_same(
    monkeypatch: pytest.MonkeyPatch, max_new_tokens: int
) -> None:
    examples = [
        Encoded(n, np.zeros(2, np.int32), np.array([False, n != 1]), None if n != 1 else "too long")
        for n in range(3)
    ]
    monkeypatch.setattr(make, "score", lambda _, some, *__: np.ones((len(some), 1), np.float32))
    evaluator: Any = SimpleNamespace(
        section=SimpleNamespace(max_new_tokens=max_new_tokens, tokens_per_batch=8),
        model=None,
        encoder=SimpleNamespace(pad=0),
        device="cpu",
    )
    part: Any = SimpleNamespace(file=SimpleNamespace(uri="h.jsonl"))
    if max_new_tokens:
        losses = make._Evaluator._losses(evaluator, part, examples)
        assert losses.tolist() == pytest.approx([1, np.nan, 1], nan_ok=True)
    else:
        with pytest.raises(UserError, match="1 rows, the row with example_id 1 first: too long"):
            make._Evaluator._losses(evaluator, part, examples)
