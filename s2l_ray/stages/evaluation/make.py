"""`evaluation` from the target: loss and exact match on held-out rows, by source.

Actors hold the target. They read a range of a held-out file, take the losses of the given answers,
and decode greedy ones.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.data.read import read_part
from s2l_ray.core.model.decoding import decode
from s2l_ray.core.model.loading import load_encoder
from s2l_ray.core.model.scoring import device_of, files_of, load_checkpoint, score
from s2l_ray.core.storage.info import EvaluationInfo, HeldOut, SourceHeldOut, TargetInfo
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.records import from_json, to_json
from s2l_ray.core.storage.schemas import evaluation_schema
from s2l_ray.core.text.turns import prompt_and_answer, without_thought
from s2l_ray.edge.parts import PartContext, parts_by_actors
from s2l_ray.errors import UserError


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
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for part in parts:
        for source, values in part.stats["sums"].items():
            sums[source] = [a + b for a, b in zip(sums[source], values, strict=True)]
    decoded = work.config.evaluation is not None and work.config.evaluation.max_new_tokens > 0
    by_source = {
        source: SourceHeldOut(
            rows=int(rows), loss=loss / rows, exact_match=exact / rows if decoded else None
        )
        for source, (rows, loss, exact) in sorted(sums.items())
    }
    found = list(by_source.values())
    exact_match = float(np.mean([own.exact_match or 0.0 for own in found])) if decoded else None
    macro = HeldOut(loss=float(np.mean([own.loss for own in found])), exact_match=exact_match)
    return Outcome(parts, info=EvaluationInfo(by_source=by_source, macro=macro))


class _Evaluator:
    def __init__(self, context: PartContext, folder: str, files: dict[str, list[Any]]) -> None:
        target, section = context.config.target, context.config.evaluation
        assert target is not None
        assert section is not None
        self.context, self.section = context, section
        self.device = device_of(context.config.scaling.evaluation)
        self.encoder = load_encoder(target)
        self.model = load_checkpoint(
            context.inputs["target"], folder, files, target.dtype, self.device
        )

    def make_part(self, job: dict[str, Any]) -> Part:
        part = from_json(PartRange, job)
        rows = read_part(part, self.section.columns, ignore=self.section.ignore).table
        examples = self.encoder.examples(rows)
        unlearned = [example for example in examples if not example.learned.any()]
        if unlearned:
            raise UserError(
                f"evaluating {part.file.uri}: nothing can be scored of {len(unlearned)} rows, "
                f"the row with example_id {unlearned[0].example_id} first: {unlearned[0].reason}. "
                "Change target.max_length or target.prompt, or leave such rows out of "
                "evaluation.files."
            )
        losses = score(
            [self.model], examples, self.encoder.pad, self.section.tokens_per_batch, self.device
        )[:, 0]
        answers = self._decode(rows)
        wanted = [prompt_and_answer(messages)[1] for messages in rows["messages"].to_pylist()]
        exact = [
            None if a is None else without_thought(a) == without_thought(w)
            for a, w in zip(answers, wanted, strict=True)
        ]
        table = pa.table(
            {
                "example_id": rows["example_id"],
                "source": rows["source"],
                "num_tokens": pa.array(
                    [int(example.learned.sum()) for example in examples], pa.int32()
                ),
                "loss": pa.array(losses),
                "generated": pa.array(answers, pa.string()),
                "exact": pa.array(exact, pa.bool_()),
            },
            schema=evaluation_schema(),
        )
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for source, loss, hit in zip(
            rows["source"].to_pylist(), losses.tolist(), exact, strict=True
        ):
            sums[source] = [
                a + b for a, b in zip(sums[source], (1.0, loss, float(bool(hit))), strict=True)
            ]
        return self.context.write(
            part.index,
            table.num_rows,
            {"data": (".parquet", parquet_bytes(table))},
            {"sums": dict(sums)},
        )

    def _decode(self, rows: pa.Table) -> list[str | None]:
        if self.section.max_new_tokens == 0:
            return [None] * rows.num_rows
        return list(
            decode(
                self.model,
                self.encoder,
                rows,
                self.section.max_new_tokens,
                self.section.tokens_per_batch,
                self.device,
            )
        )
