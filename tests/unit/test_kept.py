"""Kept hashes of what each stage makes of a small job; a stage that changes has a new version.

Otherwise storages would mix artifacts that have one name and two contents. The stages run whole, by
tests/inline_ray.py; the job and its exact numbers are those of tests/kept_job.py.
"""

import hashlib
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from s2l_ray import config, pipeline
from s2l_ray.config import Columns
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.original import original_texts
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file, read_part
from s2l_ray.stages import STAGES
from tests import inline_ray, kept_job

# (job, stage, version) -> hash of what it made when that version was released. A new version adds
# a line; a line is never changed.
KEPT = {
    ("exact", "examples", 2): "4969c99ec732d383e24395102a62e11ddc17a5022c82b5ac02962cca0fd06b4f",
    ("exact", "proxy", 2): "555826f9d93c37b3adea9d7486ef65bbc18d101319ab56247173e4088692be7b",
    (
        "exact",
        "trajectories",
        2,
    ): "4287df4631fb7c68b0dbc357bd4eb0f8b4fc882924742d7957e6ed765c73c13a",
    ("exact", "clusters", 2): "8621fedfde6b1317f962c142a96e1ab8f57171c6ead62a000ce4201bb3750e38",
    ("exact", "subset", 2): "ebb2ca0376b4043505e532464a49236c548edd101ae4509e755e6a766eb44bda",
    ("exact", "target", 2): "2b4dd867fa6f65652fbb6f36fd3b2746ad4d279e595cb3d48a1f82a1ff46eedb",
    ("exact", "evaluation", 2): "42cd4418522307d192af3ba1688760d0b93b3501c622d2282354d6c522b008cb",
    ("trained", "proxy", 2): "2a09f2ab9623ce0dc8df05b46e69f11a1fd8f88e980100b1698bacf1c7982c30",
    ("exact", "proxy", 3): "835f857bf261a9121fbadb24652934d686728ca7e4cdd4e12c021c7a193cafd1",
    (
        "exact",
        "trajectories",
        3,
    ): "e78dcf17b174480e4441c39d120d82454680e6e184b1f923f4345bca0bfdad0a",
    ("exact", "clusters", 3): "d016a9f8b0897309cad9338aef2ce0be7ce10acb61131fc560f5f4165ebaf7e7",
    ("exact", "subset", 3): "ad2bda3d24f7300b6d1d5b486b3a9446e5c488869e3f96a7cb002b6be3e55dbd",
    ("exact", "target", 3): "f2f705a831a46afe8d532de89781f8cbd4ea299910af7dc5ff39f005253161a0",
    ("exact", "evaluation", 3): "1b44815ec4d29a844e2e1b0fd957dfe351e9c5cb1096bca1d96569d0c9114519",
    ("trained", "proxy", 3): "751ceb75e4d20ba119e9ea71e081304aac58d618d244502b8f3c06cc89be0420",
    ("exact", "examples", 3): "951c54f2bb7b4abc8afa44361a230a55b8e559667efada2040045ca93ca7a0e0",
    ("exact", "proxy", 4): "fc5004e0b3182273b3cbbbab2e9fc0dfd6aafef233a53ce1067c5874ad9b7f19",
    (
        "exact",
        "trajectories",
        4,
    ): "38f4be9ac958a684c7c41ebfc9eeb241a7125afcb1b66b0df0d5633cb5d721d1",
    ("exact", "clusters", 4): "f22a12a65c36d3f35ed3da27471f99e6def00b52d110cdb6b835ab49a28623cd",
    ("exact", "subset", 4): "5b476db0b01738d2aabb53e4933edea38d98bed4d526ee007e03528229829ccf",
    ("exact", "target", 4): "bc74a09a9811125d9146c775eb63b3e26e21691d95bf735a12a3b25983d09749",
    ("exact", "evaluation", 4): "2023771653bbd557f75725b6263bccde489d519ef1d07d5ec9a4625cadde7cfd",
    ("trained", "proxy", 4): "b064edb2a035259bb714a41d298effd16c2e5ed9b6c36b0430d0a5505f86ee6d",
}
JOBS = {"exact": (kept_job.exact_job, "evaluation"), "trained": (kept_job.trained_job, "proxy")}
VERSIONS = {stage.name: stage.version for stage in STAGES}
# What must not pass: (stage, module, text of the source, another text).
WRONG = {
    "the loss is a sum": (
        "trajectories",
        "s2l_ray.core.model.statistics",
        "index_add_(0, _owners(counts_B), values_M.double()) / counts_B).float()",
        "index_add_(0, _owners(counts_B), values_M.double())).float()",
    ),
    "the subset's columns in another order": (
        "subset",
        "s2l_ray.stages.subset.files",
        '("example_id", "source", "cluster", "score")',
        '("example_id", "cluster", "source", "score")',
    ),
    "another exact match": (
        "evaluation",
        "s2l_ray.core.answers.scores",
        "without_thought(answer) == without_thought(gold)",
        "answer == gold",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of both jobs, with all their artifacts."""
    folders = {name: tmp_path_factory.mktemp(name) for name in JOBS}
    for name, folder in folders.items():
        make, _ = JOBS[name]
        (folder / "job.json").write_text(json.dumps(make(folder)))
        run(name, folder)
    return folders


def run(name: str, folder: Path) -> None:
    job = config.load(None, [], json.loads((folder / "job.json").read_text()))
    with inline_ray.used():
        pipeline.run(pipeline.plan(job, JOBS[name][1]))


def kept_hash(folder: Path, stage: str) -> str:
    found = list(kept_job.artifacts(str(folder / "storage"), stage))
    assert found
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


@pytest.mark.parametrize(
    ("job", "stage"),
    [*(("exact", stage.name) for stage in STAGES[:-1]), ("trained", "proxy")],
)
def test_what_a_stage_makes_changes_only_with_its_version(
    made: dict[str, Path], job: str, stage: str
) -> None:
    found = kept_hash(made[job], stage)
    assert KEPT.get((job, stage, VERSIONS[stage])) == found, (
        f"{stage} makes something else than version {VERSIONS[stage]} did, or under another name: "
        "raise its version, and add a line to KEPT"
    )


def test_a_subset_is_read_again_as_the_rows_came_in_with_their_first_ids(
    made: dict[str, Path],
) -> None:
    raw = {
        (file.name, row): json.loads(line)
        for file in (made["exact"] / "raw").iterdir()
        for row, line in enumerate(file.read_text().splitlines())
    }
    for folder in (made["exact"] / "storage" / "subset").iterdir():
        places = {
            row["example_id"]: (row["file"], row["row"])
            for index in (folder / "index").iterdir()
            for row in pq.read_table(index).to_pylist()
        }
        files = find_files([str(folder)], None)
        parts = part_ranges(files, [index_file(file, 7) for file in files])
        texts = [text for p in parts for text in original_texts(read_part(p, Columns()).table)]
        rows = [json.loads(text) for text in texts]
        assert sorted(row["first_example_id"] for row in rows) == sorted(places)
        for row in rows:
            source, came = row.pop("source"), dict(raw[places[row.pop("first_example_id")]])
            assert (source, row) == (came.pop("source", "talks"), came)


@pytest.fixture
def changed(request: pytest.FixtureRequest) -> Iterator[str]:
    """Exchanges one text in the source of a module; the name of the stage that it belongs to."""
    stage, name, old, new = WRONG[request.param]
    module = importlib.import_module(name)
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1
    before = dict(vars(module))
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), vars(module))
    yield stage
    vars(module).update(before)


@pytest.mark.parametrize("changed", list(WRONG), indirect=True)
def test_another_rule_under_the_same_version_is_seen(
    changed: str, made: dict[str, Path], tmp_path: Path
) -> None:
    storage = shutil.copytree(made["exact"] / "storage", tmp_path / "storage")
    shutil.rmtree(storage / changed)
    text = (made["exact"] / "job.json").read_text()
    (tmp_path / "job.json").write_text(text.replace(str(made["exact"] / "storage"), str(storage)))
    run("exact", tmp_path)
    assert kept_hash(tmp_path, changed) != kept_hash(made["exact"], changed)
