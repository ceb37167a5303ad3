"""Artifacts in a local folder and on S3: commits, lookups, and damage that is noticed."""

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import FORMAT, FileEntry, Manifest, Part, fingerprint
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.store import Store, filesystem, join_uri
from s2l_ray.errors import UserError, without_credentials

TABLE = pa.table({"example_id": pa.array([1, 2, 3]), "text": ["a", "b", None]})


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "a storage"))
    return Store(join_uri(request.getfixturevalue("s3_bucket"), f"deep/{tmp_path.name}"))


def manifest_of(
    artifact: Artifact, parts: list[Part], files: list[FileEntry] | None = None
) -> Manifest:
    return Manifest(
        format=FORMAT,
        stage=artifact.stage,
        fingerprint=artifact.fingerprint,
        inputs={"examples": "e" * 24},
        section={"k": 5, "nested": {"a": [1, 2.5, None]}},
        parts=parts,
        files=files or [],
        info={"sources": {"ä": 3}},
        seconds=1.25,
        run="run-1",
        made_at="2030-01-01T00:00:00+00:00",
        scaling={"shards": 2},
        versions={"numpy": "2"},
    )


def test_a_manifest_refuses_what_is_not_json() -> None:
    artifact = Artifact(Store("/nowhere"), "examples", "e")
    for value in (types.SimpleNamespace(rows=1), float("nan"), {1, 2}):
        made = dataclasses.replace(manifest_of(artifact, []), info={"wrong": value})
        with pytest.raises((TypeError, ValueError)):
            made.to_bytes()


def artifact_in(store: Store) -> Artifact:
    return Artifact(store, "clusters", "f" * 24)


def write_part(artifact: Artifact, index: int = 0, table: pa.Table = TABLE) -> Part:
    files = {
        "data": (".parquet", parquet_bytes(table)),
        "rejects": (".parquet", parquet_bytes(table.slice(0, 1))),
    }
    return artifact.write_part(
        index, table.num_rows, files, "node-1", "run-1", {"sources": {"a": 3}}
    )


def test_files_are_written_read_listed_and_deleted(store: Store) -> None:
    assert not store.exists("a/b.bin")
    assert store.list("") == {}
    store.delete("a")
    for name in ("a/b.bin", "a/c/d.bin", "top.bin"):
        store.write(name, name.encode())
    store.write("a/b.bin", b"again")
    assert store.read("a/b.bin") == b"again"
    assert store.exists("a/b.bin")
    assert store.exists("a")
    assert store.list("a") == {"b.bin": 5, "c/d.bin": 9}
    assert store.list("") == {"a/b.bin": 5, "a/c/d.bin": 9, "top.bin": 7}
    store.delete("a/c")
    assert store.list("a") == {"b.bin": 5}
    with pytest.raises(FileNotFoundError):
        store.read("a/c/d.bin")


def test_links_of_a_folder_are_those_that_were_asked_for(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "storage"))
    for name in ("subset/a/data", "subset/b/data", "runs/demo/run.json"):
        store.write(name, name.encode())
    store.link("runs/demo", {"subset": "subset/a", "gone": "subset/b"})
    store.link("runs/demo", {"subset": "subset/b", "target": "target/not yet"})
    folder = tmp_path / "storage" / "runs" / "demo"
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "subset", "target"]
    (tmp_path / "storage").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "runs" / "demo"
    assert (moved / "subset" / "data").read_bytes() == b"subset/b/data"


def test_an_object_store_has_no_links(s3_bucket: str) -> None:
    store = Store(join_uri(s3_bucket, "links"))
    store.link("runs/demo", {"subset": "subset/a"})
    assert store.list("runs") == {}


def test_a_store_travels_as_its_uri(store: Store) -> None:
    store.write("x", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.uri, copy.root, copy.read("x")) == (store.uri, store.root, b"1")


def test_an_artifact_is_there_once_its_manifest_is(store: Store) -> None:
    artifact = artifact_in(store)
    assert artifact.committed() is None
    with pytest.raises(UserError, match=r"there is no manifest.json, so nothing there counts"):
        artifact.manifest()
    parts = [write_part(artifact, 1), write_part(artifact, 0, TABLE.slice(1))]
    extra = artifact.write_named("tokenizer.json", b"{}")
    assert artifact.committed() is None
    assert sorted(artifact.finished_parts()) == [0, 1]
    artifact.write("state/step-1/x", b"scratch")
    artifact.write("rounds/1", b"scratch")

    made = manifest_of(artifact, parts, [extra])
    artifact.commit(made)

    read = artifact.committed()
    assert read == made == artifact.manifest()
    assert read.rows == 5
    assert (read.parts_made_by("run-1"), read.parts_made_by("run-2")) == (2, 0)
    assert artifact.read_part(read.parts[0]) == TABLE
    assert artifact.read_part(read.parts[0], ["text"]) == TABLE.select(["text"])
    assert artifact.read_part(read.parts[0], role="rejects") == TABLE.slice(0, 1)
    assert artifact.read_file(extra) == b"{}"
    left = set(store.list(artifact.path))
    assert left == {"manifest.json", "tokenizer.json"} | {
        e.name for p in parts for e in p.files.values()
    }
    assert store.list(artifact.path)["tokenizer.json"] == 2


