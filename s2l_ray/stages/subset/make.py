"""`subset` from examples, trajectories and clusters: the chosen original rows, exactly the budget, in id order.

Rows are read once to find the draw, in tasks that leave their sorted keys in Ray's object store; the search asks these, other
tasks merge what they answer, and the driver holds samples and counts. The subset is then a filter over parts. Files have a
fixed number of rows, so their bytes do not depend on who made them.
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from s2l_ray.config import FACILITY_LOCATION, Rule, Subset, expressions
from s2l_ray.contract.work import Outcome, Work, part_dict, part_from
from s2l_ray.core.data import exports
from s2l_ray.core.data.original import original_rows
from s2l_ray.core.data.parts import ID_BITS
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.selection.draw import (
    Draw,
    Groups,
    Keys,
    Points,
    draw,
    groups_of,
    merged,
    needs,
    ordered_bits,
    quotas,
    rule_of,
)
from s2l_ray.core.selection.quotas import budget_rows
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.parquet import parquet_bytes, schema_from_text
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED, vectors
from s2l_ray.edge.parts import PartContext, one_by_one, part_context, parts_by_tasks
from s2l_ray.edge.placement import TASK_CPUS
from s2l_ray.edge.user_errors import reraise_user_errors
from s2l_ray.errors import UserError

# A question takes 1 ms of the driver for each chunk (tests/bench/bench_rules.py), and some 8 are asked: where there are more rows, chunks
# are larger instead of more, until sorting one takes 1 s and 190 MB.
ROWS_PER_TASK = 2**17
MOST_CHUNKS = 1000
MOST_ROWS_PER_TASK = 2**21
FAN_IN = 16  # answers that one process merges
# Of a task that asks keys or merges answers: Ray runs it where most of its arguments lie, if there is room; said in so many words, because
# a trial's own placement has no room for tasks.
NEAR = {"num_cpus": TASK_CPUS, "scheduling_strategy": "DEFAULT"}


@dataclass(frozen=True)
class Reading:
    """How rows of a part become groups and keys: the same for all parts, so it travels once.

    steps are the (member, step) of each stored column; stages names what is read of each artifact.
    """

    section: Subset
    rule: Rule
    groups: Groups
    steps: list[list[int]]
    columns: dict[str, list[str]]


def make(work: Work) -> Outcome:
    """Choose and write the rows.

    Raises:
        UserError: the budget is larger than the number of rows that can be chosen, or a score that is NaN.
    """
    section, trajectories = work.config.subset, work.manifests["trajectories"]
    reading = reading_of(work)
    budget = budget_rows(section.budget, trajectories.info["scored"])
    found = find(work, reading, budget)
    schema = work.manifests["examples"].info["schema"]
    names = {file["number"]: file["name"] for file in work.manifests["examples"].info["files"]}
    parts = parts_by_tasks(
        work,
        _file_jobs(work, found.rows_of_part),
        one_by_one(
            functools.partial(
                _make_part, reading=reading, choose=found.chosen, schema=schema, names=names
            )
        ),
    )
    stanzas = exports.stanzas(
        [
            exports.ChatFile(part.files["chat"].name, part.stats["tools"], part.stats["tool_calls"])
            for part in parts
        ]
    )
    return Outcome(
        parts,
        files=[work.artifact.write_named(name, data) for name, data in stanzas.items()],
        info=_info(work, reading, found, parts),
    )


def _info(work: Work, reading: Reading, found: "Found", parts: list[Part]) -> dict[str, Any]:
    section, before = work.config.subset, Counter(work.manifests["trajectories"].info["sources"])
    sources, clusters = Counter[str](), Counter[str]()
    for part in parts:
        sources.update(part.stats["sources"])
        clusters.update(part.stats["clusters"])
    of_clusters = None
    if "clusters" in work.manifests:
        of_clusters = [
            clusters[str(number)] for number in range(work.manifests["clusters"].info["k"])
        ]
    rule = reading.rule
    return {
        "rule": section.rule
        if isinstance(section.rule, str)
        else f"{rule.group}: {rule.score} ({rule.take} first)",
        "group": rule.group,
        "score": rule.score,
        "take": rule.take,
        "budget": int(found.quotas.sum()),
        "eligible": int(found.sizes.sum()),
        "groups": list(reading.groups.names),
        "sizes": found.sizes.tolist(),
        "quotas": found.quotas.tolist(),
        "sources": {source: [before[source], sources[source]] for source in sorted(before)},
        "clusters": of_clusters,
    }


def reading_of(work: Work) -> Reading:
    section, trajectories = work.config.subset, work.manifests["trajectories"]
    rule, wanted = rule_of(section), needs(section)
    clusters = work.manifests["clusters"].info if "clusters" in work.manifests else {}
    sources = sorted(trajectories.info["sources"])
    groups = groups_of(rule, sources, clusters.get("k", 0), _cluster_sources(clusters))
    if groups.own_sources and "cluster" in groups.kind:
        wanted -= {"source"}  # the cluster tells it
    columns = {}
    of_clusters = wanted & {"cluster", "distance"}
    if of_clusters:
        columns["clusters"] = ["example_id", *sorted({"cluster", *of_clusters})]
    if wanted - of_clusters or not of_clusters:
        columns["trajectories"] = ["example_id", "reason", *sorted(wanted - of_clusters)]
    return Reading(section, rule, groups, trajectories.info["steps"], columns)


def _cluster_sources(clusters: dict[str, Any]) -> list[str] | None:
    names = clusters.get("cluster_sources")
    return names if names and names[0] is not None else None


# -------------------------------------------------------------------------------------------------------------------- draw


@dataclass(frozen=True)
class Rows:
    """The rows of a part that can be chosen: which they are (bool, of all rows), and of these their id, their group and key,
    their cluster (None: no clusters were made) and their score (None: hash alone)."""

    eligible: np.ndarray
    ids: np.ndarray
    points: Points
    clusters: np.ndarray | None
    scores: np.ndarray | None


@dataclass(frozen=True)
class Found:
    """What the search gave: sizes and quotas int64 [G], which rows of a part are chosen (bool [n]), and how many of each part."""

    sizes: np.ndarray
    quotas: np.ndarray
    chosen: Callable[[Rows], np.ndarray]
    rows_of_part: list[int]


def find(work: Work, reading: Reading, budget: int) -> Found:
    """Which rows the rule chooses."""
    found = _find_covering if work.config.subset.rule == FACILITY_LOCATION else _find_by_keys
    sizes, taken, chosen, rows_of_part = found(work, reading, budget)
    if sum(rows_of_part) != budget:
        raise UserError(
            f"choosing the subset: expected {budget} rows, got {sum(rows_of_part)}: example ids repeat in {work.inputs['examples'].uri}. "
            "Remove that folder and run again."
        )
    return Found(sizes, taken, chosen, rows_of_part)


_Answer = tuple[np.ndarray, np.ndarray, Callable[[Rows], np.ndarray], list[int]]


def _find_covering(work: Work, reading: Reading, budget: int) -> _Answer:
    from s2l_ray.stages.subset import facility as subset_facility

    work.rows_began(time.time())
    listed, rows_of_part = subset_facility.find(work, budget)
    size = np.array([work.manifests["trajectories"].info["scored"]])
    return size, np.array([budget]), functools.partial(_is_listed, listed), rows_of_part


def _is_listed(listed: Any, rows: Rows) -> np.ndarray:
    chosen: np.ndarray = listed.chosen(rows.ids)
    return chosen


def _has_key(drawn: Draw, rows: Rows) -> np.ndarray:
    return drawn.chosen(rows.points)


def _find_by_keys(work: Work, reading: Reading, budget: int) -> _Answer:
    """The draw of a rule with a group and a score; every part is read once."""
    chunks = _chunks(work, reading)
    shared = ray.put((part_context(work), reading))
    sorted_keys = _sorted_keys.options(
        num_returns=3, num_cpus=TASK_CPUS, scheduling_strategy="SPREAD"
    )
    made: list[Any] = [sorted_keys.remote(shared, chunk) for chunk in chunks]
    keys = [own for own, _, _ in made]

    def ask(method: str, args: tuple[Any, ...]) -> list[Any]:
        together = ray.put(args)
        return _few(method, [_ask.options(**NEAR).remote(ref, method, together) for ref in keys])

    sizes = sum(
        _few("sizes", [own for _, own, _ in made]), np.zeros(len(reading.groups.names), np.int64)
    )
    for began in ray.get([began for _, _, began in made]):
        work.rows_began(began)
    wanted = quotas(sizes, budget, work.config.subset.small_last, reading.groups.parents)
    drawn = draw(ask, sizes, wanted, reading.rule.take)
    draw_ref = ray.put(drawn)
    counts = [
        _count.options(**NEAR).remote(ref, draw_ref, len(chunk))
        for ref, chunk in zip(keys, chunks, strict=True)
    ]
    rows_of_part = np.concatenate(ray.get(counts)).tolist()
    return sizes, wanted, functools.partial(_has_key, drawn), rows_of_part


def _few(method: str, answers: list[Any]) -> list[Any]:
    """At most FAN_IN answers to a question, from references to those of all chunks: tasks merge them, level by level."""
    while len(answers) > FAN_IN:
        answers = [
            _merged.options(**NEAR).remote(method, *answers[first : first + FAN_IN])
            for first in range(0, len(answers), FAN_IN)
        ]
    with reraise_user_errors():
        few: list[Any] = ray.get(answers)
    return few


def rows_per_task(total: int) -> int:
    """Rows of a chunk where there are so many in all."""
    return min(max(ROWS_PER_TASK, math.ceil(total / MOST_CHUNKS)), MOST_ROWS_PER_TASK)


def _chunks(work: Work, reading: Reading) -> list[list[dict[str, Any]]]:
    """Neighbouring parts of all artifacts that are read, some `rows_per_task` together."""
    several = list(zip(*(work.manifests[stage].parts for stage in reading.columns), strict=True))
    most = rows_per_task(sum(parts[0].rows for parts in several))
    chunks: list[list[dict[str, Any]]] = []
    rows = most
    for parts in several:
        if rows + parts[0].rows > most:
            chunks.append([])
            rows = 0
        chunks[-1].append(
            {stage: part_dict(part) for stage, part in zip(reading.columns, parts, strict=True)}
        )
        rows += parts[0].rows
    return chunks


@ray.remote
def _sorted_keys(
    shared: tuple[PartContext, Reading], chunk: list[dict[str, Any]]
) -> tuple[Keys, np.ndarray, float]:
    """Keys of a chunk of parts; how many rows each group has there; and when this began."""
    (context, reading), began = shared, time.time()
    points = [read_rows(context, reading, parts).points for parts in chunk]
    numbers = np.arange(
        len(points), dtype=np.min_scalar_type(len(points))
    )  # one byte a row where it can be
    numbers = np.repeat(numbers, [len(part.groups) for part in points])
    keys = Keys.of(Points.joined(points), numbers, len(reading.groups.names))
    return keys, keys.sizes(), began


@ray.remote
def _ask(keys: Keys, method: str, args: tuple[Any, ...]) -> Any:
    return getattr(keys, method)(*args)


@ray.remote
def _merged(method: str, *answers: Any) -> Any:
    return merged(method, answers)


@ray.remote
def _count(keys: Keys, drawn: Draw, num_parts: int) -> np.ndarray:
    return keys.count(drawn, num_parts)


# -------------------------------------------------------------------------------------------------------------------- rows


def read_rows(context: PartContext, reading: Reading, parts: dict[str, Any]) -> Rows:
    """Groups and keys of a part; `parts` are descriptors by stage.

    Raises:
        UserError: a score is NaN, or cannot be computed.
    """
    columns: dict[str, Any] = {}
    eligible = np.ones(0, bool)
    for stage, names in reading.columns.items():
        table = context.inputs[stage].read_part(part_from(parts[stage]), names)
        marks = (
            table["reason"].is_null() if stage == "trajectories" else table["cluster"].is_valid()
        )
        eligible = marks.to_numpy()
        if not eligible.all():
            table = table.filter(marks)
        columns |= {name: table[name] for name in names}
    ids = columns["example_id"].to_numpy()
    clusters = columns["cluster"].to_numpy().astype(np.int64) if "cluster" in columns else None
    sources = _numbers(columns["source"], reading.groups.sources) if "source" in columns else None
    groups = np.broadcast_to(reading.groups.numbers(sources, clusters), len(ids))
    score = None
    bits = np.zeros(len(ids), np.uint64)
    if reading.rule.score != expressions.HASH:
        score = _scores(reading, columns, ids)
        bits = ordered_bits(score)
    points = Points(groups, bits, keyed_hash(reading.section.seed, ids))
    return Rows(eligible, ids, points, clusters, score)


def _numbers(column: pa.ChunkedArray, names: tuple[str, ...]) -> np.ndarray:
    """Place of each row's source among the names, int64 [n]."""
    encoded = column.combine_chunks().dictionary_encode()
    place = {name: number for number, name in enumerate(names)}
    known = np.array([place[name] for name in encoded.dictionary.to_pylist()], np.int64)
    return known[encoded.indices.to_numpy()]


