"""`trajectories` from examples and proxy: losses and statistics of every example and checkpoint.

Actors hold the T + 1 checkpoints of all proxies, read a part once and write it finished. Batches
are cut by the part's own lengths, so a loss never depends on how parts are spread over actors.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.data.incremental import scored_parts
from s2l_ray.core.hashing import SCORED, keyed_hash
from s2l_ray.core.model.cost import scoring_flops
from s2l_ray.core.model.loading import load_encoder
from s2l_ray.core.model.lookahead import check_causal
from s2l_ray.core.model.scoring import (
    checkpoint_labels,
    device_of,
    files_of,
    load_checkpoint,
    reason_of,
    score_statistics,
)
from s2l_ray.core.storage.info import ProxyInfo, ProxyMember, TrajectoriesInfo
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.records import from_json, to_json
from s2l_ray.core.storage.schemas import trajectories_schema, vector_column
from s2l_ray.core.text.encoding import Encoded, Encoder
from s2l_ray.edge.parts import PartContext, adopt_parts, parts_by_actors
from s2l_ray.errors import UserError

NOT_SAMPLED = "not in trajectories.sample"
# that a row is encoded from
COLUMNS = ["example_id", "source", "messages", "tools"]


def make(work: Work) -> Outcome:
    """Score every part.

    Raises:
        UserError: a value that is not finite, a checkpoint that does not load, or no row that
            could be scored.
    """
    examples, proxy = work.manifests["examples"], work.manifests["proxy"]
    members = work.info("proxy", ProxyInfo).members
    files = files_of(proxy)
    jobs = {part.index: {"part": to_json(part.for_reading)} for part in examples.parts}

    def load(context: PartContext) -> Callable[[dict[str, Any]], Part]:
        return Scorer(context, members, files).make_part

    digests = [(part.index, part.files["data"].sha256) for part in examples.parts]
    proxy_name = work.inputs["proxy"].fingerprint
    scored_before = scored_parts(
        work.artifact.store, work.version, work.section, proxy_name, digests
    )
    adopt_parts(work, scored_before)
    parts = parts_by_actors(work, jobs, load)
    sums: dict[str, Counter[str]] = {"reasons": Counter(), "sources": Counter()}
    for part in parts:
        for name, counter in sums.items():
            counter.update(part.stats[name])
    scored = sum(sums["sources"].values())
    if scored == 0:
        raise UserError(
            f"making trajectories: no row could be scored ({dict(sums['reasons'])}). Raise "
            "proxy.max_length or trajectories.sample."
        )
    info = TrajectoriesInfo(
        steps=[[number, step] for number, member in enumerate(members) for step in member.steps],
        statistics=list(work.config.trajectories.statistics),
        scored=scored,
        sources=dict(sorted(sums["sources"].items())),
        left_out=dict(sums["reasons"]),
        tokens=sum(part.stats["tokens"] for part in parts),
        learned_tokens=sum(part.stats["learned_tokens"] for part in parts),
        flops=sum(part.stats["flops"] for part in parts) or None,
    )
    return Outcome(parts, info=info)


@dataclass
class Member:
    """One proxy of the ensemble: its encoder, its models from step 0 on, their labels, its size."""

    encoder: Encoder
    models: list[Any]
    labels: list[str]
    parameters: int | None


class Scorer:
    """An actor's models and what it does with a part."""

    def __init__(
        self, context: PartContext, members: list[ProxyMember], files: dict[str, list[Any]]
    ) -> None:
        self.context, self.section = context, context.config.trajectories
        self.device = device_of(context.config.scaling.trajectories)
        labels = checkpoint_labels([member.steps for member in members])
        self.members = [
            Member(
                load_encoder(proxy),
                [
                    load_checkpoint(
                        context.inputs["proxy"], f, files, self.section.dtype, self.device
                    )
                    for f in member.folders
                ],
                names,
                member.parameters,
            )
            for proxy, member, names in zip(
                context.config.proxy.each(), members, labels, strict=True
            )
        ]
        for own in self.members:
            check_causal(own.models[0], self.device, own.labels[0])

    def make_part(self, job: dict[str, Any]) -> Part:
        """Score one part; rows that cannot be scored keep their place, with nulls and a reason."""
        part = from_json(Part, job["part"])
        rows = self.context.inputs["examples"].read_part(part, COLUMNS)
        ids = rows["example_id"].to_numpy()
        reasons = np.full(len(ids), NOT_SAMPLED, object)
        sampled_N = np.ones(len(ids), bool)
        if self.section.sample < 1:
            sampled_N = keyed_hash(SCORED, self.section.seed, ids) < np.uint64(
                self.section.sample * 2.0**64
            )
        encoded = [
            member.encoder.examples(rows.filter(pa.array(sampled_N))) for member in self.members
        ]
        reasons[sampled_N] = [reason_of(versions) for versions in zip(*encoded, strict=True)]
        scored_N = np.array([reason is None for reason in reasons], bool)
        possible = scored_N[sampled_N]
        kept = [[e for e, ok in zip(each, possible, strict=True) if ok] for each in encoded]
        made = [self._score(member, each) for member, each in zip(self.members, kept, strict=True)]
        table = _table(rows, scored_N, reasons, kept[0], made, self.section.statistics)
        stats = {
            "examples": part.files["data"].sha256,
            "reasons": dict(Counter(reason for reason in reasons.tolist() if reason is not None)),
            "sources": dict(Counter(rows.filter(pa.array(scored_N))["source"].to_pylist())),
            "tokens": sum(len(example.input_ids) for each in kept for example in each),
            "learned_tokens": sum(int(example.learned.sum()) for each in kept for example in each),
            "flops": self._flops(kept),
        }
        return self.context.write(
            part.index, table.num_rows, {"data": (".parquet", parquet_bytes(table))}, stats
        )

    def _score(self, member: Member, examples: list[Encoded]) -> dict[str, np.ndarray]:
        """`loss` and each statistic at every step of a member, step 0 first: float32 [n, T + 1]."""
        return score_statistics(
            member.models,
            examples,
            self.section.statistics,
            member.encoder,
            self.section.tokens_per_batch,
            self.device,
            member.labels,
        )

    def _flops(self, kept: list[list[Encoded]]) -> float:
        """Of this part over all models; 0 where a proxy's size is not known."""
        if not all(member.parameters for member in self.members):
            return 0.0
        return sum(
            len(member.models)
            * scoring_flops(
                member.parameters or 0,
                tuple(member.models[0].get_output_embeddings().weight.shape),
                [len(example.input_ids) for example in each],
                [int(example.learned.sum()) for example in each],
                self.section.statistics,
            )
            for member, each in zip(self.members, kept, strict=True)
        )


def _table(
    rows: pa.Table,
    scored_N: np.ndarray,
    reasons: np.ndarray,
    examples: list[Encoded],
    made: list[dict[str, np.ndarray]],
    statistics: list[Any],
) -> pa.Table:
    """All rows of a part; `examples` and the values of each member are of the scored rows only."""
    tokens = np.zeros(len(scored_N), np.int32)
    tokens[scored_N] = [int(example.learned.sum()) for example in examples]
    columns = {"losses": _vectors(scored_N, [member["loss"] for member in made])}
    for name in statistics:
        columns[name] = _vectors(scored_N, [member[name] for member in made])
    return pa.table(
        {
            "example_id": rows["example_id"],
            "source": rows["source"],
            "num_tokens": pa.array(tokens, mask=~scored_N),
            **columns,
            "reason": pa.array(reasons.tolist(), pa.string()),
        },
        schema=trajectories_schema(columns["losses"].type.list_size, statistics),
    )


def _vectors(scored_N: np.ndarray, members: list[np.ndarray]) -> pa.FixedSizeListArray:
    values = np.concatenate(members, axis=1)
    everyone = np.zeros((len(scored_N), values.shape[1]), np.float32)
    everyone[scored_N] = values
    return vector_column(scored_N, everyone)
