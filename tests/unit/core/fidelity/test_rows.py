"""The rows that a check draws."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2l_ray.config import Examples
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file
from s2l_ray.core.fidelity import rows
from s2l_ray.core.hashing import CHECKED, keyed_hash
from tests import tiny


def parts(folder: Path, files: int, rows_per_part: int) -> Any:
    for number in range(files):
        tiny.write_jsonl(folder / f"{number:02}.jsonl", tiny.rows(10, seed=number))
    found = find_files([str(folder)], None)
    return part_ranges(found, [index_file(file, rows_per_part) for file in found])


def test_rows_are_drawn_by_the_hash_of_their_ids(tmp_path: Path) -> None:
    ranges = parts(tmp_path, 3, 4)
    drawn = rows.draw(ranges, Examples(files=[]), 7, seed=5).table
    everyone = np.concatenate([(number << 40) + np.arange(10) for number in range(3)])
    expected = sorted(everyone[np.argsort(keyed_hash(CHECKED, 5, everyone))[:7]].tolist())
    assert drawn["example_id"].to_pylist() == expected
    assert drawn.column_names == ["example_id", "source", "messages", "tools"]
    assert rows.draw(ranges, Examples(files=[]), 100, seed=5).table.num_rows == 30
    other = rows.draw(ranges, Examples(files=[]), 7, seed=6).table["example_id"].to_pylist()
    assert other != expected


def test_few_parts_of_many_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = parts(tmp_path, 20, 10)
    read: list[int] = []
    original = rows.read_part
    monkeypatch.setattr(
        rows, "read_part", lambda part, *rest: read.append(part.index) or original(part, *rest)
    )
    drawn = rows.draw(ranges, Examples(files=[]), 30, seed=0).table
    assert len(read) == len(set(read)) == rows.PARTS_READ
    assert len({example_id >> 40 for example_id in drawn["example_id"].to_pylist()}) > 8


def test_rejected_rows_are_counted(tmp_path: Path) -> None:
    good = [json.dumps(row) for row in tiny.rows(6)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, "[1]", "[2]"]) + "\n")
    files = find_files([str(tmp_path)], None)
    ranges = part_ranges(files, [index_file(file, 64) for file in files])
    drawn = rows.draw(ranges, Examples(files=[], on_bad_row="reject"), 20, seed=0)
    assert drawn.table.num_rows == 6
    assert list(drawn.rejects.values()) == [2]
