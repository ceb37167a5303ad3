"""`subset` from examples, trajectories and clusters: the chosen original rows, exactly the budget, in id order.

A draw is one key threshold per group: two passes over ids and groups find it, and the subset is a filter over parts. Files
have a fixed number of rows, so their bytes do not depend on who made them.
"""

import base64
import functools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from s2l_ray.config import budget_rows
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.rawfiles import original_rows
from s2l_ray.core.selection import (
    RULES,
    Boundary,
    boundary,
    boundary_keys,
    chosen,
    leading_histogram,
    quotas,
    thresholds,
)
from s2l_ray.core.store import Part
from s2l_ray.core.tables import parquet_bytes, schema_from_text
from s2l_ray.stages.edge import PartContext, bounded, make_parts, part_context
from s2l_ray.stages.work import Outcome, Work, part_dict, part_from

PARTS_PER_TASK = 32


def make(work: Work) -> Outcome:
    """Choose and write the rows.

    Raises:
        UserError: the budget is larger than the number of rows that can be chosen.
    """
    section, examples, trajectories = (
        work.config.subset,
        work.manifests["examples"],
        work.manifests["trajectories"],
    )
    names = _group_names(work)
    budget = budget_rows(section.budget, trajectories.info["scored"])
    grouped = work.manifests[_groups_from(work)].parts
    chunks = [
        [part_dict(p) for p in grouped[i : i + PARTS_PER_TASK]]
        for i in range(0, len(grouped), PARTS_PER_TASK)
    ]
    context = part_context(work)

    histogram = sum(bounded(_histogram, [(context, names, chunk) for chunk in chunks]))
    sizes = np.asarray(histogram).sum(axis=1)
    wanted = quotas(sizes, budget)
    where = boundary(np.asarray(histogram), wanted)
    keys = [
        key
        for answer in bounded(_boundary_keys, [(context, names, chunk, where) for chunk in chunks])
        for key in answer
    ]
    groups = np.concatenate([group for group, _ in keys]) if keys else np.empty(0, np.int64)
    last = thresholds(
        groups, np.concatenate([key for _, key in keys]) if keys else np.empty(0, np.uint64), where
    )
    draw = {"names": names, "quotas": wanted.tolist(), "thresholds": [str(value) for value in last]}
    counts = dict(
        pair for answer in bounded(_count, [(context, draw, chunk) for chunk in chunks]) for pair in answer
    )
    schema = examples.info["schema"]
    parts = make_parts(
        work, _file_jobs(work, counts), make=functools.partial(_make_part, draw=draw, schema=schema)
    )
    before, after = Counter(trajectories.info["sources"]), Counter[str]()
    for part in parts:
        after.update(part.stats["sources"])
    info = {
        "rule": section.rule,
        "budget": budget,
        "eligible": int(sizes.sum()),
        "groups": names,
        "sizes": sizes.tolist(),
        "quotas": wanted.tolist(),
        "sources": {source: [before[source], after[source]] for source in sorted(before)},
    }
    return Outcome(parts, info=info)


def _groups_from(work: Work) -> str:
    return "clusters" if RULES[work.config.subset.rule].group == "cluster" else "trajectories"


def _group_names(work: Work) -> list[str]:
    """The groups by number, as people know them."""
    group = RULES[work.config.subset.rule].group
    if group == "cluster":
        return [str(number) for number in range(work.config.clusters.k)]
    return sorted(work.manifests["trajectories"].info["sources"]) if group == "source" else ["all"]


