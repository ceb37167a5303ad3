"""The rows of a part that a rule can choose: their groups and keys, from the stored columns."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import Rule, Subset, expressions
from s2l_ray.contract.work import Work
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.selection.keys import Points, ordered_bits
from s2l_ray.core.selection.rules import Groups, groups_of, needs, purpose, rule_of
from s2l_ray.core.storage.info import ClustersInfo, TrajectoriesInfo
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.records import from_json, to_json
from s2l_ray.core.storage.schemas import vectors
from s2l_ray.edge.parts import PartContext
from s2l_ray.errors import UserError

# What a task needs to read one part of several artifacts: stage -> `Part` as JSON.
Descriptors = dict[str, dict[str, Any]]


def descriptors(work: Work, stages: Iterable[str]) -> list[Descriptors]:
    """Of each part, how to read it in the artifacts of some stages."""
    stages = list(stages)
    several = zip(*(work.manifests[stage].parts for stage in stages), strict=True)
    return [
        {stage: to_json(part.for_reading) for stage, part in zip(stages, parts, strict=True)}
        for parts in several
    ]


@dataclass(frozen=True)
class Rows:
    """The n rows of a part that can be chosen.

    Attributes:
        eligible: which rows of the part they are, bool [rows of the part].
        ids: their example ids, int64 [n].
        points: their groups and keys, [n].
        clusters: int64 [n], or None if the rule reads no clusters.
        scores: float64 [n], or None if the rule has no score.
    """

    eligible: np.ndarray
    ids: np.ndarray
    points: Points
    clusters: np.ndarray | None
    scores: np.ndarray | None


@dataclass(frozen=True)
class Choice:
    """Which rows a rule chooses.

    Attributes:
        sizes, quotas: rows of each group, and how many of them are chosen, int64 [G].
        chosen: which of a part's `Rows` are chosen, bool [n]; it travels to the tasks that write.
        rows_of_part: how many rows of each part are chosen.
    """

    sizes: np.ndarray
    quotas: np.ndarray
    chosen: Callable[[Rows], np.ndarray]
    rows_of_part: list[int]


@dataclass(frozen=True)
class RowReader:
    """Makes groups and keys of the rows of a part; the same for all parts, so it travels once.

    Attributes:
        steps: (member of the ensemble, step) of each stored column of a statistic.
        columns: stage -> the columns that are read of its artifact.
    """

    section: Subset
    rule: Rule
    groups: Groups
    steps: list[list[int]]
    columns: dict[str, list[str]]

    def read(self, context: PartContext, parts: Descriptors) -> Rows:
        """The rows of a part that can be chosen.

        Raises:
            UserError: a score is NaN, or cannot be computed.
        """
        columns: dict[str, Any] = {}
        eligible = np.ones(0, bool)
        for stage, names in self.columns.items():
            table = context.inputs[stage].read_part(from_json(Part, parts[stage]), names)
            if stage == "trajectories":
                marks = table["reason"].is_null()
            else:
                marks = table["cluster"].is_valid()
            eligible = marks.to_numpy()
            if not eligible.all():
                table = table.filter(marks)
            columns |= {name: table[name] for name in names}
        ids = columns["example_id"].to_numpy()
        clusters = columns["cluster"].to_numpy().astype(np.int64) if "cluster" in columns else None
        sources = _numbers(columns["source"], self.groups.sources) if "source" in columns else None
        groups = np.broadcast_to(self.groups.numbers(sources, clusters), len(ids))
        scores = None
        bits = np.zeros(len(ids), np.uint64)
        if self.rule.score != expressions.HASH:
            scores = _scores(self, columns, ids)
            bits = ordered_bits(scores)
        points = Points(groups, bits, keyed_hash(purpose(self.section), self.section.seed, ids))
        return Rows(eligible, ids, points, clusters, scores)


def row_reader(work: Work) -> RowReader:
    """What the rule of a job reads, and the groups that it makes."""
    section, trajectories = work.config.subset, work.info("trajectories", TrajectoriesInfo)
    rule, wanted = rule_of(section), needs(section)
    num_clusters, cluster_sources = 0, None
    if "clusters" in work.manifests:
        clusters = work.info("clusters", ClustersInfo)
        num_clusters, cluster_sources = clusters.k, _cluster_sources(clusters)
    sources = sorted(trajectories.sources)
    groups = groups_of(rule, sources, num_clusters, cluster_sources)
    if groups.clusters_have_source and "cluster" in groups.kind:
        # The cluster says the source.
        wanted -= {"source"}
    columns = {}
    of_clusters = wanted & {"cluster", "distance"}
    if of_clusters:
        columns["clusters"] = ["example_id", *sorted({"cluster", *of_clusters})]
    if wanted - of_clusters or not of_clusters:
        columns["trajectories"] = ["example_id", "reason", *sorted(wanted - of_clusters)]
    return RowReader(section, rule, groups, trajectories.steps, columns)


def _cluster_sources(clusters: ClustersInfo) -> list[str] | None:
    """The source of each cluster; None where clusters hold rows of any source."""
    names = [name for name in clusters.cluster_sources if name is not None]
    return names or None


def _numbers(column: pa.ChunkedArray, names: tuple[str, ...]) -> np.ndarray:
    """Place of each row's source among the names, int64 [n]."""
    encoded = column.combine_chunks().dictionary_encode()
    place = {name: number for number, name in enumerate(names)}
    known = np.array([place[name] for name in encoded.dictionary.to_pylist()], np.int64)
    return known[encoded.indices.to_numpy()]


