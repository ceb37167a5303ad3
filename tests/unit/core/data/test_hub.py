"""Data sets of the `datasets` library: folders that save_to_disk wrote, and what the storage
holds of one from the Hub."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from s2l_ray import config, pipeline
from s2l_ray.config import Columns
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.hub import store_dataset, stored_dataset
from s2l_ray.core.data.original import original_rows
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file, read_part
from s2l_ray.core.storage.manifest import fingerprint
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from tests import tiny

datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
ROWS = [
    {"id": n, "prompt": f"q{n}", "completion": f"a{n}", "tags": ["x"] * (n % 3)} for n in range(50)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def saved(folder: Path, rows: list[dict[str, Any]] = ROWS, shards: int = 2) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder, num_shards=shards)
    return folder


def rows_of(files: list[str], split: str = "train") -> tuple[list[dict[str, Any]], set[str]]:
    found, sources = [], set()
    listed = find_files(files, None, "examples", split)
    for part in part_ranges(listed, [index_file(file, 7) for file in listed]):
        table = read_part(part, Columns()).table
        found += original_rows(table).to_pylist()
        sources |= set(table["source"].to_pylist())
    return found, sources


def test_a_saved_folder_is_read_as_it_lies_there(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mine")
    # Leaves a cache file in the folder.
    datasets.load_from_disk(folder).map(lambda row: {"more": 1})
    assert rows_of([str(folder)]) == (ROWS, {"mine"})


def test_a_split_of_a_saved_folder_is_read(tmp_path: Path) -> None:
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:5]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert rows_of([str(tmp_path / "both")]) == (ROWS, {"both"})
    assert rows_of([str(tmp_path / "both")], "test")[0] == ROWS[:5]
    assert rows_of([str(tmp_path / "both" / "test")])[0] == ROWS[:5]


def test_rows_that_a_filter_left_are_read(tmp_path: Path) -> None:
    chosen = datasets.Dataset.from_list(ROWS).select([3, 1, 40])
    chosen.save_to_disk(tmp_path / "chosen")
    assert rows_of([str(tmp_path / "chosen")])[0] == [ROWS[3], ROWS[1], ROWS[40]]


def test_a_data_set_is_written_into_the_storage_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of files stands for the Hub: `load_dataset` takes either."""
    tiny.write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    store, name = Store(str(tmp_path / "storage")), str(tmp_path / "hub")
    monkeypatch.setattr("s2l_ray.core.data.hub.ROWS_PER_FILE", 20)
    assert stored_dataset(store, name, None, "train") is None
    files = store_dataset(store, name, None, "train")
    assert [Path(file).name for file in files] == [f"part-{n:05d}.parquet" for n in range(3)]
    assert rows_of(files)[0] == ROWS
    assert stored_dataset(store, name, None, "train") == files
    assert stored_dataset(store, name, None, "test") is None


@pytest.mark.parametrize("files", ['["../../a.parquet"]', "[3]", "7", '["/etc/passwd"]'])
def test_a_record_names_nothing_outside_its_folder(tmp_path: Path, files: str) -> None:
    store = Store(str(tmp_path / "storage"))
    folder = f"datasets/{fingerprint(['org/name', None, 'train'])}"
    store.write(f"{folder}/dataset.json", f'{{"files": {files}}}'.encode())
    with pytest.raises(UserError, match=r"dataset.json: .*by plain names. Remove the folder"):
        stored_dataset(store, "org/name", None, "train")