def test_its_uri_opens_it_again(store: Store) -> None:
    artifact = artifact_in(store)
    artifact.commit(manifest_of(artifact, [write_part(artifact)]))
    assert Store(artifact.uri).read("manifest.json") == artifact.read("manifest.json")
    found, path = filesystem(artifact.uri_of("manifest.json"))
    assert found.get_file_info(path).size == len(artifact.read("manifest.json"))


def test_a_missing_or_short_file_stops_the_commit(store: Store) -> None:
    artifact = artifact_in(store)
    parts = [write_part(artifact, 0), write_part(artifact, 1)]
    name = parts[1].files["rejects"].name
    whole = artifact.read(name)
    artifact.write(name, whole[:-1])
    with pytest.raises(UserError, match=f"1 are missing or have another size, {name} first"):
        artifact.commit(manifest_of(artifact, parts))
    absent = FileEntry("model.safetensors", 5, "0" * 64)
    artifact.write(name, whole)
    with pytest.raises(
        UserError,
        match=r"5 data files, but 1 are missing .* model.safetensors first.* "
        r"same storage on every node",
    ):
        artifact.commit(manifest_of(artifact, parts, [absent]))
    assert artifact.committed() is None
    assert sorted(artifact.finished_parts()) == [0, 1]
    artifact.commit(manifest_of(artifact, parts))
    assert artifact.committed() is not None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda data: data[:-7],
            r"expected \d+ bytes, got \d+\. Restore the file, or remove .* and run again",
        ),
        (lambda data: data + b"\n", r"expected \d+ bytes, got \d+"),
        (lambda data: b"", r"expected \d+ bytes, got 0"),
        (
            lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
            r"the content changed\. Restore the file, or remove",
        ),
    ],
)
def test_a_damaged_data_file_is_named_when_it_is_read(store: Store, damage: Any, said: str) -> None:
    artifact = artifact_in(store)
    part = write_part(artifact)
    name = part.files["data"].name
    artifact.write(name, damage(artifact.read(name)))
    with pytest.raises(UserError, match=said) as error:
        artifact.read_part(part)
    assert without_credentials(artifact.uri_of(name)) in str(error.value)


def test_a_data_file_that_is_gone_is_named_when_it_is_read(store: Store) -> None:
    artifact = artifact_in(store)
    part = write_part(artifact)
    store.fs.delete_file(f"{store.root}/{artifact.path}/{part.files['data'].name}")
    with pytest.raises(
        UserError, match=r"the manifest lists it, but it is missing\. Restore the file"
    ):
        artifact.read_part(part)


def test_a_receipt_counts_only_with_all_its_files(store: Store) -> None:
    artifact = artifact_in(store)
    parts = [write_part(artifact, index, TABLE.slice(index)) for index in range(3)]
    assert artifact.finished_parts() == dict(enumerate(parts))
    store.fs.delete_file(f"{store.root}/{artifact.path}/{parts[0].files['rejects'].name}")
    artifact.write(parts[2].files["data"].name, b"short")
    assert artifact.finished_parts() == {1: parts[1]}


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"3", b'{"index": 0}', b'{"index": 0, "rows": 1, "files": 3}']
)
def test_a_damaged_receipt_means_the_part_is_made_again(tmp_path: Path, damage: bytes) -> None:
    artifact = artifact_in(Store(str(tmp_path)))
    parts = [write_part(artifact, 0), write_part(artifact, 1, TABLE.slice(1))]
    artifact.write("receipts/part-00000.json", damage)
    assert artifact.finished_parts() == {1: parts[1]}


def test_data_files_carry_their_content_in_their_names(store: Store) -> None:
    artifact = artifact_in(store)
    one, same, other = (write_part(artifact, 3, t) for t in (TABLE, TABLE, TABLE.slice(1)))
    data = artifact.read(one.files["data"].name)
    digest = hashlib.sha256(data).hexdigest()
    assert one == same
    assert one.files["data"] == FileEntry(
        f"data/part-00003-{digest[:16]}.parquet", len(data), digest
    )
    assert other.files["data"].name != one.files["data"].name
    assert artifact.read_part(one) == TABLE


