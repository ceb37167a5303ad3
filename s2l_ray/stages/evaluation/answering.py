"""Answers of the target to held-out rows, in words or by programs, and their scores."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from s2l_ray.config import Evaluation
from s2l_ray.core.answers.programs import Sandbox, program_in
from s2l_ray.core.answers.scores import Scorer
from s2l_ray.core.model.bert_score import BertScore
from s2l_ray.core.model.decoding import Generation
from s2l_ray.core.text.turns import prompt_and_answer, without_thought

# Answers to rows, with a text behind each question.
Generate = Callable[[pa.Table, str], list[Generation]]
TOLD = "The answer is "


class Answered(NamedTuple):
    """One answer, as columns of the stage hold it (see core/storage/schemas.py)."""

    generated: str
    cut: bool
    asked: str
    first_generated: str | None
    program: str | None
    answer: str


class Answering:
    """Asks for answers as the section says, runs programs, and scores what came."""

    def __init__(self, section: Evaluation, device: Any = "cpu") -> None:
        self.section = section
        self.bert: BertScore | None = None
        if section.bert_model is not None:
            self.bert = BertScore(section.bert_model, section.bert_layer, device)
        self.scorer = Scorer(section.scores, section.sets)
        self.sandbox = Sandbox(section.program_seconds)
        if section.answers != "chain":
            self.sandbox.check()

    def columns(self, rows: pa.Table, generate: Generate) -> dict[str, list[Any]]:
        """The columns of answers and scores of rows (columns source and messages)."""
        sources = rows["source"].to_pylist()
        golds = [prompt_and_answer(messages)[1] for messages in rows["messages"].to_pylist()]
        answered = self._answered(rows, sources, generate)
        made: dict[str, list[Any]] = {
            name: [getattr(one, name) for one in answered] for name in Answered._fields
        }
        scores = [
            self.scorer.scores(source, one.answer, gold)
            for source, one, gold in zip(sources, answered, golds, strict=True)
        ]
        made |= {name: [own[name] for own in scores] for name in self.scorer.names}
        if self.bert is not None:
            made["bert_score"] = self.bert.f1(
                *(list(map(without_thought, texts)) for texts in (made["answer"], golds))
            )
        return {**made, "gold": golds}

    def counts(self, columns: dict[str, list[Any]]) -> dict[str, int]:
        """What is told of a part: how many answers were cut, asked for again, or programs."""
        ends = [end for end in columns["program"] if end is not None]
        found = {
            "came to max_new_tokens": sum(columns["cut"]),
            "asked again in words": sum(text is not None for text in columns["first_generated"]),
            **{f"programs ended: {end}": ends.count(end) for end in dict.fromkeys(ends)},
            "took Math-Verify too long": self.scorer.verifier.stopped,
        }
        self.scorer.verifier.stopped = 0
        return {what: count for what, count in found.items() if count}

    def _answered(
        self, rows: pa.Table, sources: Sequence[str], generate: Generate
    ) -> list[Answered]:
        if self.section.answers == "chain":
            return [self._chain(made) for made in generate(rows, "")]
        answered = [self._program(made) for made in generate(rows, self.section.program_prompt)]
        if self.section.answers == "program":
            return answered
        again = [
            number
            for number, one in enumerate(answered)
            if self.scorer.is_empty(sources[number], one.answer)
        ]
        if again:
            for number, made in zip(again, generate(rows.take(again), ""), strict=True):
                first = answered[number].generated
                answered[number] = self._program(made)._replace(
                    asked="chain", first_generated=first
                )
        return answered

    @staticmethod
    def _chain(made: Generation) -> Answered:
        return Answered(made.text, made.cut, "chain", None, None, made.text)

    def _program(self, made: Generation) -> Answered:
        """The answer of what may hold a program."""
        program = program_in(without_thought(made.text))
        if program is None:
            return self._chain(made)._replace(asked="program")
        ran = self.sandbox.run(program)
        answer = TOLD + ran.output if ran.output else ""
        return Answered(made.text, made.cut, "program", None, ran.ended, answer)
