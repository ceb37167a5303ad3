"""A subset that s2l_ray wrote is read as raw rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2l_ray.config import Columns
from s2l_ray.contract.work import Outcome
from s2l_ray.core.data.find import look
from s2l_ray.core.data.original import original_texts
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file, read_part
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from tests.committed import commit
from tests.unit.core.data.raw import GOOD

ADDED = {"example_id": 7, "source": "s", "cluster": 2, "score": 0.5}


def committed(folder: Path, stage: str, row: dict[str, Any]) -> Path:
    artifact = Artifact(Store(str(folder)), stage, "made")
    line = json.dumps(row).encode() + b"\n"
    files = {role: (".jsonl", line) for role in ("data", "jsonl", "chat")}
    commit(artifact, Outcome([artifact.write_part(0, 1, files, "", "", {})]))
    return folder / stage / "made"


def read(folder: Path) -> list[dict[str, Any]]:
    files = look([str(folder)], None).files
    (part,) = part_ranges(files, [index_file(file, 9) for file in files])
    return [json.loads(text) for text in original_texts(read_part(part, Columns()).table)]


def test_a_subset_is_read_by_its_json_lines_and_ids_stay_those_of_the_first_round(
    tmp_path: Path,
) -> None:
    once = committed(tmp_path / "1", "subset", {**ADDED, **GOOD, "n": 2**70, "m": {}})
    expected = {"source": "s", **GOOD, "n": 2**70, "m": {}, "first_example_id": 7}
    assert read(once) == [expected]
    twice = committed(tmp_path / "2", "subset", {**ADDED, "example_id": 0, **expected})
    assert read(twice) == [expected]


def test_other_artifacts_and_parts_of_a_subset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"an artifact of the stage examples, .*no raw rows"):
        read(committed(tmp_path, "examples", GOOD))
    folder = committed(tmp_path, "subset", {**ADDED, **GOOD})
    for file in (folder / "jsonl").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"lists .*jsonl/part-00000.*, which is missing"):
        read(folder)


def test_a_manifest_of_others_is_a_file_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(GOOD) + "\n")
    assert read(tmp_path) == [GOOD]
