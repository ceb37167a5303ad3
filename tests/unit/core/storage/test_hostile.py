"""What others wrote into a storage cannot lead out of it, and a change of it is noticed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2l_ray.contract.work import Outcome
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import ProxyInfo, ProxyMember, TargetInfo, info_of
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from tests.committed import commit, info_with, manifest

OUTSIDE = ["../escaped", "a/../../b", "/etc/passwd", "a//b", ".", "..", "a/./b", "a\x00b", "a\x1bb"]


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    found = Artifact(Store(str(tmp_path / "stored")), "examples", "f" * 24)
    part = found.write_part(0, 1, {"data": (".parquet", b"rows")}, "node", "run", {})
    commit(found, Outcome(parts=[part]))
    return found


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_path_leads_out_of_a_storage(artifact: Artifact, path: str) -> None:
    store = artifact.store
    for call in (
        lambda: store.write(path, b"x"), lambda: store.read(path), lambda: store.list(path),
        lambda: store.delete(path), lambda: store.exists(path), lambda: store.folders(path),
        lambda: store.uri_of(path), lambda: Artifact(store, "examples", path).committed(),
        lambda: artifact.write_named(path, b"x"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="plain names"):
            call()
    assert [each.name for each in Path(store.root).parent.iterdir()] == ["stored"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_manifests_and_receipts_name_files_inside_their_folder_only(
    artifact: Artifact, path: str
) -> None:
    made = artifact.manifest()
    entry = made.parts[0].files["data"]
    for files in ({"data": replace(entry, name=path)}, {path: entry}):
        part = replace(made.parts[0], files=files)
        artifact.write("manifest.json", replace(made, parts=[part]).to_bytes())
        with pytest.raises(UserError, match="plain names"):
            artifact.manifest()
    artifact.write("manifest.json", replace(made, files=[replace(entry, name=path)]).to_bytes())
    with pytest.raises(UserError, match="plain names"):
        artifact.manifest()


@pytest.mark.parametrize("path", OUTSIDE)
def test_folders_of_models_lie_inside_their_artifact(path: str) -> None:
    member = info_with(ProxyMember, folders=[path])
    for stage, info in (
        ("proxy", info_with(ProxyInfo, members=[member])),
        ("target", info_with(TargetInfo, model=path, last="last", held_out=[])),
        ("target", info_with(TargetInfo, model="best", last=path, held_out=[])),
    ):
        with pytest.raises(UserError, match="plain names"):
            info_of(manifest(stage, info=info), type(info))


def test_an_adopted_part_stays_inside_its_new_artifact(artifact: Artifact) -> None:
    other = Artifact(artifact.store, "examples", "e" * 24)
    part = artifact.manifest().parts[0]
    hostile = replace(part, files={"../../../escaped": part.files["data"]})
    with pytest.raises(UserError, match="plain names"):
        other.adopt(0, artifact, hostile)
    assert other.adopt(3, artifact, part).files["data"].name.startswith("data/part-00003-")
    assert [each.name for each in Path(artifact.store.root).parent.iterdir()] == ["stored"]


def test_every_changed_bit_of_a_manifest_is_noticed(artifact: Artifact) -> None:
    data = artifact.read("manifest.json")
    assert json.loads(data)["stage"] == "examples"
    for bit in range(8 * len(data)):
        place, value = bit // 8, 1 << bit % 8
        changed = data[:place] + bytes([data[place] ^ value]) + data[place + 1 :]
        with pytest.raises(UserError, match="not a manifest"):
            Manifest.from_bytes(changed, "it")
    for cut in range(len(data)):
        with pytest.raises(UserError, match="not a manifest"):
            Manifest.from_bytes(data[:cut], "it")


def test_a_manifest_from_before_checksums_is_read(artifact: Artifact) -> None:
    fields: dict[str, Any] = json.loads(artifact.read("manifest.json"))
    del fields["sha256"]
    assert Manifest.from_bytes(json.dumps(fields).encode(), "it") == artifact.manifest()


def test_a_manifest_counts_only_in_the_folder_it_was_written_for(artifact: Artifact) -> None:
    for stage, name in (("examples", "e" * 24), ("proxy", "f" * 24)):
        other = Artifact(artifact.store, stage, name)
        other.write("manifest.json", artifact.read("manifest.json"))
        with pytest.raises(UserError, match=f"expected the manifest of {stage} {name}"):
            other.committed()