def _keys(context: PartContext, names: list[str], part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Group int64 [n] (-1: cannot be chosen) and key uint64 [n] of a part's rows."""
    rule = RULES[context.config.subset.rule]
    if rule.group == "cluster":
        table = context.inputs["clusters"].read_part(part, ["example_id", "cluster"])
        groups = table["cluster"].fill_null(-1).to_numpy().astype(np.int64)
    else:
        table = context.inputs["trajectories"].read_part(part, ["example_id", "source", "reason"])
        number = {name: index for index, name in enumerate(names)}
        everyone = rule.group == "all"
        groups = np.array(
            [0 if everyone else number.get(source, -1) for source in table["source"].to_pylist()], np.int64
        )
        groups[table["reason"].is_valid().to_numpy()] = -1
    return groups, keyed_hash(context.config.subset.seed, table["example_id"].to_numpy())


@ray.remote
def _histogram(context: PartContext, names: list[str], chunk: list[dict[str, Any]]) -> np.ndarray:
    return sum(
        leading_histogram(*_keys(context, names, part_from(raw)), num_groups=len(names)) for raw in chunk
    )  # type: ignore[return-value]


@ray.remote
def _boundary_keys(
    context: PartContext, names: list[str], chunk: list[dict[str, Any]], where: Boundary
) -> list[tuple[np.ndarray, np.ndarray]]:
    return [boundary_keys(*_keys(context, names, part_from(raw)), where) for raw in chunk]


def _chosen(context: PartContext, draw: dict[str, Any], part: Part) -> tuple[np.ndarray, np.ndarray]:
    groups, keys = _keys(context, draw["names"], part)
    last = np.array([int(value) for value in draw["thresholds"]], np.uint64)
    return chosen(groups, keys, quotas=np.array(draw["quotas"]), thresholds=last), groups


@ray.remote
def _count(context: PartContext, draw: dict[str, Any], chunk: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(raw["index"], int(_chosen(context, draw, part_from(raw))[0].sum())) for raw in chunk]


def _file_jobs(work: Work, counts: dict[int, int]) -> dict[int, dict[str, Any]]:
    """Which parts each output file takes its rows from: file f holds the chosen rows f*R to (f+1)*R."""
    size = work.config.subset.rows_per_file
    total = sum(counts.values())
    jobs: dict[int, dict[str, Any]] = {
        number: {
            "parts": [],
            "rows": min(size, total - number * size),
        }
        for number in range(math.ceil(total / size))
    }
    first = 0
    for example, group in zip(
        work.manifests["examples"].parts, work.manifests[_groups_from(work)].parts, strict=True
    ):
        end = first + counts[example.index]
        for number in range(first // size, math.ceil(end / size)) if end > first else ():
            job = jobs[number]
            job.setdefault("skip", number * size - first)
            job["parts"].append([part_dict(example), part_dict(group)])
        first = end
    return jobs


def _make_part(context: PartContext, job: dict[str, Any], draw: dict[str, Any], schema: str) -> Part:
    original = schema_from_text(schema, "examples")
    tables = [_chosen_rows(context, draw, part_from(e), part_from(g), original) for e, g in job["parts"]]
    table = pa.concat_tables(tables).slice(job["skip"], job["rows"]).combine_chunks()
    files = {"data": (".parquet", parquet_bytes(table)), "jsonl": (".jsonl", _jsonl(table))}
    return context.write(
        job["index"], table.num_rows, files, {"sources": dict(Counter(table["source"].to_pylist()))}
    )


def _chosen_rows(
    context: PartContext,
    draw: dict[str, Any],
    part: Part,
    group_part: Part,
    schema: pa.Schema,
) -> pa.Table:
    keep, groups = _chosen(context, draw, group_part)
    rows = context.inputs["examples"].read_part(part).filter(pa.array(keep))
    original = pa.concat_tables([schema.empty_table(), original_rows(rows)], promote_options="permissive")
    by_cluster = RULES[context.config.subset.rule].group == "cluster"
    cluster = pa.array(groups[keep].astype(np.int32), mask=np.full(int(keep.sum()), not by_cluster))
    arrays = {"example_id": rows["example_id"], "source": rows["source"], "cluster": cluster}
    arrays.update({name: original[name] for name in schema.names if name != "source"})
    return pa.table(arrays)


def _jsonl(table: pa.Table) -> bytes:
    lines = []
    for row in table.to_pylist():
        try:
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain))
        except ValueError:  # NaN and infinity are not JSON
            lines.append(json.dumps(_finite(row), ensure_ascii=False, default=_plain))
    return "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