def test_a_write_that_fails_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write("folder/x", b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        for name in ("folder/x", "folder/new"):
            with pytest.raises(OSError, match="No space left"):
                store.write(name, b"half of something long")
    assert store.read("folder/x") == b"old"
    assert store.list("") == {"folder/x": 3}
    assert os.listdir(tmp_path / "folder") == ["x"]


def test_a_reader_never_sees_a_file_that_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, replace = Store(str(tmp_path)), os.replace
    seen = []

    def look_then_replace(source: str, target: str) -> None:
        seen.append((Path(source).read_bytes(), store.exists("folder/x"), store.list("")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_then_replace)
    store.write("folder/x", b"whole")
    assert seen == [(b"whole", False, {})]
    assert store.read("folder/x") == b"whole"


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    artifact = artifact_in(Store(str(tmp_path)))
    code = (
        "import os, signal, sys\n"
        "from s2l_ray.core.storage.artifact import Artifact\n"
        "from s2l_ray.core.storage.store import Store\n"
        "artifact = Artifact(Store(sys.argv[1]), 'clusters', 'f' * 24)\n"
        "artifact.write_part(0, 1, {'data': ('.bin', b'done')}, 'n', 'r', {})\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "artifact.write_part(1, 1, {'data': ('.bin', b'never done')}, 'n', 'r', {})\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    on_disk = [path.name for path in (tmp_path / artifact.path).rglob("*")]
    assert any(name.endswith(".tmp") for name in on_disk)
    assert sorted(artifact.finished_parts()) == [0]
    assert not any(name.endswith(".tmp") for name in artifact.store.list(""))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"parts": [], "files": []}',
        b'{"parts": 3, "files": []}',
        b"\xff",
        b"null",
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, damage: bytes) -> None:
    artifact = artifact_in(Store(str(tmp_path)))
    artifact.write("manifest.json", damage)
    with pytest.raises(
        UserError, match=r"manifest.json: not a manifest of this version .* Remove the folder"
    ):
        artifact.committed()


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    artifact = artifact_in(Store(str(tmp_path)))
    artifact.write(
        "manifest.json", dataclasses.replace(manifest_of(artifact, []), format=99).to_bytes()
    )
    with pytest.raises(UserError, match="expected format 1, got 99"):
        artifact.committed()


def test_a_manifest_holds_no_number_that_is_none(tmp_path: Path) -> None:
    artifact = artifact_in(Store(str(tmp_path)))
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifact.commit(dataclasses.replace(manifest_of(artifact, []), info={"loss": float("nan")}))
    assert artifact.committed() is None


def test_equal_values_have_equal_fingerprints() -> None:
    value = {"b": [1, {"y": None, "x": 2.5}], "a": "ä"}
    reordered = {"a": "ä", "b": [1, {"x": 2.5, "y": None}]}
    assert (
        fingerprint(value) == fingerprint(reordered) == fingerprint(json.loads(json.dumps(value)))
    )
    others = [
        {**value, "c": None},
        {**value, "a": "a"},
        {**value, "b": [{"x": 2.5, "y": None}, 1]},
        {},
        [],
        None,
    ]
    assert len({fingerprint(other) for other in [value, *others]}) == 7
    assert len(fingerprint(value)) == 24
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint([float("nan")])


@pytest.mark.parametrize(
    ("uri", "path", "joined"),
    [
        ("/a/b", "c/d", "/a/b/c/d"),
        ("/what?/b/", "c", "/what?/b/c"),
        ("s3://bucket", "c", "s3://bucket/c"),
        (
            "s3://k:s@bucket/a/?region=eu&scheme=http",
            "c/d",
            "s3://k:s@bucket/a/c/d?region=eu&scheme=http",
        ),
    ],
)
def test_a_path_goes_before_the_query(uri: str, path: str, joined: str) -> None:
    assert join_uri(uri, path) == joined


def test_a_local_store_is_where_it_was_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store("folder").root == str(tmp_path / "folder")
    assert Store("~/folder/").root == str(tmp_path / "home" / "folder")
    assert Store(f"file://{tmp_path}/a b").root == f"{tmp_path}/a b"


@pytest.mark.parametrize("uri", ["ftp://host/x", "nonsense://x"])
def test_a_place_that_cannot_be_opened_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"Expected a local path or a URI that pyarrow\.fs knows"):
        filesystem(uri)
