"""The command that lists a storage and deletes what no run names."""

from pathlib import Path

import pytest

from s2l_ray import config, pipeline
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from s2l_ray.pipeline.record import begun, write_begun, write_record
from s2l_ray.status import main
from tests import tiny
from tests.committed import commit
from tests.tiny_storage import subset, tiny_storage
from tests.tiny_storage import write_record as write_tiny_record

NAMED = {"examples/" + "e" * 24, "trajectories/a1" + "0" * 22} | {
    f"subset/{name}" + "0" * 22 for name in ("b1", "b2")
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Named and unnamed artifacts, an unfinished one, and leftovers."""
    store = tiny_storage(tmp_path / "stored")
    subset(store, "c1", [0, 1], made_at="2026-05-06T07:08:09+00:00")
    Artifact(store, "proxy", "d1").write("state/step.json", b"12345")
    store.write("tokens/t/token", b"1")
    store.write("scratch/s/a/b", b"22")
    store.write("demo/train.jsonl", b"{}")
    return store


def folders(store: Store) -> set[str]:
    names = {"/".join(name.split("/")[:2]) for name in store.list("")}
    return names - {"runs/demo", "demo/train.jsonl"}


def status(store: Store, *arguments: str) -> int:
    return main(["--storage", store.uri, *arguments])


def test_the_list_shows_everything_and_deletes_nothing(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    before = store.list("")
    assert status(store) == 0
    assert store.list("") == before
    lines = capsys.readouterr().out.splitlines()
    by_name = {
        name: next(line for line in lines if f" {name}" in line) for name in ("b1", "c1", "d1")
    }
    assert "demo" in by_name["b1"]
    assert "can go" not in by_name["b1"]
    assert "2026-05-06T07:08:09" in by_name["c1"]
    assert "can go" in by_name["c1"]
    assert "unfinished" in by_name["d1"]
    assert "can go" not in by_name["d1"]
    size = sum(store.list("subset/c1").values())
    assert f"3 folders, {size + 3:,} bytes" in lines[-1]


def test_pruning_keeps_what_a_run_names_and_what_is_unfinished(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(store.list("subset/c1").values())
    assert status(store, "--prune") == 0
    assert folders(store) == {*NAMED, "proxy/d1"}
    assert store.exists("demo/train.jsonl")
    assert store.exists("runs/demo/run.json")
    text = capsys.readouterr().out
    assert f"deleted subset/c1: {size:,} bytes" in text
    assert f"deleted: 3 folders, {size + 3:,} bytes" in text


def test_unfinished_artifacts_go_when_asked_for(store: Store) -> None:
    assert status(store, "--prune", "--unfinished") == 0
    assert folders(store) == NAMED


def test_pruning_keeps_what_a_named_artifact_was_made_from(store: Store) -> None:
    # Such as the artifact that `examples.extends` names: the plan needs it, no record lists it.
    commit(Artifact(store, "examples", "f1"))
    commit(Artifact(store, "examples", "f2"), inputs={"extends": "f1"})
    extended = Artifact(store, "examples", "f3")
    commit(extended, inputs={"extends": "f2"})
    write_tiny_record(store, "more", {"s2l": [extended]})
    assert status(store, "--prune") == 0
    assert {"examples/f1", "examples/f2", "examples/f3"} <= folders(store)


def test_nothing_is_deleted_when_a_record_is_damaged(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write("runs/demo/run.json", b"[")
    before = store.list("")
    assert status(store, "--prune") == 1
    assert "not the record of a run" in capsys.readouterr().err
    assert store.list("") == before


def test_an_interrupted_deletion_leaves_no_manifest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = Store.delete

    def interrupted(self: Store, path: str) -> None:
        if not path.endswith(".json"):
            raise KeyboardInterrupt
        delete(self, path)

    monkeypatch.setattr(Store, "delete", interrupted)
    assert status(store, "--prune") == 130
    assert Artifact(store, "subset", "c1").committed() is None
    assert len(store.list("subset/c1")) > 0


def test_an_empty_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--storage", str(tmp_path / "none"), "--prune"]) == 0
    assert "nothing is stored" in capsys.readouterr().out


def test_all_files_are_verified_against_their_manifests(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    before = store.list("")
    assert status(store, "--verify") == 0
    assert "verified 8 files" in capsys.readouterr().out
    data = next(
        name for name in before if name.startswith("trajectories/a1") and "part-00001" in name
    )
    store.write(data, bytes([store.read(data)[0] ^ 1]) + store.read(data)[1:])
    gone = next(name for name in before if name.startswith("subset/c1") and "part" in name)
    store.delete(gone)
    record = f"subset/b1{'0' * 22}/manifest.json"
    store.write(record, store.read(record).replace(b'"rows": 1', b'"rows": 2'))
    assert status(store, "--verify") == 1
    said = capsys.readouterr().err
    assert "3 not as they were written" in said
    assert f"{data}: expected SHA-256" in said
    assert f"{gone}: the manifest lists it, but it is missing" in said
    assert f"{record}: not a manifest of this version (its content changed" in said


def test_pruning_keeps_what_a_run_wants_that_has_not_finished(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny.job(tmp_path)
    tree["run"] = {"name": "other", "storage": store.uri}
    made = pipeline.plan(config.load(None, [], tree))
    write_begun(made)
    manifests = {node.label: commit(node.artifact) for node in made.nodes}
    wanted = {node.artifact.path for node in made.nodes}
    assert status(store, "--prune") == 0
    left = {name for name in folders(store) if not name.startswith(("index/", "runs/"))}
    assert left == {*NAMED, "proxy/d1", *wanted, "tokens/t", "scratch/s"}
    assert "other (not finished)" in " ".join(capsys.readouterr().out.split())
    write_record(made, manifests)
    assert begun(store, "other") == set()
    store.write("runs/other/begun.json", b"[")
    assert status(store, "--prune") == 1
    assert "begun.json" in capsys.readouterr().err
