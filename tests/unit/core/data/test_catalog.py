"""Raw files are read once, however many sections and runs name them."""

import json
import tracemalloc
from pathlib import Path

import pytest

from s2l_ray.config import Examples
from s2l_ray.core.data import catalog
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError

LINE = '{"instruction": "a", "output": "b"}\n'


def section(folder: Path, rows_per_part: int = 2) -> Examples:
    return Examples(files=[str(folder)], rows_per_part=rows_per_part)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "raw"
    made.mkdir()
    (made / "a.jsonl").write_text(LINE * 3)
    (made / "b.jsonl").write_text(LINE)
    return made


def test_a_file_is_read_once_for_all_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "storage"))
    first = RawFiles(store, assume=False).ranges(section(folder), "examples")
    monkeypatch.setattr(catalog, "index_file", lambda *_: pytest.fail("read again"))
    assert RawFiles(store, assume=False).ranges(section(folder), "examples") == first
    assert [(part.file.name, part.rows) for part in first] == [
        ("a.jsonl", 2),
        ("a.jsonl", 1),
        ("b.jsonl", 1),
    ]


def test_first_rows_are_held_of_few_files_at_once(tmp_path: Path) -> None:
    many, long = 200, json.dumps({"instruction": "x" * 60_000, "output": "y"})
    (tmp_path / "raw").mkdir()
    for number in range(many):
        (tmp_path / "raw" / f"{number}.jsonl").write_text(long + "\n")
    raw = RawFiles(Store(str(tmp_path / "storage")), assume=False)
    tracemalloc.start()
    try:
        assert len(raw.ranges(section(tmp_path / "raw"), "examples")) == many
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Of all files they are twelve megabytes.
    assert peak < many * len(long) * 0.8


def test_a_damaged_index_is_made_again(folder: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "storage"))
    first = RawFiles(store, assume=False).ranges(section(folder), "examples")
    for name in store.list("index"):
        store.write(f"index/{name}", b'{"kind": "lines"}')
    assert RawFiles(store, assume=False).ranges(section(folder), "examples") == first


def test_files_are_identified_by_name_and_content_not_by_place(
    folder: Path, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "storage"))
    raw = RawFiles(store, assume=False)
    here = raw.identity(raw.ranges(section(folder), "examples"))
    other = folder.rename(tmp_path / "other")
    again = RawFiles(store, assume=False)
    assert again.identity(again.ranges(section(other), "examples")) == here
    assert [entry[:3] for entry in here] == [
        [0, "a.jsonl", 3 * len(LINE)],
        [1, "b.jsonl", len(LINE)],
    ]


def test_text_is_counted_once_a_file(folder: Path, tmp_path: Path) -> None:
    raw = RawFiles(Store(str(tmp_path / "storage")), assume=False)
    assert raw.text_bytes(raw.ranges(section(folder), "examples")) == 4 * len(LINE)


def test_files_without_rows_are_passed_over_unless_all_are(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "0.csv").write_text("instruction,output\n")
    (folder / "c.json").write_text("[]")
    (folder / "notes.txt").write_text("x")
    raw = RawFiles(Store(str(tmp_path / "storage")), assume=False)
    with caplog.at_level("INFO", "s2l_ray"):
        ranges = raw.ranges(section(folder), "examples")
    assert [(part.file_number, part.file.name) for part in ranges] == [
        (0, "a.jsonl"),
        (0, "a.jsonl"),
        (1, "b.jsonl"),
    ]
    assert "4 files are read, 1 passed over" in caplog.text
    assert "notes.txt (no kind of file that is read)" in caplog.text
    assert f"{folder / '0.csv'} has no rows" in caplog.text
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").unlink()
    with pytest.raises(UserError, match=r"0.csv: it has no rows. Remove it"):
        raw.ranges(section(folder, 3), "examples")


def test_files_that_are_missing_have_no_parts_only_where_that_is_assumed(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "storage"))
    missing = section(tmp_path / "nowhere")
    assert RawFiles(store, assume=True).ranges(missing, "examples") == []
    with pytest.raises(UserError, match="matches no file"):
        RawFiles(store, assume=False).ranges(missing, "examples")
