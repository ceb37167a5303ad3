"""`examples` from raw files: checks every row, and writes the columns that all later stages read.

A part is a fixed range of rows of one raw file. All artifacts that have rows have the same parts.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.data.columns import column_names
from s2l_ray.core.data.conversations import NOT_GOOD
from s2l_ray.core.data.incremental import file_numbers, kept_parts, listing
from s2l_ray.core.data.original import schema_of
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.data.read import PartRows, read_parts
from s2l_ray.core.data.uses import uses_of
from s2l_ray.core.storage.columns import is_json, unify
from s2l_ray.core.storage.info import ExamplesInfo, NumberedFile
from s2l_ray.core.storage.manifest import Manifest, Part
from s2l_ray.core.storage.parquet import parquet_bytes, schema_from_text, schema_text
from s2l_ray.core.storage.records import from_json, to_json
from s2l_ray.edge.parts import PartContext, adopt_parts, parts_by_tasks
from s2l_ray.errors import UserError

log = logging.getLogger("s2l_ray")
REJECTS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("text", pa.string())]
)

# Rows left out that are named, of each reason.
FIRST = 3


def make(work: Work) -> Outcome:
    """Make all parts and agree on one schema for the original columns.

    Raises:
        UserError: a bad row (unless rejected), or no good row at all.
    """
    jobs = {part.index: to_json(part) for part in work.ranges}
    base = work.manifests.get("base")
    if base is not None:
        kept = kept_parts(base, work.ranges, work.version)
        adopt_parts(work, {index: (work.inputs["base"], part) for index, part in kept.items()})
    tasks = {part.index: part.task for part in work.ranges}
    parts = parts_by_tasks(work, jobs, _make_parts, tasks)
    info = _info(parts, work.ranges, base)
    _tell_rejects(work, parts, info)
    as_text = [field.name for field in schema_from_text(info.schema, "examples") if is_json(field)]
    if as_text:
        log.info(
            "%s: columns whose values have no one type are kept as JSON text: %s "
            "(examples.ignore leaves columns out)",
            work.label,
            ", ".join(as_text),
        )
    return Outcome(parts, info=info)


def _tell_rejects(work: Work, parts: list[Part], info: ExamplesInfo) -> None:
    """Say how many rows were left out, and the first of them.

    Raises:
        UserError: they are more than examples.most_rejects, or all.
    """
    rejected = sum(info.rejects.values())
    if not rejected:
        return
    rows = sum(part.rows for part in parts)
    # Rows that the user had left out are no bad ones.
    bad = rejected - info.rejects.get(NOT_GOOD, 0)
    firsts = [part for part in parts if part.stats["places"]]
    shown = [
        f"{part.stats['file']} row {row}: {reason}"
        for part in firsts
        for row, reason in sorted(
            (row, reason) for reason, places in part.stats["places"].items() for row in places
        )
    ][:FIRST]
    table = f"{work.artifact.uri}/{firsts[0].files['rejects'].name}"
    said = (
        f"{rejected:,} of {rows + rejected:,} rows are left out; the first: {'; '.join(shown)}. "
        f"They are listed by part, as in {table}"
    )
    most = work.config.examples.most_rejects
    if not rows:
        raise UserError(
            f"making examples: {said}; every row was rejected. Look at the rejects, or name the "
            "columns in examples.columns."
        )
    if bad > most * (rows + bad):
        raise UserError(
            f"making examples: {said}. More than examples.most_rejects = {most:g} of the rows are "
            "bad: correct them, or raise examples.most_rejects."
        )
    log.warning("%s: %s", work.label, said)


def _info(parts: list[Part], ranges: list[PartRange], base: Manifest | None) -> ExamplesInfo:
    """What later stages and runs read of the manifest."""
    sources: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    columns: dict[str, list[str]] = {}
    places: dict[str, list[str]] = {}
    for part in parts:
        for name, becomes in part.stats["columns"].items():
            known = columns.setdefault(name, [])
            known += [becomes] if becomes not in known else []
        sources.update(part.stats["sources"])
        reasons.update(part.stats["rejects"])
        for reason, numbers in part.stats["places"].items():
            known = places.setdefault(reason, [])
            known += [f"{part.stats['file']}:{row}" for row in numbers][: FIRST - len(known)]
    files = {part.file_number: part.file for part in ranges}
    lineage = file_numbers(listing(ranges), base, "drop", "")
    schemas = dict.fromkeys(part.stats["schema"] for part in parts)
    return ExamplesInfo(
        sources=dict(sorted(sources.items())),
        rejects=dict(reasons),
        places=places,
        files=[
            NumberedFile(number, file.name, file.bytes, file.sha256)
            for number, file in files.items()
        ],
        next_file_number=lineage.next_number,
        new_files=lineage.new if base is not None else [],
        dropped_files=lineage.dropped,
        schema=schema_text(unify(schema_from_text(text, "examples") for text in schemas)),
        columns=columns,
    )


def _make_parts(context: PartContext, jobs: list[dict[str, Any]]) -> Iterator[Part]:
    """Parts of one file, in order."""
    parts = [from_json(PartRange, job) for job in jobs]
    section = context.config.examples
    for part, read in zip(
        parts,
        read_parts(parts, section.columns, section.on_bad_row, section.ignore),
        strict=True,
    ):
        yield _write(context, part, read)


def _write(context: PartContext, part: PartRange, read: PartRows) -> Part:
    files = {"data": (".parquet", parquet_bytes(read.table))}
    if read.rejects:
        files["rejects"] = (".parquet", parquet_bytes(pa.Table.from_pylist(read.rejects, REJECTS)))
    original = schema_of(read.table)
    given = context.config.examples.columns
    names = column_names(original.names, given, part.file.uri) if original.names else {}
    stats = {
        "file": part.file.name,
        "schema": schema_text(original),
        "columns": dict(uses_of(original.names, names)),
        "sources": dict(Counter(read.table["source"].to_pylist())),
        "rejects": dict(Counter(reject["reason"] for reject in read.rejects)),
        "places": _places(read.rejects),
        "characters": _characters(read.table),
    }
    return context.write(part.index, read.table.num_rows, files, stats)


def _places(rejects: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The first rows of each reason."""
    places: dict[str, list[int]] = {}
    for reject in rejects:
        found = places.setdefault(reject["reason"], [])
        if len(found) < FIRST:
            found.append(reject["row"])
    return places


def _characters(table: pa.Table) -> int:
    turns = table["messages"].combine_chunks().flatten()
    texts = (turns.field(name) for name in ("content", "input"))
    return sum(pc.sum(pc.utf8_length(text)).as_py() or 0 for text in texts)
