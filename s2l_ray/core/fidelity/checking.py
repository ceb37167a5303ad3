"""Are the losses faithful on these rows? The same rows in several settings, and each by itself.

The reference is the model's own forward pass over one row at a time, unpadded, in fp32; only the
cross-entropy is ours. Shapes: n rows, S columns of losses (member, step).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from s2l_ray.config import Clusters, Examples
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.data.read import read_part
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.kmeans.features import features
from s2l_ray.core.kmeans.lloyd import KMeans
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.model.loading import build
from s2l_ray.core.model.scoring import Weights, check_finite, score
from s2l_ray.core.query import ask_here
from s2l_ray.core.storage.info import ClustersInfo, info_of
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.text.encoding import Encoded, Encoder

# At most so many parts are read for the rows, so that large data sets are as quick as small ones.
PARTS_READ = 16
SMALL_LOSS = 0.01  # relative shifts are those to a loss of at least this


# ----------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Drawn:
    """Rows of the user's data: the columns of `examples`, and how many were rejected, by reason."""

    table: pa.Table
    rejects: dict[str, int]


def draw(parts: Sequence[PartRange], section: Examples, count: int, seed: int) -> Drawn:
    """A sample of `count` rows by keyed hash, out of PARTS_READ parts by keyed hash, in id order.

    Raises:
        UserError: a bad row, with examples.on_bad_row: stop.
    """
    order = np.argsort(keyed_hash(seed, np.array([part.index for part in parts])))[:PARTS_READ]
    read = [
        read_part(parts[number], section.columns, section.on_bad_row) for number in sorted(order)
    ]
    columns = ["example_id", "source", "messages", "tools"]
    table = pa.concat_tables([part.table.select(columns) for part in read])
    chosen = np.argsort(keyed_hash(seed, table["example_id"].to_numpy()))[:count]
    rejects = Counter(reject["reason"] for part in read for reject in part.rejects)
    return Drawn(table.take(np.sort(chosen)), dict(rejects))


# ------------------------------------------------------------------------------------- their losses


@dataclass(frozen=True)
class Setting:
    """How to score.

    Attributes:
        tokens: padded tokens of a batch; 1 takes every row alone.
        attention: None is the model's default.
    """

    dtype: str
    tokens: int
    attention: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model to look at: its label, its encoder, the rows as that one reads them, its weights."""

    label: str
    encoder: Encoder
    examples: list[Encoded]
    load: Callable[[], Weights]


def settings(
    checkpoints: Sequence[Checkpoint], tokens_per_batch: int, eager_too: bool
) -> list[Setting]:
    """Both dtypes, rows alone and in batches of two sizes; eager attention if it is no default.

    The larger size is the job's, or what all rows make in one batch where that is less.
    """
    padded = max(
        len(one.examples) * max(len(example.input_ids) for example in one.examples)
        for one in checkpoints
    )
    longest = max(len(example.input_ids) for one in checkpoints for example in one.examples)
    whole = min(tokens_per_batch, padded)
    sizes = sorted({1, max(longest, whole // 4), whole})
    made = [Setting(dtype, tokens) for dtype in ("fp32", "bf16") for tokens in sizes]
    if eager_too:
        made += [Setting(dtype, whole, "eager") for dtype in ("fp32", "bf16")]
    return sorted(made, key=lambda one: (one.dtype != "fp32", one.attention or "", one.tokens))


def job_setting(in_settings: Sequence[Setting], dtype: str) -> Setting:
    """The one that the job itself uses: its dtype, its batches, the models' own attention."""
    return max(
        (s for s in in_settings if s.dtype == dtype and s.attention is None), key=lambda s: s.tokens
    )


def default_attention(config: Any) -> str:
    """The implementation of attention that transformers chooses here for a model of that config."""
    with torch.device("meta"):
        return str(build(config).config._attn_implementation)


