"""A storage with a few rows of a finished run, made without Ray."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from s2l_ray.contract.work import Outcome
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import ExamplesInfo, TrajectoriesInfo
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.schemas import trajectories_schema
from s2l_ray.core.storage.store import Store
from tests.committed import commit, info_with

# Two parts of trajectories; the row with id 2 could not be scored.
LOSSES = {0: [3.0, 2.0], 1: [4.0, 1.0], 2: None, 3: [5.0, 0.5]}


def part(artifact: Artifact, index: int, **tables: pa.Table) -> Part:
    files = {role: (".parquet", parquet_bytes(table)) for role, table in tables.items()}
    return artifact.write_part(index, tables["data"].num_rows, files, "", "", {})


def trajectories(ids: list[int]) -> pa.Table:
    rows = [
        {"example_id": i, "source": "s", "num_tokens": 2, "losses": LOSSES[i], "reason": None}
        for i in ids
    ]
    return pa.Table.from_pylist(rows, trajectories_schema(2))


def subset(store: Store, fingerprint: str, ids: list[int], **fields: Any) -> Artifact:
    artifact = Artifact(store, "subset", fingerprint)
    parts = [part(artifact, 0, data=pa.table({"example_id": ids}))]
    commit(artifact, Outcome(parts=parts), **fields)
    return artifact


def write_record(store: Store, name: str, variants: dict[str, list[Artifact]]) -> None:
    """What the pipeline leaves of a finished run, as far as it is read."""
    entries = {
        variant: {
            each.stage: {"uri": each.uri, "fingerprint": each.fingerprint} for each in artifacts
        }
        for variant, artifacts in variants.items()
    }
    record = {"name": name, "artifacts": next(iter(entries.values())), "variants": entries}
    store.write(f"runs/{name}/run.json", json.dumps(record).encode())


def tiny_storage(folder: Path) -> Store:
    """Examples, trajectories, and the subsets of two variants of the run `demo`."""
    store = Store(str(folder))
    examples = Artifact(store, "examples", "e" * 24)
    rows = pa.table({"example_id": [0, 1], "text": ["a", "b"]})
    rejects = pa.table({"row": [7], "reason": ["empty"]})
    parts = [part(examples, 0, data=rows, rejects=rejects), part(examples, 1, data=rows)]
    info = info_with(ExamplesInfo, rejects={"empty": 1})
    commit(examples, Outcome(parts=parts, info=info))
    found = Artifact(store, "trajectories", "a1" + "0" * 22)
    parts = [
        part(found, index, data=trajectories(ids)) for index, ids in enumerate([[0, 1], [2, 3]])
    ]
    scored = info_with(TrajectoriesInfo, steps=[[0, 0], [0, 10]], scored=3)
    commit(found, Outcome(parts=parts, info=scored), made_at="2026-01-02T00:00:00+00:00")
    chosen = subset(store, "b1" + "0" * 22, [1])
    at_random = subset(store, "b2" + "0" * 22, [0])
    variants = {"s2l": [examples, found, chosen], "random": [examples, found, at_random]}
    write_record(store, "demo", variants)
    return store
