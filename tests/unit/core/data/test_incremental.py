"""Numbers of raw files over a chain of extended data sets, and parts that were scored before."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.contract.work import Outcome
from s2l_ray.core.data.incremental import (
    Lineage,
    extended,
    file_numbers,
    files_of,
    kept_parts,
    listing,
    renumbered,
    scored_parts,
)
from s2l_ray.core.data.parts import PartRange, RawFile
from s2l_ray.core.storage.artifact import Artifact, artifact_at
from s2l_ray.core.storage.info import ExamplesInfo, NumberedFile
from s2l_ray.core.storage.manifest import Manifest, Part
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from tests.committed import commit, info_with, manifest

Files = Sequence[tuple[str, int, str]]


def recorded(files: Files, lineage: Lineage) -> Manifest:
    """What `examples` keeps of a numbered data set."""
    listed = [
        NumberedFile(number, name, size, sha256)
        for number, (name, size, sha256) in zip(lineage.numbers, files, strict=True)
    ]
    info = info_with(ExamplesInfo, files=listed, next_file_number=lineage.next_number)
    return manifest("examples", info=info)


def test_a_data_set_of_its_own_is_numbered_in_order() -> None:
    found = file_numbers([("a", 1, "x"), ("b", 2, "y")], None, "stop", "")
    assert found == Lineage([0, 1], 2, ["a", "b"], [])


def test_new_files_come_after_all_others_whatever_their_names() -> None:
    old = [("b", 1, "x"), ("d", 1, "y")]
    base = recorded(old, file_numbers(old, None, "stop", ""))
    found = file_numbers([("a", 1, "n"), *old, ("e", 1, "m")], base, "stop", "base")
    assert found == Lineage([2, 0, 1, 3], 4, ["a", "e"], [])


def test_a_base_that_was_cut_or_read_in_another_way_is_refused() -> None:
    file = RawFile("/a", "a", "a", 1, 0, "x")
    ranges = [PartRange(0, 0, file, "lines", 0, 0, 1, 0, 1)]
    old = [("a", 1, "x")]
    base = dataclasses.replace(
        recorded(old, file_numbers(old, None, "stop", "")), section={"rows_per_part": 5}
    )
    assert extended(ranges, base, {"rows_per_part": 5}, "stop", "base") == ranges
    with pytest.raises(UserError, match=r"examples.rows_per_part = 5, but the config says 6"):
        extended(ranges, base, {"rows_per_part": 6}, "stop", "base")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("a", 1, "x")], ["gone (b)"]),
        ([("a", 1, "other"), ("b", 1, "y")], ["changed (a)"]),
        ([("b", 2, "other"), ("c", 1, "z")], ["gone (a)", "changed (b)"]),
    ],
)
def test_files_that_are_gone_or_changed_are_refused_by_name(files: Files, words: list[str]) -> None:
    old = [("a", 1, "x"), ("b", 1, "y")]
    base = recorded(old, file_numbers(old, None, "stop", ""))
    with pytest.raises(UserError) as error:
        file_numbers(files, base, "stop", "the/base")
    assert all(
        word in str(error.value) for word in ["the/base", "examples.on_changed_file: drop", *words]
    )


def test_dropped_files_leave_their_number_unused_for_ever() -> None:
    first = [("a", 1, "x"), ("b", 1, "y")]
    base = recorded(first, file_numbers(first, None, "stop", ""))
    second = [("a", 1, "x2")]
    dropped = file_numbers(second, base, "drop", "")
    assert dropped == Lineage([2], 3, ["a"], ["a", "b"])
    third = file_numbers([*second, ("b", 1, "y")], recorded(second, dropped), "stop", "")
    assert third.numbers == [2, 3]


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("xyz"), min_size=1), min_size=1
    )
)
def test_a_number_means_one_content_for_ever(history: list[dict[str, str]]) -> None:
    base, meaning = None, {}
    for state in history:
        files = [(name, 1, sha256) for name, sha256 in sorted(state.items())]
        found = file_numbers(files, base, "drop", "")
        assert len(set(found.numbers)) == len(files)
        assert max(found.numbers) < found.next_number
        for number, (name, _, sha256) in zip(found.numbers, files, strict=True):
            assert meaning.setdefault(number, (name, sha256)) == (name, sha256)
        base = recorded(files, found)
        assert [file.number for file in files_of(base)] == sorted(found.numbers)


def scored(store: Store, fingerprint: str, parts: dict[str, bytes], **fields: Any) -> Manifest:
    """Commit trajectories: SHA-256 of an examples part -> content of the scored part."""
    artifact = Artifact(store, "trajectories", fingerprint)
    made = [
        artifact.write_part(
            index, 3, {"data": (".parquet", data)}, "node", "run", {"examples": sha256}
        )
        for index, (sha256, data) in enumerate(parts.items())
    ]
    return commit(artifact, Outcome(made), inputs={"proxy": "p"}, version=2, **fields)


def test_parts_scored_before_are_found_and_adopted(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    scored(store, "t1", {"e1": b"one", "e2": b"two"})
    scored(store, "t2", {"e3": b"three"})
    found = scored_parts(store, 2, {}, "p", [(0, "e3"), (1, "e9"), (2, "e2")])
    assert sorted(found) == [0, 2]
    made = Artifact(store, "trajectories", "t3")
    adopted: list[Part] = [made.adopt(index, *found[index]) for index in sorted(found)]
    assert [made.read_file(part.files["data"]) for part in adopted] == [b"three", b"two"]
    assert made.finished_parts() == {0: adopted[0], 2: adopted[1]}


@pytest.mark.parametrize("asked", [(3, {}, "p"), (2, {"dtype": "bf16"}, "p"), (2, {}, "q")])
def test_parts_of_another_proxy_section_or_version_are_not_taken(
    tmp_path: Path, asked: tuple[int, dict[str, Any], str]
) -> None:
    store = Store(str(tmp_path))
    scored(store, "t1", {"e1": b"one"})
    assert scored_parts(store, 2, {}, "p", [(0, "e1")])
    assert not scored_parts(store, *asked, [(0, "e1")])


def test_an_unfinished_artifact_gives_no_parts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    artifact = Artifact(store, "trajectories", "t1")
    artifact.write_part(0, 3, {"data": (".parquet", b"x")}, "node", "run", {"examples": "e1"})
    assert not scored_parts(store, 2, {}, "p", [(0, "e1")])


def ranges_of(files: dict[str, tuple[str, int]]) -> list[PartRange]:
    """Parts of a data set: file name -> (SHA-256, number of parts)."""
    made: list[PartRange] = []
    for number, (name, (sha256, parts)) in enumerate(sorted(files.items())):
        file = RawFile(f"/{name}", name, name, 1, 0, sha256)
        made += [
            PartRange(len(made) + part, number, file, "lines", 0, part * 4, 4, 0, 0)
            for part in range(parts)
        ]
    return made


def test_an_extended_data_set_keeps_the_parts_of_the_files_it_keeps() -> None:
    first = ranges_of({"b": ("x", 2), "d": ("y", 1)})
    numbered = file_numbers(listing(first), None, "stop", "")
    parts = [Part(part.index, 4, {}, stats={"file": part.file.name}) for part in first]
    base = recorded(listing(first), numbered)
    base = dataclasses.replace(base, parts=parts)
    second = ranges_of({"a": ("n", 3), "b": ("x", 2), "d": ("z", 1)})
    found = file_numbers(listing(second), base, "drop", "")
    extended = renumbered(second, found.numbers)
    assert [(part.index, part.file_number, part.file.name) for part in extended] == [
        (0, 0, "b"), (1, 0, "b"), (2, 2, "a"), (3, 2, "a"), (4, 2, "a"), (5, 3, "d"),
    ]  # fmt: skip
    assert kept_parts(base, extended, base.version) == {0: parts[0], 1: parts[1]}
    assert kept_parts(base, extended, base.version + 1) == {}


@pytest.mark.parametrize(
    "uri", ["proxy/x", "/a/clusters/x", "/a/b", "x", "s3://bucket/trajectories/f?region=r", ""]
)
def test_a_uri_of_no_such_artifact_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"proxy.use: expected the URI of a proxy artifact"):
        artifact_at(uri, "proxy", "proxy.use")


def test_an_artifact_is_opened_by_its_uri(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"proxy.use: there is no manifest.json"):
        artifact_at(f"{tmp_path}/proxy/f", "proxy", "proxy.use")
    made = Artifact(Store(str(tmp_path)), "proxy", "f")
    commit(made)
    assert artifact_at(f"{made.uri}/", "proxy", "proxy.use").uri == made.uri
