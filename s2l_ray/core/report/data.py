"""What the report page is made from: small numbers and a few samples that the report stage gathers.

Only numpy is needed to fill these. page.py makes the page of them, and pictures.py its pictures. At
the end are the words that page and pictures both use.
"""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from s2l_ray.core.storage.info import Differing, Moved

# Shapes: T steps, K clusters, S sources.
# characters shown of a prompt or completion
MAX_TEXT = 600
# characters shown of a source or variant in a picture
MAX_LABEL = 28
# What intervals of the mean over all sources are filed under; no source has this name.
ALL = "\0"
# Characters not allowed in XML or UTF-8.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True, eq=False)
class Subset:
    """What one variant chose.

    `source_sizes` [S] follows ReportData.sources; None leaves the variant out of that section.
    """

    variant: str
    rule: str
    num_examples: int
    uri: str
    source_sizes: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LossCurve:
    """Training loss of one proxy: as many losses as steps; averaged down when drawn."""

    label: str
    steps: Sequence[int]
    losses: Sequence[float]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterExample:
    """One example on the card of its cluster; the page trims its prompt and completion."""

    cluster: int
    example_id: int
    source: str
    prompt: str
    completion: str
    distance: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustering:
    """The clusters of one variant: trajectories, sizes, what was taken of each, and some members.

    mean, low and high are [K, T] of what was clustered, which `feature` names; NaN where a cluster
    is empty. `band` says in words what low and high are. steps is [T]. sizes and quotas are [K];
    quotas is None where none were drawn. objective has one value per round. sources and
    source_sizes [S, K] are optional together. Raises ValueError if the shapes disagree.
    """

    variant: str
    steps: Sequence[int]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    band: str
    sizes: Sequence[int]
    quotas: Sequence[int] | None = None
    objective: Sequence[float] = ()
    sources: Sequence[str] = ()
    source_sizes: np.ndarray | None = None
    feature: str = "loss"
    moved: Moved | None = None
    examples: Sequence[ClusterExample] = ()

    def __post_init__(self) -> None:
        shape = (len(self.sizes), len(self.steps))
        expected: dict[str, tuple[int, ...]] = {"mean": shape, "low": shape, "high": shape}
        if self.quotas is not None:
            expected["quotas"] = shape[:1]
        if self.moved is not None:
            expected |= {
                "moved.base_sizes": shape[:1],
                "moved.before": shape[:1],
                "moved.shifts": shape[:1],
            }
        if self.source_sizes is not None:
            expected["source_sizes"] = (len(self.sources), shape[0])
        for name, want in expected.items():
            if (got := np.shape(operator.attrgetter(name)(self))) != want:
                raise ValueError(
                    f"report, clusters of {self.variant}: {name} has shape {got}, expected {want}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class LeftOut:
    """Rows that a stage left out for one reason.

    `examples` are a few ids or places such as data.jsonl:17.
    """

    stage: str
    reason: str
    count: int
    examples: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Held-out results of one variant's target: by metric and source, and what else was seen.

    Losses are in nats, scores in 0..1. A source without a value is absent or None. `intervals` has
    low and high ends; those of the mean over all sources are under ALL. Macro means are taken
    here, over the sources that every variant has. `counts` and `differing` are those of
    EvaluationInfo, `differ` the number of rows about which rules differ.
    """

    variant: str
    num_examples: int
    target_steps: int
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    differ: int = 0
    differing: Sequence[Differing] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedTest:
    """How much larger a metric of the variant `first` is than that of `second`, mean over sources.

    `p` is corrected for the number of pairs.
    """

    metric: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, kw_only=True, eq=False)
class StageCost:
    """One artifact of the plan.

    `seconds` and `flops` are those of making it, also where it was reused from an earlier run.

    `variant` is empty where all variants share the artifact, else the names of those that use it.
    """

    stage: str
    variant: str
    reused: bool
    rows: int | None = None
    seconds: float | None = None
    flops: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportData:
    """Everything on the page: nothing per example but a few samples.

    Sections whose data are empty are not shown.

    `num_examples` counts the rows of the examples artifact; sources [S] and source_sizes [S] are
    its sources and their rows. Of a data set that extends another, `new_files` and
    `dropped_files` are names of raw files. `columns` says of each column of the raw files what
    became of it. `passed_over` says of files that folders or globs name why they are not read.
    """

    run: str
    created: str
    num_examples: int
    versions: Mapping[str, str] = field(default_factory=dict)
    subsets: Sequence[Subset] = ()
    sources: Sequence[str] = ()
    source_sizes: Sequence[int] = ()
    new_files: Sequence[str] = ()
    dropped_files: Sequence[str] = ()
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)
    proxies: Sequence[LossCurve] = ()
    clusterings: Sequence[Clustering] = ()
    left_out: Sequence[LeftOut] = ()
    evaluations: Sequence[Evaluation] = ()
    paired_tests: Sequence[PairedTest] = ()
    stages: Sequence[StageCost] = ()


# ---- What page and pictures share


class Cell(NamedTuple):
    """One number of a comparison, its text, whether it is the best of its row, and its interval."""

    value: float | None
    text: str
    best: bool
    interval: str = ""


class Metric(NamedTuple):
    """One metric by source and variant.

    It holds rows of (source, cells), the macro means and the number of sources they are over.
    """

    title: str
    rows: list[tuple[str, list[Cell]]]
    macro: list[Cell]
    num_macro: int


def duration(seconds: float | None) -> str:
    """Seconds in words, with minutes or hours where there are; a dash where they are not known."""
    if seconds is None or not math.isfinite(seconds):
        return "\u2013"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60:,} h {minutes % 60:02d} min"
    )


def clip(text: str, limit: int = MAX_TEXT) -> str:
    """The text without space around it, cut to `limit` characters.

    Where any are lost, the last character is an ellipsis.
    """
    text = text.replace("\r\n", "\n").strip()
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "\u2026"


def label_of(text: str) -> str:
    """Text for a picture: one line, short, and only characters that XML allows."""
    return FORBIDDEN.sub("\ufffd", clip(" ".join(text.split()), MAX_LABEL)) or "(no name)"