def _scores(reader: RowReader, columns: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """The rule's score of every row, float64 [n]: the mean over the members of an ensemble."""
    expression = expressions.parse(reader.rule.score)
    stored = {name: columns[expressions.COLUMNS[name]] for name in expression.names}
    per_step = {
        name: _matrix(column, name)
        for name, column in stored.items()
        if name not in expressions.PER_ROW
    }
    per_row = {
        name: column.cast(pa.float64()).to_numpy()[:, None]
        for name, column in stored.items()
        if name in expressions.PER_ROW
    }
    of_member = np.array([member for member, _ in reader.steps])
    scores = []
    for member in np.unique(of_member) if per_step else of_member[:1]:
        own = np.flatnonzero(of_member == member)
        steps = [reader.steps[column][1] for column in own]
        arrays = per_row | {
            name: values[:, own].astype(np.float64) for name, values in per_step.items()
        }
        at = _at(reader.section, steps) if expression.uses_at else 0
        try:
            scores.append(expression(expressions.Columns(arrays, len(ids), len(steps), at)))
        except expressions.ExpressionError as error:
            raise UserError(f"choosing the subset: subset.rule's score {error}.") from None
    score: np.ndarray = np.mean(scores, axis=0)
    is_nan = np.isnan(score)
    if is_nan.any():
        raise UserError(
            f"choosing the subset: the score {expression.text!r} is NaN (not a number) for "
            f"{is_nan.sum()} row(s), example_id {ids[is_nan][0]} first. Change the expression so "
            "that it has a value there, for example with where()."
        )
    return score


def _matrix(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """float32 [n, S]; NaN where a row that was scored lacks this statistic."""
    valid, values = vectors(column, f"the statistic {name} of trajectories")
    if valid.all():
        return values
    full = np.full((len(valid), values.shape[1]), np.nan, np.float32)
    full[valid] = values
    return full


def _at(section: Subset, steps: list[int]) -> int:
    """Which of a member's steps, step 0 first, `subset.at` means."""
    if section.at == "late":
        return len(steps) - 1
    if section.at == "early":
        return 1
    if section.at not in steps:
        raise UserError(
            "choosing the subset: expected subset.at to be early, late or a stored step, "
            f"{', '.join(map(str, steps))}; got {section.at}. Change subset.at."
        )
    return steps.index(section.at)
