"""The files of a subset: the chosen rows in id order, a fixed number of them a file.

So the bytes of a file depend neither on the parts that its rows are from nor on the task that
writes it. Every file is written in several forms (roles), which all hold the same rows:

    data      Parquet: example_id, source, cluster, score where the rule has one, original columns
    jsonl     the same as JSON lines
    messages  Parquet: the conversations as the training stages read them
    chat      JSON lines of conversations as other trainers read them
    index     Parquet: where each row lies in the raw files
"""

import functools
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.contract.work import Work
from s2l_ray.core.data import exports
from s2l_ray.core.data.original import original_rows, original_texts
from s2l_ray.core.data.parts import ID_BITS
from s2l_ray.core.storage.info import ExamplesInfo
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.parquet import parquet_bytes, schema_from_text
from s2l_ray.core.storage.records import from_json
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED
from s2l_ray.edge.parts import PartContext, one_by_one, parts_by_tasks
from s2l_ray.stages.subset.rows import Choice, Descriptors, RowReader, descriptors


def write(work: Work, reader: RowReader, choice: Choice) -> list[Part]:
    """Write the chosen rows; see the text above for the files."""
    examples = work.info("examples", ExamplesInfo)
    make = functools.partial(
        _make_part,
        reader=reader,
        choice=choice,
        schema=examples.schema,
        names={file.number: file.name for file in examples.files},
    )
    return parts_by_tasks(work, _jobs(work, choice.rows_of_part), one_by_one(make))


def _jobs(work: Work, rows_of_part: list[int]) -> dict[int, dict[str, Any]]:
    """Which parts each file takes its rows from: file f holds the chosen rows f * R to (f + 1) * R.

    Returns:
        File number -> {"parts": descriptors, "skip": chosen rows of the first part that earlier
        files hold, "rows": rows of the file}.
    """
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
    for rows, parts in zip(rows_of_part, descriptors(work, stages), strict=True):
        end = first + rows
        for number in range(first // size, math.ceil(end / size)) if rows else ():
            job = jobs[number]
            job.setdefault("skip", number * size - first)
            job["parts"].append(parts)
        first = end
    return jobs


def _make_part(
    context: PartContext,
    job: dict[str, Any],
    reader: RowReader,
    choice: Choice,
    schema: str,
    names: dict[int, str],
) -> Part:
    original = schema_from_text(schema, "examples")
    several = [_chosen_rows(context, reader, choice, parts, original) for parts in job["parts"]]
    table = pa.concat_tables(several).slice(job["skip"], job["rows"]).combine_chunks()
    data = _data(table)
    messages = table.select(["example_id", "source", "messages", "tools"])
    files = {
        "data": (".parquet", parquet_bytes(data)),
        "jsonl": (".jsonl", exports.json_lines(data.select(_added(table)), table["text"])),
        "messages": (".parquet", parquet_bytes(messages)),
        "chat": (".jsonl", exports.chat_lines(messages)),
        "index": (".parquet", parquet_bytes(_index(table, names))),
    }
    turns = messages["messages"].combine_chunks().flatten()
    stats = {
        "sources": dict(Counter(table["source"].to_pylist())),
        "clusters": dict(Counter(map(str, table["cluster"].drop_null().to_pylist()))),
        "tools": len(table) - table["tools"].null_count,
        "tool_calls": pc.sum(pc.match_substring(turns.field("extra"), '"tool_calls":')).as_py()
        or 0,
        "masked": pc.sum(turns.field("masked")).as_py() or 0,
    }
    return context.write(job["index"], table.num_rows, files, stats)


def _chosen_rows(
    context: PartContext,
    reader: RowReader,
    choice: Choice,
    parts: Descriptors,
    schema: pa.Schema,
) -> pa.Table:
    """The chosen rows of a part: columns of examples, cluster, and score where the rule has one.

    The struct `original` has the columns of all files; those that the row's own file lacks are
    null. `text` is the JSON text of what the row had.
    """
    rows = reader.read(context, parts)
    chosen = choice.chosen(rows)
    keep = rows.eligible.copy()
    keep[keep] = chosen
    part = from_json(Part, parts["examples"])
    table = context.inputs["examples"].read_part(part).filter(pa.array(keep))
    original = original_rows(table, schema).combine_chunks()
    texts = pa.array(original_texts(table), pa.string())
    table = table.select(EXAMPLES_FIXED.names).append_column("original", original.to_struct_array())
    table = table.append_column("text", texts)
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
    added = _added(table)
    kept = original.select([name for name in original.column_names if name != "source"])
    # Fields and not names alone, because their metadata marks the columns of JSON text.
    fields = [*(table.schema.field(name) for name in added), *kept.schema]
    return pa.table([*(table[name] for name in added), *kept.columns], schema=pa.schema(fields))


def _added(table: pa.Table) -> list[str]:
    return [
        name for name in ("example_id", "source", "cluster", "score") if name in table.column_names
    ]


def _index(table: pa.Table, names: dict[int, str]) -> pa.Table:
    """Where each row lies in the raw files: example_id, file, row (from 0), source, cluster."""
    ids = table["example_id"].to_numpy()
    files = pa.array([names[number] for number in (ids >> ID_BITS).tolist()], pa.string())
    rows = pa.array(ids & ((1 << ID_BITS) - 1), pa.int64())
    columns = {"example_id": table["example_id"], "file": files, "row": rows}
    return pa.table(columns | {name: table[name] for name in ("source", "cluster")})