def _scores(reading: Reading, columns: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """The rule's score of every row, float64 [n]: the mean over the members of an ensemble."""
    expression = expressions.parse(reading.rule.score)
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
    of_member = np.array([member for member, _ in reading.steps])
    scores = []
    for member in np.unique(of_member) if per_step else of_member[:1]:
        own = np.flatnonzero(of_member == member)
        steps = [reading.steps[column][1] for column in own]
        arrays = per_row | {
            name: values[:, own].astype(np.float64) for name, values in per_step.items()
        }
        at = _at(reading.section, steps) if expression.uses_at else 0
        try:
            scores.append(expression(expressions.Columns(arrays, len(ids), len(steps), at)))
        except expressions.ExpressionError as error:
            raise UserError(f"choosing the subset: subset.rule's score {error}.") from None
    score: np.ndarray = np.mean(scores, axis=0)
    wrong = np.flatnonzero(np.isnan(score))
    if len(wrong):
        raise UserError(
            f"choosing the subset: the score {expression.text!r} is NaN (not a number) for {len(wrong)} row(s), example_id "
            f"{ids[wrong[0]]} first. Change the expression so that it has a value there, for example with where()."
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
    """The column that subset.at means, among a member's steps, step 0 first."""
    if section.at == "late":
        return len(steps) - 1
    if section.at == "early":
        return 1
    if section.at not in steps:
        raise UserError(
            f"choosing the subset: expected subset.at to be early, late or a stored step, {', '.join(map(str, steps))}; "
            f"got {section.at}. Change subset.at."
        )
    return steps.index(section.at)


# ------------------------------------------------------------------------------------------------------------------- files


def _file_jobs(work: Work, rows_of_part: list[int]) -> dict[int, dict[str, Any]]:
    """Which parts each output file takes its rows from: file f holds the chosen rows f*R to (f+1)*R."""
    size = work.config.subset.rows_per_file
    total = sum(rows_of_part)
    jobs: dict[int, dict[str, Any]] = {
        number: {"parts": [], "rows": min(size, total - number * size)}
        for number in range(math.ceil(total / size))
    }
    stages = [
        stage for stage in ("examples", "trajectories", "clusters") if stage in work.manifests
    ]
    first = 0
    for rows, *parts in zip(
        rows_of_part, *(work.manifests[stage].parts for stage in stages), strict=True
    ):
        end = first + rows
        for number in range(first // size, math.ceil(end / size)) if rows else ():
            job = jobs[number]
            job.setdefault("skip", number * size - first)
            job["parts"].append(
                {stage: part_dict(part) for stage, part in zip(stages, parts, strict=True)}
            )
        first = end
    return jobs


def _make_part(
    context: PartContext,
    job: dict[str, Any],
    reading: Reading,
    choose: Callable[[Rows], np.ndarray],
    schema: str,
    names: dict[int, str],
) -> Part:
    original = schema_from_text(schema, "examples")
    several = [_chosen_rows(context, reading, choose, parts, original) for parts in job["parts"]]
    table = pa.concat_tables(several).slice(job["skip"], job["rows"]).combine_chunks()
    data = _data(table)
    messages = table.select(["example_id", "source", "messages", "tools"])
    files = {
        "data": (".parquet", parquet_bytes(data)),
        "jsonl": (".jsonl", exports.json_lines(data)),
        "messages": (".parquet", parquet_bytes(messages)),
        "chat": (".jsonl", exports.chat_lines(messages)),
        "index": (".parquet", parquet_bytes(_index(table, names))),
    }
    extra = messages["messages"].combine_chunks().flatten().field("extra")
    stats = {
        "sources": dict(Counter(table["source"].to_pylist())),
        "clusters": dict(Counter(map(str, table["cluster"].drop_null().to_pylist()))),
        "tools": len(table) - table["tools"].null_count,
        "tool_calls": pc.sum(pc.match_substring(extra, '"tool_calls":')).as_py() or 0,
    }
    return context.write(job["index"], table.num_rows, files, stats)


def _chosen_rows(
    context: PartContext,
    reading: Reading,
    choose: Callable[[Rows], np.ndarray],
    parts: dict[str, Any],
    schema: pa.Schema,
) -> pa.Table:
    """The chosen rows of a part: the columns of examples, cluster, and score where the rule has one.

    The struct `original` has the columns of all files; those that the row's own file lacks are null.
    """
    rows = read_rows(context, reading, parts)
    chosen = choose(rows)
    keep = rows.eligible.copy()
    keep[keep] = chosen
    table = (
        context.inputs["examples"].read_part(part_from(parts["examples"])).filter(pa.array(keep))
    )
    original = original_rows(table, schema).combine_chunks()
    table = table.select(EXAMPLES_FIXED.names).append_column("original", original.to_struct_array())
    clusters = (
        np.zeros(len(chosen), np.int32) if rows.clusters is None else rows.clusters.astype(np.int32)
    )
    none = np.full(int(chosen.sum()), rows.clusters is None)
    table = table.append_column("cluster", pa.array(clusters[chosen], mask=none))
    if rows.scores is not None:
        table = table.append_column("score", pa.array(rows.scores[chosen], pa.float64()))
    return table


def _data(table: pa.Table) -> pa.Table:
    """example_id, source, cluster, score where the rule has one, then the original columns."""
    original = pa.Table.from_struct_array(table["original"])
    added = [
        name for name in ("example_id", "source", "cluster", "score") if name in table.column_names
    ]
    kept = original.select([name for name in original.column_names if name != "source"])
    fields = [
        *(table.schema.field(name) for name in added),
        *kept.schema,
    ]  # which tell columns of JSON text
    return pa.table([*(table[name] for name in added), *kept.columns], schema=pa.schema(fields))


def _index(table: pa.Table, names: dict[int, str]) -> pa.Table:
    """Where each row lies in the raw files, without its text: example_id, file, row (from 0), source, cluster."""
    ids = table["example_id"].to_numpy()
    files = pa.array([names[number] for number in (ids >> ID_BITS).tolist()], pa.string())
    rows = pa.array(ids & ((1 << ID_BITS) - 1), pa.int64())
    columns = {"example_id": table["example_id"], "file": files, "row": rows}
    return pa.table(columns | {name: table[name] for name in ("source", "cluster")})