def test_a_folder_without_its_record_does_not_count(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    store, name = Store(str(tmp_path / "storage")), str(tmp_path / "hub")
    files = store_dataset(store, name, None, "train")
    (Path(files[0]).parent / "dataset.json").unlink()
    assert stored_dataset(store, name, None, "train") is None


def planned(folder: Path, **examples: Any) -> pipeline.Node:
    job = tiny.job(folder, evaluation=None)
    job["examples"] = {"rows_per_part": 16, **examples}
    job["subset"]["budget"] = 20
    return pipeline.plan(config.load(None, [], job), until="examples").nodes[0]


def test_the_plan_takes_a_data_set_by_name_or_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mine")
    node = planned(tmp_path, dataset=str(folder))
    assert sum(part.rows for part in node.ranges) == 50
    assert {part.file.source for part in node.ranges} == {"mine"}
    as_file = planned(tmp_path, files=str(folder))
    assert node.artifact.fingerprint == as_file.artifact.fingerprint
    # What the storage holds of a name needs no network.
    tiny.write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    store = Store(str(tmp_path / "storage"))
    held = store_dataset(store, str(tmp_path / "hub"), None, "train")
    key = fingerprint(["org/name@v1", None, "train"])
    Path(held[0]).parent.rename(tmp_path / "storage" / "datasets" / key)
    by_name = planned(tmp_path, dataset="org/name@v1")
    assert {part.file.source for part in by_name.ranges} == {"org/name"}
    assert sum(part.rows for part in by_name.ranges) == 50


def test_pictures_are_refused_with_their_column(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "completion": datasets.Value("string"),
            "picture": {"of": datasets.Image()},
        }
    )
    rows = {"prompt": ["q"] * 20, "completion": ["a"] * 20, "picture": [{"of": None}] * 20}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "seen")
    with pytest.raises(
        UserError,
        match=r"field 'picture': expected text.* got the feature Image. Leave .*ignore",
    ):
        planned(tmp_path, dataset=str(tmp_path / "seen"))
    node = planned(tmp_path, dataset=str(tmp_path / "seen"), ignore=["picture"])
    assert sum(part.rows for part in node.ranges) == 20
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        tmp_path / "hub" / "train.parquet"
    )
    with pytest.raises(UserError, match=r"hub, field 'picture': expected text"):
        store_dataset(Store(str(tmp_path / "storage")), str(tmp_path / "hub"), None, "train")
    where = (Store(str(tmp_path / "storage")), str(tmp_path / "hub"), None, "train")
    assert stored_dataset(*where) is None
    files = store_dataset(*where, ["picture"])
    assert rows_of(files)[0] == [{"prompt": "q", "completion": "a"}] * 20
    assert stored_dataset(*where, ["picture"]) == files
    assert stored_dataset(*where) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder: (folder / "state.json").write_text("{"),
            r"state.json: it is not JSON .*Save the data set again",
        ),
        (
            lambda folder: (folder / "state.json").write_text(
                '{"_data_files": [{"filename": "../other/data.arrow"}]}'
            ),
            r"state.json does not list the data set's files by plain names",
        ),
        (
            lambda folder: (folder / "state.json").write_text("{}"),
            r"state.json does not list the data set's files",
        ),
        (
            lambda folder: (folder / "data-00001-of-00002.arrow").unlink(),
            r"lists .*data-00001-of-00002.arrow, which is missing",
        ),
        (
            lambda folder: (folder / "data-00001-of-00002.arrow").write_bytes(b"x" * 99),
            r"data-00001-of-00002.arrow: expected a whole Arrow file or stream",
        ),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, change: Any, said: str) -> None:
    folder = saved(tmp_path / "mine")
    change(folder)
    with pytest.raises(UserError, match=said):
        rows_of([str(folder)])


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "both")
    with pytest.raises(
        UserError,
        match=r"expected a split 'train', but the data set has \['test'\]. Set examples.split",
    ):
        rows_of([str(tmp_path / "both")])
    tiny.write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    with pytest.raises(
        UserError, match=r"loading the data set .*split other.*Correct examples.dataset"
    ):
        store_dataset(Store(str(tmp_path / "storage")), str(tmp_path / "hub"), None, "other")


def test_a_hub_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"loading the data set nobody/nothing@v1 .*save_to_disk"
    ) as error:
        planned(tmp_path, dataset="nobody/nothing@v1")
    assert not re.search(r"Traceback|\n", str(error.value))
    assert not (tmp_path / "storage" / "datasets").exists()


def test_the_record_says_what_was_loaded(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    files = store_dataset(Store(str(tmp_path / "storage")), str(tmp_path / "hub"), None, "train")
    record = json.loads((Path(files[0]).parent / "dataset.json").read_text())
    assert (record["split"], record["rows"], record["files"]) == (
        "train",
        50,
        ["part-00000.parquet"],
    )
