"""Committed artifacts with made-up content: what stages read, without the stages that make it.

Losses fall from a random height, as those of real rows do; the other statistics follow from them.
`build` writes examples, trajectories with all statistics, and clusters, part by part, so that a
million rows fit in memory.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import expressions
from s2l_ray.contract.work import Outcome
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import (
    ClustersInfo,
    ExamplesInfo,
    Info,
    NumberedFile,
    TrajectoriesInfo,
)
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.parquet import parquet_bytes, schema_text
from s2l_ray.core.storage.schemas import CLUSTERS, MESSAGES, trajectories_schema, vector_column
from s2l_ray.core.storage.store import Store
from tests.committed import commit, info_with

STATISTICS = list(expressions.STATISTICS)
# the fingerprint of all of them
NAME = "made"


def build(
    storage: str,
    rows: int,
    rows_per_part: int = 16_384,
    steps: int = 12,
    sources: Iterable[str] = ("s",),
    clusters: int = 100,
    statistics: Iterable[str] = STATISTICS,
    members: int = 1,
    change: Callable[[str, pa.Table], pa.Table] = lambda stage, table: table,
) -> dict[str, Manifest]:
    """Commit examples, trajectories and clusters of one file of `rows` rows.

    Args:
        steps: stored steps of each of `members` proxies, step 0 included.
        change: a last word on every table before it is written, by stage.
    """
    stages = ("examples", "trajectories", "clusters")
    artifacts = {stage: Artifact(Store(storage), stage, NAME) for stage in stages}
    made: dict[str, list[Any]] = {stage: [] for stage in stages}
    sizes, scored, schema = Counter[int](), Counter[str](), ""
    for index, first in enumerate(range(0, rows, rows_per_part)):
        count = min(rows_per_part, rows - first)
        tables = part_tables(
            first, count, steps * members, list(sources), clusters, list(statistics)
        )
        tables = {stage: change(stage, table) for stage, table in tables.items()}
        schema = schema_text(pa.schema(list(tables["examples"].schema.field("original").type)))
        known = tables["trajectories"]["reason"].is_null()
        of_part = Counter(tables["trajectories"].filter(known)["source"].to_pylist())
        for stage, table in tables.items():
            files = {"data": (".parquet", parquet_bytes(table))}
            made[stage].append(
                artifacts[stage].write_part(index, count, files, "", "", {"sources": dict(of_part)})
            )
        scored.update(of_part)
        sizes.update(tables["clusters"].filter(known)["cluster"].to_pylist())
    order = [[member, step] for member in range(members) for step in range(steps)]
    infos: dict[str, Info] = {
        "examples": info_with(
            ExamplesInfo, schema=schema, files=[NumberedFile(0, "rows.jsonl", 1, "")]
        ),
        "trajectories": info_with(
            TrajectoriesInfo,
            scored=sum(scored.values()),
            sources=dict(scored),
            steps=order,
            statistics=list(statistics),
        ),
        "clusters": info_with(
            ClustersInfo,
            k=clusters,
            sizes=[sizes[number] for number in range(clusters)],
            cluster_sources=[None] * clusters,
        ),
    }
    return {
        stage: commit(artifacts[stage], Outcome(parts, info=infos[stage]))
        for stage, parts in made.items()
    }


def part_tables(
    first: int, count: int, columns: int, sources: list[str], clusters: int, statistics: list[str]
) -> dict[str, pa.Table]:
    """One part of each artifact: rows `first` to `first + count`, `columns` stored steps of all
    proxies together.
    """
    numbers = np.random.default_rng(first)
    start, rate = numbers.uniform(1, 6, (count, 1)), numbers.uniform(0, 0.3, (count, 1))
    losses = start * np.exp(-rate * np.arange(columns)) + numbers.normal(0, 0.05, (count, columns))
    everyone = np.ones(count, bool)
    of_statistic = {
        "mean_probability": np.exp(-np.abs(losses)),
        "min_probability": np.exp(-2 * np.abs(losses)),
        "el2n": np.sqrt(2) * (1 - np.exp(-np.abs(losses))),
        "grand": np.abs(losses) * numbers.uniform(0.5, 2, (count, 1)),
        "answer_loss": losses + numbers.normal(0.5, 0.5, (count, columns)),
    }
    ids = pa.array(np.arange(first, first + count))
    shares = np.arange(1, len(sources) + 1) / sum(range(1, len(sources) + 1))
    source = pa.array(np.array(sources)[numbers.choice(len(sources), count, p=shares)].tolist())
    trajectories = {
        "example_id": ids,
        "source": source,
        "num_tokens": pa.array(numbers.integers(1, 400, count).astype(np.int32)),
        "losses": vector_column(everyone, losses),
        **{name: vector_column(everyone, of_statistic[name]) for name in statistics},
        "reason": pa.nulls(count, pa.string()),
    }
    shares = np.arange(1, clusters + 1) / sum(range(1, clusters + 1))
    labels = {
        "example_id": ids,
        "cluster": pa.array(numbers.choice(clusters, count, p=shares).astype(np.int32)),
        "distance": pa.array(numbers.gamma(2, 1, count).astype(np.float32)),
    }
    return {
        "examples": example_table(ids, source),
        "trajectories": pa.table(trajectories, schema=trajectories_schema(columns, statistics)),
        "clusters": pa.table(labels, schema=CLUSTERS),
    }


def example_table(ids: pa.Array, source: pa.Array) -> pa.Table:
    """Examples of one turn each, with the originals instruction, output, source and a number."""
    question = pa.array([f"What is {number} and one?" for number in ids.to_pylist()])
    answer = pa.array([str(number + 1) for number in ids.to_pylist()])
    nothing, count = pa.nulls(2 * len(ids), pa.string()), len(ids)
    turns = pa.StructArray.from_arrays(
        [
            pa.array(["user", "assistant"] * count),
            pa.array(
                [
                    text
                    for pair in zip(question.to_pylist(), answer.to_pylist(), strict=True)
                    for text in pair
                ]
            ),
            nothing,
            nothing,
            pa.array([False, False] * count),
        ],
        fields=list(MESSAGES.value_type),
    )
    original = {
        "instruction": question,
        "output": answer,
        "source": source,
        "grade": ids.cast(pa.float64()),
    }
    columns = {
        "example_id": ids,
        "source": source,
        "messages": pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * 2, pa.int32()), turns),
        "tools": pa.nulls(count, pa.string()),
        "original": pa.StructArray.from_arrays(list(original.values()), names=list(original)),
    }
    return pa.table(columns)
