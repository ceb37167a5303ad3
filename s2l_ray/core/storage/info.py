"""What each stage writes into its manifest for later stages, the report and people: one type each.

These are facts about an artifact as a whole: counts, steps, centroids. Rows go into parts. The
manifest holds an info as JSON under `info`; `stored` writes it and `info_of` reads it.

Shapes: K clusters, F features (the clustered columns of a trajectory), G groups of a rule.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.records import PlainPath, from_json, to_json
from s2l_ray.errors import UserError


class Info:
    """Base of the infos of all stages. A stage without facts of its own has none."""


@dataclass(frozen=True)
class NumberedFile:
    """A raw file as `examples` knows it.

    Attributes:
        number: the upper part of its rows' ids; it is never given to another file.
        name: relative to the root of the data set.
        bytes: its size.
        sha256: of its content.
    """

    number: int
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ExamplesInfo(Info):
    """Of `examples`.

    Attributes:
        sources: rows of each source.
        rejects: rows left out, by reason.
        places: of each reason, the first rows left out: their file and row, the first being 1.
        files: all raw files.
        next_file_number: what the next new file of an extended data set will get.
        new_files: names of files that the extended data set did not have; none without `extends`.
        dropped_files: names of files that it had, and that are gone or changed.
        schema: of the original columns of all files, as `schema_text` writes it.
        columns: what became of each column; of several things where files differ.
    """

    sources: dict[str, int]
    rejects: dict[str, int]
    places: dict[str, list[str]] = field(default_factory=dict)
    files: list[NumberedFile]
    next_file_number: int
    new_files: list[str]
    dropped_files: list[str]
    schema: str
    columns: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A training's metrics by optimiser step, thinned where it is long; equally many of each.

    Attributes:
        step: number of the optimiser step, from 1.
        loss: mean over the learned tokens of the global batch, in nats.
        learning_rate: of that step.
    """

    step: list[int]
    loss: list[float]
    learning_rate: list[float]


@dataclass(frozen=True, kw_only=True)
class TrainingInfo(Info):
    """Of one training.

    Attributes:
        total_steps: optimiser steps.
        examples: rows it was trained on, each counted as often as it was seen.
        tokens: the same of tokens.
        parameters: of the model; None where no metrics were stored.
        flops: 6 * parameters * tokens; None where the parameters are not known.
        train_seconds: in the steps themselves.
        wait_seconds: of these, waiting for data.
        curve: metrics by step.
    """

    total_steps: int
    examples: int
    tokens: int
    parameters: int | None
    flops: float | None
    train_seconds: float
    wait_seconds: float
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class ProxyMember(TrainingInfo):
    """Of one member of the ensemble of proxies.

    Attributes:
        steps: of the checkpoints, ascending; the first is 0, before training.
        folders: of the checkpoints inside the artifact, as many as steps.
    """

    steps: list[int]
    folders: list[PlainPath]


@dataclass(frozen=True, kw_only=True)
class ProxyInfo(Info):
    """Of `proxy`: its members, and the FLOPs of all of them where they are known."""

    members: list[ProxyMember]
    flops: float | None