def measure(
    checkpoints: Sequence[Checkpoint],
    in_settings: Sequence[Setting],
    device: Any,
    on_pass: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, dict[Setting, np.ndarray]]:
    """Losses of the rows under each checkpoint, float32 [n, S]: the reference, and every setting's.

    Args:
        in_settings: ordered by dtype and attention, since each such pair needs a model of its own.
        on_pass: called after each of the (1 + number of settings) * S passes over the rows.

    Raises:
        UserError: a loss that is not finite, naming example and checkpoint.
    """
    shape = len(checkpoints[0].examples), len(checkpoints)
    reference = np.empty(shape, np.float32)
    found = {setting: np.empty(shape, np.float32) for setting in in_settings}
    for column, checkpoint in enumerate(checkpoints):
        weights, examples = checkpoint.load(), checkpoint.examples
        model = weights.model("fp32", device)
        reference[:, column] = [plain_loss(model, example, device) for example in examples]
        check_finite("loss", reference[:, column : column + 1], examples, [checkpoint.label])
        on_pass()
        for (dtype, attention), group in groupby(
            in_settings, key=lambda one: (one.dtype, one.attention)
        ):
            model = weights.model(dtype, device, attention)
            for setting in group:
                pad, tokens, label = checkpoint.encoder.pad, setting.tokens, [checkpoint.label]
                found[setting][:, column] = score([model], examples, pad, tokens, device, label)[
                    :, 0
                ]
                on_pass()
    return reference, found


@torch.inference_mode()
def plain_loss(model: Any, example: Encoded, device: Any) -> float:
    """Mean loss of the learned tokens of one row from a plain forward pass without padding."""
    ids = torch.from_numpy(example.input_ids).long().to(device)
    where = torch.from_numpy(example.learned).to(device).nonzero().squeeze(1)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, where - 1]
    return F.cross_entropy(logits.double(), ids[where]).item()


# ----------------------------------------------------------------------------------- their clusters


@dataclass(frozen=True)
class Grouping:
    """Centroids [K, F], the source that each serves (None: all), and where they are from."""

    centroids: np.ndarray
    sources: list[str | None]
    steps: list[list[int]]
    section: Clusters
    origin: str

    def labels(self, losses: np.ndarray, sources: Sequence[str]) -> np.ndarray:
        """Nearest centroid of each row, int64 [n]."""
        rows = features(losses, self.steps, self.section).astype(np.float64)
        allowed = {
            source: np.array([own is None or own == source for own in self.sources])
            for source in set(sources)
        }
        return np.array(
            [
                np.where(
                    allowed[source], ((self.centroids - row) ** 2).sum(axis=1), np.inf
                ).argmin()
                for row, source in zip(rows, sources, strict=True)
            ],
            np.int64,
        )


def committed_grouping(manifest: Manifest, steps: list[list[int]], section: Clusters) -> Grouping:
    """The job's own clusters."""
    info = info_of(manifest, ClustersInfo)
    centroids, sources = np.array(info.centroids, np.float64), info.cluster_sources
    return Grouping(centroids, sources, steps, section, f"the job's {len(centroids)} clusters")


def fresh_grouping(
    losses: np.ndarray, ids: np.ndarray, steps: list[list[int]], section: Clusters, complete: bool
) -> Grouping:
    """Clusters of these rows alone, by the job's features if all checkpoints are there."""
    if not complete:
        given = [step for _, step in steps]
        section = Clusters(
            k=section.k, seed=section.seed, initial=0 in given, steps=sorted(set(given))
        )
    rows = features(losses, steps, section)
    k = max(1, min(section.k, len(rows) // 4, len(np.unique(rows, axis=0))))
    settings = KMeans(
        k=k, seed=section.seed, max_rounds=section.max_rounds, tolerance=section.tolerance
    )
    found = settings.fit(ask_here(Shard([(ids, rows)])))
    centroids = found.centroids.astype(np.float64)
    return Grouping(centroids, [None] * k, steps, section, f"{k} clusters of these rows alone")


# --------------------------------------------------------------------------------------- what moved


@dataclass(frozen=True)
class Shift:
    """The largest distance of a setting's losses from the reference: in nats, relative, its place
    (row, column); and how many rows are in another cluster."""

    absolute: float
    relative: float
    row: int
    column: int
    moved: int


def shift(
    reference: np.ndarray, losses: np.ndarray, before: np.ndarray, after: np.ndarray
) -> Shift:
    """Compare losses [n, S], and labels [n]."""
    distance = np.abs(losses.astype(np.float64) - reference)
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    relative = (distance / np.maximum(reference, SMALL_LOSS)).max()
    moved = int((before != after).sum())
    return Shift(float(distance[row, column]), float(relative), int(row), int(column), moved)
