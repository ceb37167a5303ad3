"""`evaluation` from the target: losses and scored answers on held-out rows, by source.

Actors hold the target. They read a range of a held-out file, take the losses of the given answers,
decode greedy ones and score them.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.answers.resampling import Resampled, estimate
from s2l_ray.core.answers.scores import RULES
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.data.read import read_part
from s2l_ray.core.model.decoding import Generation, decode
from s2l_ray.core.model.loading import load_encoder
from s2l_ray.core.model.scoring import device_of, files_of, load_checkpoint, score
from s2l_ray.core.model.spreading import spread
from s2l_ray.core.storage.info import (
    Differing,
    EvaluationInfo,
    HeldOut,
    SourceHeldOut,
    TargetInfo,
)
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.records import from_json, to_json
from s2l_ray.core.storage.schemas import evaluation_schema
from s2l_ray.core.text.encoding import Encoded
from s2l_ray.edge.parts import PartContext, parts_by_actors
from s2l_ray.errors import UserError
from s2l_ray.stages.evaluation.answering import Answering

# Of rows about which rules differ, how many are shown, and characters of their texts.
MOST_DIFFERING, MOST_CHARACTERS = 3, 200


def make(work: Work) -> Outcome:
    """Evaluate every held-out row.

    Raises:
        UserError: a bad held-out row, or one without a learned token.
    """
    target = work.manifests["target"]
    folder, files = work.info("target", TargetInfo).model, files_of(target)

    def load(context: PartContext) -> Callable[[dict[str, Any]], Part]:
        return _Evaluator(context, folder, files).make_part

    jobs = {part.index: to_json(part) for part in work.ranges}
    parts = parts_by_actors(work, jobs, load)
    assert work.config.evaluation is not None
    return Outcome(parts, info=_info(work, parts, work.config.evaluation.scores))


def _info(work: Work, parts: list[Part], scores: list[Any]) -> EvaluationInfo:
    """Results by source from the parts' columns of numbers, one part in memory."""
    resampled = Resampled()
    counts: Counter[str] = Counter()
    differ, differing = 0, list[Differing]()
    rules = [name for name in RULES if name in scores]
    for part in parts:
        table = work.artifact.read_part(part, ["example_id", "source", "loss", *scores])
        resampled.add_table(table, ["loss", *scores])
        counts.update(part.stats["counts"])
        rows = _differing(table, rules)
        differ += len(rows)
        if rows and len(differing) < MOST_DIFFERING:
            some = work.artifact.read_part(part).take(rows[: MOST_DIFFERING - len(differing)])
            differing += [_differing_row(row, rules) for row in some.to_pylist()]
    by_source = {
        source: SourceHeldOut(rows=rows, metrics=_metrics(resampled, source))
        for source, rows in sorted(resampled.rows.items())
    }
    return EvaluationInfo(
        by_source=by_source,
        macro=HeldOut(metrics=_metrics(resampled, None)),
        differ=differ,
        differing=differing,
        counts=dict(counts),
    )


def _metrics(resampled: Resampled, source: str | None) -> dict[str, Any]:
    means = {
        name: resampled.macro_means(name) if source is None else resampled.means(source, name)
        for name in resampled.metrics
    }
    return {name: estimate(found) for name, found in means.items() if found is not None}


def _differing(table: pa.Table, rules: list[str]) -> list[int]:
    """Places of rows that some rules take for right and others for wrong."""
    verdicts = [table[name].to_pylist() for name in rules]
    return [
        place for place, row in enumerate(zip(*verdicts, strict=True)) if len(set(row) - {None}) > 1
    ]


def _differing_row(row: dict[str, Any], rules: list[str]) -> Differing:
    return Differing(
        example_id=row["example_id"],
        source=row["source"],
        gold=row["gold"][-MOST_CHARACTERS:],
        answer=row["answer"][-MOST_CHARACTERS:],
        right=[name for name in rules if row[name]],
        wrong=[name for name in rules if row[name] is False],
    )


class _Evaluator:
    def __init__(self, context: PartContext, folder: str, files: dict[str, list[Any]]) -> None:
        target, section = context.config.target, context.config.evaluation
        assert target is not None
        assert section is not None
        self.context, self.section = context, section
        scaling = context.config.scaling.evaluation
        self.device = device_of(scaling)
        self.answering = Answering(section, self.device)
        self.encoder = load_encoder(target)
        several = scaling.gpus > 1 and self.device.type == "cuda"
        model = load_checkpoint(
            context.inputs["target"], folder, files, target.dtype, "cpu" if several else self.device
        )
        self.model = spread(model, int(scaling.gpus)) if several else model

    def make_part(self, job: dict[str, Any]) -> Part:
        part = from_json(PartRange, job)
        rows = read_part(part, self.section.columns, ignore=self.section.ignore).table
        examples = self.encoder.examples(rows)
        losses = self._losses(part, examples)
        columns: dict[str, Any] = {
            "example_id": rows["example_id"],
            "source": rows["source"],
            "num_tokens": [int(example.learned.sum()) for example in examples],
            "loss": pa.array(losses, pa.float32(), from_pandas=True),
        }
        schema, counts = evaluation_schema(self.section.scores), dict[str, int]()
        if self.section.max_new_tokens:
            answers = self.answering.columns(rows, self._generate)
            columns |= answers
            counts = self.answering.counts(answers)
            if unscored := int(np.isnan(losses).sum()):
                counts["have no loss, being longer than target.max_length"] = unscored
        table = pa.table(
            [columns.get(field.name, pa.nulls(len(examples), field.type)) for field in schema],
            schema=schema,
        )
        return self.context.write(
            part.index,
            table.num_rows,
            {"data": (".parquet", parquet_bytes(table))},
            {"counts": counts},
        )

    def _losses(self, part: PartRange, examples: list[Encoded]) -> np.ndarray:
        """Mean loss of each row; NaN where some have nothing to learn but answers are made."""
        learned = np.array([bool(example.learned.any()) for example in examples])
        if not learned.all() and not (self.section.max_new_tokens and learned.any()):
            first = examples[int(np.argmin(learned))]
            raise UserError(
                f"evaluating {part.file.uri}: nothing can be scored of {int((~learned).sum())} "
                f"rows, the row with example_id {first.example_id} first: {first.reason}. Change "
                "target.max_length or target.prompt, or leave such rows out of evaluation.files."
            )
        losses = np.full(len(examples), np.nan, np.float32)
        some = [example for example in examples if example.learned.any()]
        losses[learned] = score(
            [self.model], some, self.encoder.pad, self.section.tokens_per_batch, self.device
        )[:, 0]
        return losses

    def _generate(self, rows: pa.Table, asking: str) -> list[Generation]:
        return decode(
            self.model,
            self.encoder,
            rows,
            self.section.max_new_tokens,
            self.section.tokens_per_batch,
            self.device,
            asking,
        )
