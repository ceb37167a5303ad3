"""`trajectories` from examples and proxy: every example's loss at each checkpoint, in one pass over the data.

Actors hold all T checkpoints of all proxies, read a part once and write it finished. Batches are cut by the part's own
lengths, so a loss never depends on how parts are spread over actors.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import Config, Proxy
from s2l_ray.core.encoding import NO_LEARNED_TOKEN, Encoded, Encoder, pad, token_batches
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.losses import example_losses
from s2l_ray.core.models import build, load_encoder, load_weights, read_weights
from s2l_ray.core.store import Artifact, FileEntry, Manifest, Part
from s2l_ray.core.tables import parquet_bytes, trajectories_schema, vector_column
from s2l_ray.errors import UserError
from s2l_ray.stages.edge import PartContext, make_parts
from s2l_ray.stages.work import Outcome, Work, part_dict, part_from

NOT_SAMPLED = "not in trajectories.sample"


def make(work: Work) -> Outcome:
    """Score every part.

    Raises:
        UserError: a loss that is not finite, a checkpoint that does not load, or no row that could be scored.
    """
    examples, proxy = work.manifests["examples"], work.manifests["proxy"]
    members = [{"steps": member["steps"], "folders": member["folders"]} for member in proxy.info["members"]]
    files = files_of(proxy)
    jobs = {part.index: {"part": part_dict(part)} for part in examples.parts}

    def load(context: PartContext) -> Callable[[dict[str, Any]], Part]:
        return Scorer(context, members, files).make_part

    parts = make_parts(work, jobs, load=load, actors=work.config.scaling.scorers)
    reasons: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.stats["reasons"])
        sources.update(part.stats["sources"])
    scored = sum(sources.values())
    if scored == 0:
        raise UserError(
            f"making trajectories: no row could be scored ({dict(reasons)}). Raise proxy.max_length or trajectories.sample."
        )
    first = 0 if work.config.trajectories.use_initial else 1
    steps = [[number, step] for number, member in enumerate(members) for step in member["steps"][first:]]
    tokens = sum(part.stats["tokens"] for part in parts)
    sizes = [(member["parameters"], len(member["steps"])) for member in proxy.info["members"]]
    info = {
        "flops": sum(2.0 * size * count * tokens for size, count in sizes)
        if all(size for size, _ in sizes)
        else None,
        "steps": steps,
        "scored": scored,
        "sources": dict(sorted(sources.items())),
        "left_out": dict(reasons),
        "tokens": tokens,
        "learned_tokens": sum(part.stats["learned_tokens"] for part in parts),
    }
    return Outcome(parts, info=info)


def load_checkpoint(
    artifact: Artifact, folder: str, files: dict[str, list[Any]], dtype: str, device: Any
) -> Any:
    """A model from a folder of an artifact, every file checked against the manifest."""
    from transformers import AutoConfig

    def read(name: str) -> bytes:
        path = f"{folder}/{name}"
        if path not in files:
            raise UserError(
                f"loading {artifact.uri_of(folder)}: the manifest lists no {name}. Remove {artifact.uri} and run again."
            )
        return artifact.read_file(FileEntry(path, *files[path]))

    names = [path[len(folder) + 1 :] for path in files if path.startswith(folder + "/")]
    raw = json.loads(read("config.json"))
    model = build(AutoConfig.for_model(raw.pop("model_type"), **raw), dtype)
    load_weights(model, read_weights(read, names, f"{artifact.uri}/{folder}"), f"{artifact.uri}/{folder}")
    return model.to(device).eval()


def device_of(config: Config) -> Any:
    """Where this worker computes, with its CPU threads set."""
    import torch

    torch.set_num_threads(config.scaling.threads)
    return torch.device("cuda" if config.scaling.gpus_per_worker and torch.cuda.is_available() else "cpu")


@dataclass
class Member:
    """One proxy of the ensemble: how it encodes, and its models, step 0 first."""

    encoder: Encoder
    models: list[Any]


class Scorer:
    """An actor's models and what it does with a part."""

    def __init__(
        self, context: PartContext, members: list[dict[str, Any]], files: dict[str, list[Any]]
    ) -> None:
        self.context, self.section = context, context.config.trajectories
        self.device = device_of(context.config)
        proxies: list[Proxy] = context.config.proxy.each()
        self.members = [
            Member(
                load_encoder(proxy),
                [
                    load_checkpoint(context.inputs["proxy"], f, files, self.section.dtype, self.device)
                    for f in member["folders"]
                ],
            )
            for proxy, member in zip(proxies, members, strict=True)
        ]

    def make_part(self, job: dict[str, Any]) -> Part:
        """Score the rows of one part; rows that cannot be scored keep their place, with null losses and a reason."""
        part = part_from(job["part"])
        rows = self.context.inputs["examples"].read_part(
            part, ["example_id", "source", "instruction", "input", "output"]
        )
        ids = rows["example_id"].to_numpy()
        sampled_N = np.ones(len(ids), bool)
        if self.section.sample < 1:
            sampled_N = keyed_hash(self.section.seed, ids) < np.uint64(self.section.sample * 2.0**64)
        encoded = [member.encoder.examples(rows.filter(pa.array(sampled_N))) for member in self.members]
        learned = np.array([[int(example.learned.sum()) for example in each] for each in encoded]).reshape(
            len(encoded), -1
        )
        possible: np.ndarray = np.all(learned > 0, axis=0)
        scored_N = sampled_N.copy()
        scored_N[sampled_N] = possible
        losses = [
            self._score(m, [e for e, ok in zip(each, possible, strict=True) if ok])
            for m, each in zip(self.members, encoded, strict=True)
        ]
        table = self._table(
            rows, sampled_N, scored_N, learned[0][possible] if len(learned) else learned, losses
        )
        stats = {
            "reasons": dict(Counter(reason for reason in table["reason"].to_pylist() if reason)),
            "sources": dict(Counter(rows.filter(pa.array(scored_N))["source"].to_pylist())),
            "tokens": sum(len(example.input_ids) for example in encoded[0]),
            "learned_tokens": int(learned.sum()),
        }
        return self.context.write(
            part.index, table.num_rows, {"data": (".parquet", parquet_bytes(table))}, stats
        )

    def _score(self, member: Member, examples: list[Encoded]) -> np.ndarray:
        """Losses of the examples at every step, step 0 first: float32 [n, T + 1]."""
        return score(member.models, examples, member.encoder.pad, self.section.tokens_per_batch, self.device)

    def _table(
        self,
        rows: pa.Table,
        sampled_N: np.ndarray,
        scored_N: np.ndarray,
        num_tokens: np.ndarray,
        losses: list[np.ndarray],
    ) -> pa.Table:
        first = 0 if self.section.use_initial else 1
        values = np.concatenate([member[:, first:] for member in losses], axis=1)
        initial = np.stack([member[:, 0] for member in losses], axis=1)
        count = len(scored_N)
        all_values, all_initial = (
            np.zeros((count, values.shape[1]), np.float32),
            np.zeros((count, len(losses)), np.float32),
        )
        all_values[scored_N], all_initial[scored_N] = values, initial
        tokens = np.zeros(count, np.int32)
        tokens[scored_N] = num_tokens
        reasons = np.where(sampled_N, NO_LEARNED_TOKEN, NOT_SAMPLED)
        return pa.table(
            {
                "example_id": rows["example_id"],
                "source": rows["source"],
                "num_tokens": pa.array(tokens, mask=~scored_N),
                "losses": vector_column(scored_N, all_values),
                "initial_losses": vector_column(scored_N, all_initial),
                "reason": pa.array(reasons.tolist(), pa.string(), mask=scored_N),
            },
            schema=trajectories_schema(values.shape[1], len(losses)),
        )


