"""`examples` from raw files: cuts them into parts, checks every row, and writes the columns all later stages read.

The parts are decided here, once: a fixed range of rows of one raw file. All row-wise artifacts have the same parts.
"""

from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.core.lineage import file_numbers, kept_parts, listing
from s2l_ray.core.rawfiles import PartRange, RawFile, original_rows, read_part
from s2l_ray.core.store import Part
from s2l_ray.core.tables import parquet_bytes, schema_from_text, schema_text
from s2l_ray.errors import UserError
from s2l_ray.stages.edge import PartContext, adopt_parts, make_parts
from s2l_ray.stages.work import Outcome, Work

REJECTS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("text", pa.string())]
)


def make(work: Work) -> Outcome:
    """Make all parts and agree on one schema for the original columns.

    Raises:
        UserError: a bad row (unless rejected), no good row at all, or files whose columns cannot be unified.
    """
    jobs = {part.index: part_job(part) for part in work.ranges}
    base = work.manifests.get("base")
    if base is not None:
        kept = kept_parts(base, work.ranges)
        adopt_parts(work, {index: (work.inputs["base"], part) for index, part in kept.items()})
    parts = make_parts(work, jobs, make=_make_part)
    rows = sum(part.rows for part in parts)
    if rows == 0:
        raise UserError(
            "making examples: every row was rejected. Look at the rejects, or name the columns in examples.columns."
        )
    sources: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for part in parts:
        sources.update(part.stats["sources"])
        reasons.update(part.stats["rejects"])
    files = {part.file_number: part.file for part in work.ranges}
    lineage = file_numbers(listing(work.ranges), base, "drop", "")
    info = {
        "sources": dict(sorted(sources.items())),
        "rejects": dict(reasons),
        "files": [
            {"number": number, "name": file.name, "bytes": file.bytes, "sha256": file.sha256}
            for number, file in files.items()
        ],
        "next_file_number": lineage.next_number,
        "new_files": lineage.new if base is not None else [],
        "dropped_files": lineage.dropped,
        "schema": schema_text(_unify(parts, work.ranges)),
    }
    return Outcome(parts, info=info)


def part_job(part: PartRange) -> dict[str, Any]:
    """The descriptor of a part, as a task gets it."""
    return asdict(part)


def _make_part(context: PartContext, job: dict[str, Any]) -> Part:
    part = PartRange(**{**job, "file": RawFile(**job["file"])})
    section = context.config.examples
    read = read_part(part, section.columns, section.on_bad_row)
    files = {"data": (".parquet", parquet_bytes(read.table))}
    if read.rejects:
        files["rejects"] = (".parquet", parquet_bytes(pa.Table.from_pylist(read.rejects, REJECTS)))
    stats = {
        "file": part.file.name,
        "schema": schema_text(original_rows(read.table).schema),
        "sources": dict(Counter(read.table["source"].to_pylist())),
        "rejects": dict(Counter(reject["reason"] for reject in read.rejects)),
        "characters": _characters(read.table),
    }
    return context.write(part.index, read.table.num_rows, files, stats)


def _characters(table: pa.Table) -> int:
    turns = table["messages"].combine_chunks().flatten()
    texts = (turns.field(name) for name in ("content", "input"))
    return sum(pc.sum(pc.utf8_length(text)).as_py() or 0 for text in texts)


def _unify(parts: list[Part], ranges: list[PartRange]) -> pa.Schema:
    """One schema of the original columns for all files; missing columns become nulls, integers may become floats."""
    unified, seen = pa.schema([]), set()
    for part in parts:
        text = part.stats["schema"]
        if text in seen:
            continue
        seen.add(text)
        schema = schema_from_text(text, "examples")
        try:
            unified = pa.unify_schemas([unified, schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UserError(
                f"unifying the columns of all files: those of {ranges[part.index].file.uri} do not fit the files before it "
                f"({error}). Make the field's type the same in all files, or remove the field."
            ) from None
    return unified