@dataclass(frozen=True, kw_only=True)
class TargetInfo(TrainingInfo):
    """Of `target`: its training, and the folder of the model inside the artifact.

    Attributes:
        model: of the best step by held-out rows, where these were looked at, or else of the last.
        last: of the last step.
        held_out: [step, loss] of every look at held-out rows.
    """

    model: PlainPath
    last: PlainPath
    held_out: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class TrajectoriesInfo(Info):
    """Of `trajectories`.

    Attributes:
        steps: [member, step] of each column of `losses` and of every statistic, step 0 included.
        statistics: columns beside `losses`.
        scored: rows that have a trajectory.
        sources: scored rows of each source.
        left_out: rows without a trajectory, by reason.
        tokens: of the scored rows, over all members.
        learned_tokens: of these, the ones whose loss counts.
        flops: of all members and checkpoints; None where a model's size is not known.
    """

    steps: list[list[int]]
    statistics: list[str]
    scored: int
    sources: dict[str, int]
    left_out: dict[str, int]
    tokens: int
    learned_tokens: int
    flops: float | None


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How clusters changed that began from the centroids of another artifact, the base.

    Attributes:
        base_sizes: [B], rows of each of the base's B clusters there.
        before: [B], the present rows by the base's centroids.
        changed: rows that refining moved to another cluster.
        shifts: [B], distance of each centroid from the base's.
        new_rows: how many more rows there are now.
        new_sources: sources that the base did not have; their clusters come last.
    """

    base_sizes: list[int]
    before: list[int]
    changed: int
    shifts: list[float]
    new_rows: int
    new_sources: list[str]


@dataclass(frozen=True, kw_only=True)
class ClustersInfo(Info):
    """Of `clusters`.

    Attributes:
        k: number of clusters, over all sources.
        cluster_sources: [K], whose rows each cluster has; None: rows of any source.
        fewer: clusters of each source that has fewer distinct trajectories than clusters.k.
        centroids: [K, F].
        spread: [K, F], standard deviation of the members around their centroid.
        sizes: [K], members.
        objective: sum of squared distances of all rows to their centroids.
        objectives: the same after each round.
        moves: rows that changed cluster in each round.
        reseeded: how often an empty cluster was given a new centroid.
        converged: whether all centroids came to rest before clusters.max_rounds.
        features: what was clustered, as clusters.features says.
        steps: [member, step] of each feature.
        moved: against the base; None without clusters.use.
    """

    k: int
    cluster_sources: list[str | None]
    fewer: dict[str, int]
    centroids: list[list[float]]
    spread: list[list[float]]
    sizes: list[int]
    objective: float
    objectives: list[float]
    moves: list[int]
    reseeded: int
    converged: bool
    features: str
    steps: list[list[int]]
    moved: Moved | None = None


@dataclass(frozen=True, kw_only=True)
class SubsetInfo(Info):
    """Of `subset`.

    Attributes:
        rule: its name, or in words what it does.
        group: expression of the rows that share a quota.
        score: expression of what is chosen first in a group.
        take: "smallest" or "middle" scores.
        budget: rows chosen.
        eligible: rows that could be chosen.
        groups: [G], names.
        sizes: [G], eligible rows.
        quotas: [G], rows chosen.
        sources: [eligible rows, chosen rows] of each source.
        clusters: [K], rows chosen of each cluster; None where there are no clusters.
    """

    rule: str
    group: str
    score: str
    take: str
    budget: int
    eligible: int
    groups: list[str]
    sizes: list[int]
    quotas: list[int]
    sources: dict[str, list[int]]
    clusters: list[int] | None


@dataclass(frozen=True)
class Estimate:
    """A mean over rows or sources, and the ends of its 95 % interval by bootstrap."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out results: of `loss` (in nats per learned token) and of each score, a mean."""

    metrics: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class SourceHeldOut(HeldOut):
    """Held-out results of one source, and its rows."""

    rows: int


@dataclass(frozen=True, kw_only=True)
class Differing:
    """An answer that some rules take for right and others for wrong."""

    example_id: int
    source: str
    gold: str
    answer: str
    right: list[str]
    wrong: list[str]


@dataclass(frozen=True, kw_only=True)
class EvaluationInfo(Info):
    """Of `evaluation`.

    Attributes:
        by_source: results of each source; a score that none of its rows has is left out.
        macro: their mean over the sources that have it.
        differ: rows about which published, numeric and math_verify do not agree.
        differing: the first of them.
        counts: how many answers came to max_new_tokens without an end, were asked for again,
            were programs that ended so or so, took Math-Verify too long.
    """

    by_source: dict[str, SourceHeldOut]
    macro: HeldOut
    differ: int = 0
    differing: list[Differing] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


SomeInfo = TypeVar("SomeInfo", bound=Info)


def stored(info: Info | None) -> dict[str, Any]:
    """An info as the manifest holds it."""
    return {} if info is None else to_json(info)


def info_of(manifest: Manifest, kind: type[SomeInfo]) -> SomeInfo:
    """The info of a manifest.

    Raises:
        UserError: the manifest is of another stage, or another version of s2l_ray wrote it.
    """
    try:
        return from_json(kind, manifest.info)
    except ValueError as error:
        raise UserError(
            f"reading the manifest of {manifest.stage} {manifest.fingerprint}: its info is "
            f"{error}. Use the s2l_ray version that wrote it, or remove the artifact's folder and "
            "run again."
        ) from None


def flops_of(manifest: Manifest) -> float | None:
    """Floating point operations of making an artifact of any stage; None where not known."""
    return manifest.info.get("flops")
