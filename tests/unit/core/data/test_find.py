"""Files that paths, folders and globs name."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from s2l_ray.config import Columns
from s2l_ray.core.data.find import find_files, look
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file, read_part
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.store import Store, filesystem, join_uri
from s2l_ray.errors import UserError
from tests.unit.core.data.raw import GOOD, lines


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "raw/a.jsonl", "raw/b.ndjson", "raw/deep/c.jsonl", "raw/deep/er/d.jsonl",
        "raw/[x] #1%.jsonl", "raw/.hidden.jsonl", "raw/.cache/e.jsonl", "raw/notes.txt",
        "raw/f.text", "other/g.jsonl",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines(tmp_path / name, GOOD)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["raw"], ["[x] #1%.jsonl", "a.jsonl", "b.ndjson", "deep/c.jsonl", "deep/er/d.jsonl"]),
        (["raw/"], ["[x] #1%.jsonl", "a.jsonl", "b.ndjson", "deep/c.jsonl", "deep/er/d.jsonl"]),
        (["raw/*.jsonl"], ["[x] #1%.jsonl", "a.jsonl"]),
        (["raw/?.*"], ["a.jsonl", "b.ndjson"]),
        (["raw/**/*.jsonl"], ["[x] #1%.jsonl", "a.jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]),
        (["raw/**/d.jsonl"], ["d.jsonl"]),
        (["raw/*/*.jsonl"], ["c.jsonl"]),
        (["raw/d*/**"], ["c.jsonl", "er/d.jsonl"]),
        (["raw/[ab].*"], ["a.jsonl", "b.ndjson"]),
        (["raw/[x] #1%.jsonl"], ["[x] #1%.jsonl"]),
        (["raw/.hidden.jsonl"], [".hidden.jsonl"]),
        (
            ["raw/a.jsonl", "raw", "raw/*.jsonl"],
            ["[x] #1%.jsonl", "a.jsonl", "b.ndjson", "deep/c.jsonl", "deep/er/d.jsonl"],
        ),
        (["raw/deep", "other"], ["other/g.jsonl", "raw/deep/c.jsonl", "raw/deep/er/d.jsonl"]),
    ],
)
def test_files_folders_and_globs(tree: Path, patterns: list[str], names: list[str]) -> None:
    for prefix in (str(tree), f"file://{tree}"):
        if prefix.startswith("file") and any(mark in "".join(patterns) for mark in "?#"):
            # In a URI these have another meaning.
            continue
        found = find_files([f"{prefix}/{pattern}" for pattern in patterns], None)
        assert [file.name for file in found] == names
        for file in found:
            remote, path = filesystem(file.uri)
            assert remote.get_file_info(path).size == file.bytes == len(json.dumps(GOOD)) + 1


def test_names_are_relative_to_the_root(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    for root in (str(tree), f"{tree}/", ".", "~", "raw/.."):
        assert [file.name for file in find_files(["raw/deep", "~/other"], root)] == [
            "other/g.jsonl",
            "raw/deep/c.jsonl",
            "raw/deep/er/d.jsonl",
        ]
    with pytest.raises(
        UserError, match=r"is not below examples.root = .*raw. Correct one of the two"
    ):
        find_files(["raw", "other"], str(tree / "raw"))
    with pytest.raises(UserError, match="is not below"):
        find_files(["raw"], str(tree / "ra"))


@pytest.mark.parametrize(
    "pattern", ["absent", "absent/*.jsonl", "raw/*.parquet", "raw/q*", "*.jsonl/x"]
)
def test_a_pattern_that_matches_nothing_is_named(tree: Path, pattern: str) -> None:
    with pytest.raises(UserError) as error:
        find_files([str(tree / "raw"), str(tree / pattern)], None, "evaluation")
    assert (
        f"looking for evaluation.files: {tree / pattern} matches no file that can be read (.jsonl, "
        in str(error.value)
    )


def test_unfit_files_are_named(tree: Path) -> None:
    with pytest.raises(UserError, match=r"f.text is none of .jsonl, .jsonlines.* Convert it"):
        find_files([str(tree / "raw/f.text")], None)
    (tree / "empty.jsonl").touch()
    for pattern in ("empty.jsonl", "*.jsonl"):
        with pytest.raises(UserError, match=r"empty.jsonl is empty. Remove it"):
            find_files([str(tree / pattern)], None)
    with pytest.raises(UserError, match=r"are both a.jsonl below the root"):
        find_files([f"{tree}/raw/a.jsonl", f"file://{tree}/raw/a.jsonl"], str(tree / "raw"))


def passed_over(*patterns: Path) -> dict[str, str]:
    found = look([str(pattern) for pattern in patterns], None)
    return {uri.rpartition("/")[2]: why for uri, why in found.passed_over.items()}


def test_what_a_folder_or_glob_passes_over_is_listed(tree: Path) -> None:
    (tree / "raw/empty.csv").touch()
    lines(tree / "raw/dataset_info.json", {"mine": {"file_name": "a.jsonl"}})
    assert passed_over(tree / "raw") == {
        ".hidden.jsonl": "hidden",
        "dataset_info.json": "a list of data sets for a trainer",
        "empty.csv": "empty",
        "f.text": "no kind of file that is read",
        "notes.txt": "no kind of file that is read",
    }
    assert passed_over(tree / "raw/a.*") == {}
    assert passed_over(tree / "raw/?.*") == {"f.text": "no kind of file that is read"}
    assert [file.name for file in find_files([str(tree / "raw/.hidden.jsonl")], None)]


def test_a_link_is_followed_once(tree: Path) -> None:
    (tree / "raw/again").symlink_to(".")
    (tree / "raw/deep/up").symlink_to("..")
    (tree / "raw/0.jsonl").symlink_to("a.jsonl")
    (tree / "raw/more").symlink_to(tree / "other")
    (tree / "raw/gone.jsonl").symlink_to("nothing")
    os.mkfifo(tree / "raw/pipe.jsonl")
    found = look([str(tree / "raw")], None)
    assert [file.name for file in found.files] == [
        "[x] #1%.jsonl", "a.jsonl", "b.ndjson", "deep/c.jsonl", "deep/er/d.jsonl", "more/g.jsonl",
    ]  # fmt: skip
    why = passed_over(tree / "raw")
    assert why["again"] == f"a link to {tree}/raw, which is read already"
    assert why["0.jsonl"] == f"a link to {tree}/raw/a.jsonl, which is read already"
    assert why["up"].startswith("a link to")
    assert why["gone.jsonl"] == why["pipe.jsonl"] == "a dangling link, or no regular file"
    link = tree / "elsewhere"
    link.symlink_to(tree / "other")
    assert [file.name for file in find_files([str(link)], None)] == ["g.jsonl"]


def test_a_name_that_is_not_utf8_is_refused(tree: Path) -> None:
    os.close(os.open(os.fsencode(tree) + b"/raw/caf\xe9.jsonl", os.O_CREAT))
    for pattern in (str(tree / "raw"), os.fsdecode(os.fsencode(tree) + b"/raw/caf\xe9.jsonl")):
        with pytest.raises(UserError, match=r"caf\\xe9.jsonl' is no name in UTF-8. Rename"):
            find_files([pattern], None)


def test_raw_files_on_s3_are_found_and_read(s3_bucket: str, tmp_path: Path) -> None:
    store = Store(join_uri(s3_bucket, f"raw {tmp_path.name}"))
    row = {**GOOD, "source": "s"}
    for name in ("a.jsonl", "deep/b c.jsonl", "deep/x#1%.jsonl", ".hidden/d.jsonl"):
        store.write(name, (json.dumps(row) + "\n").encode() * 3)
    store.write(
        "t.parquet", parquet_bytes(pa.table({"prompt": ["q"] * 3, "completion": ["a"] * 3}))
    )
    expected = ["a.jsonl", "deep/b c.jsonl", "deep/x#1%.jsonl", "t.parquet"]
    for pattern, root in (
        (store.uri, None),
        (store.uri, store.uri),
        (join_uri(store.uri, "**/*"), store.uri),
    ):
        files = find_files([pattern], root)
        assert [file.name for file in files] == expected
        parts = part_ranges(files, [index_file(file, 2) for file in files])
        made = [read_part(part, Columns()) for part in parts]
        assert [part.table.num_rows for part in made] == [2, 1] * 4
    with pytest.raises(UserError, match="matches no"):
        find_files([join_uri(store.uri, "absent")], None)