def score(
    models: list[Any], examples: list[Encoded], pad_id: int, tokens_per_batch: int, device: Any
) -> np.ndarray:
    """Mean loss over the learned tokens of each example under each model: float32 [n, number of models].

    Raises:
        UserError: a loss that is not finite, naming the example and the model's place.
    """
    import torch

    losses = np.empty((len(examples), len(models)), np.float32)
    for batch in token_batches([len(example.input_ids) for example in examples], tokens_per_batch):
        arrays = pad([examples[row] for row in batch], pad_id)
        input_ids_BL, learned_BL = (torch.from_numpy(array).to(device) for array in arrays)
        for column, model in enumerate(models):
            losses[batch, column] = example_losses(model, input_ids_BL, learned_BL).cpu().numpy()
    if not np.isfinite(losses).all():
        row, column = np.argwhere(~np.isfinite(losses))[0]
        raise UserError(
            f"scoring examples: the loss of example_id {examples[row].example_id} under checkpoint number {column} is "
            f"{losses[row, column]}, expected a finite number. The model has diverged or overflows: lower its learning_rate, or "
            "set dtype to fp32."
        )
    return losses


def files_of(manifest: Manifest) -> dict[str, list[Any]]:
    """Name -> [bytes, sha256] of an artifact's files, as `load_checkpoint` wants them."""
    return {entry.name: [entry.bytes, entry.sha256] for entry in manifest.files}
