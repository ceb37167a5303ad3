"""The Python interface, on a storage of a few rows."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import s2l_ray
from s2l_ray import config, demo, pipeline
from s2l_ray.api import INFOS, Storage
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import TrajectoriesInfo
from s2l_ray.errors import UserError
from s2l_ray.pipeline import NAMES
from tests import inline_ray, tiny
from tests.committed import commit
from tests.tiny_storage import subset, tiny_storage, write_record

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return s2l_ray.open(tiny_storage(tmp_path / "stored").uri)


def test_the_latest_is_the_committed_one_that_was_made_last(storage: Storage) -> None:
    assert storage.latest("trajectories").fingerprint == "a1" + "0" * 22
    for fingerprint, day in (("0a", "2026-01-03"), ("ff", "2026-01-01")):
        commit(Artifact(storage.store, "trajectories", fingerprint), made_at=f"{day}T00:00:00")
    Artifact(storage.store, "trajectories", "unfinished").write("receipts/part-00000.json", b"{}")
    assert storage.latest("trajectories").fingerprint == "0a"
    assert len(storage.artifacts("trajectories")) == 3


def test_nothing_committed_is_an_error_that_says_so(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"latest clusters in .*nothing is committed"):
        storage.latest("clusters")
    with pytest.raises(UserError, match=r"found none. Committed are: none"):
        s2l_ray.open(str(tmp_path / "empty")).artifact("subset", "b1")
    with pytest.raises(UserError, match=r"expected a stage of examples, .*got 'subsets'"):
        storage.latest("subsets")


def test_a_file_is_no_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="it is a file"):
        s2l_ray.open(str(tmp_path / "file"))


def test_a_prefix_finds_one_artifact_or_is_refused(storage: Storage) -> None:
    assert storage.artifact("subset", "b1").arrow()["example_id"].to_pylist() == [1]
    with pytest.raises(UserError, match=r"several begin so: b10+, b20+"):
        storage.artifact("subset", "b")
    with pytest.raises(UserError, match=r"found none. Committed are: b10+, b20+"):
        storage.artifact("subset", "c")


def test_a_whole_fingerprint_is_not_ambiguous(storage: Storage) -> None:
    subset(storage.store, "b1", [0])
    assert storage.artifact("subset", "b1").fingerprint == "b1"


def test_a_run_gives_the_artifacts_of_its_variants(storage: Storage) -> None:
    run = storage.run("demo")
    assert storage.runs() == ["demo"]
    assert run.variants == ["s2l", "random"]
    assert run.artifact("subset").arrow()["example_id"].to_pylist() == [1]
    assert run.artifact("subset", variant="random").arrow()["example_id"].to_pylist() == [0]
    with pytest.raises(UserError, match="expected a variant of s2l, random, got 'full'"):
        run.artifact("subset", variant="full")
    with pytest.raises(UserError, match=r"expected a stage of examples, .*got 'target'"):
        run.artifact("target")


def test_a_missing_or_damaged_run_is_an_error_that_says_so(storage: Storage) -> None:
    with pytest.raises(UserError, match=r"no runs/other/run.json. Finished runs: demo"):
        storage.run("other")
    storage.store.write("runs/demo/run.json", b'{"name": "demo"}')
    with pytest.raises(UserError, match="not the record of a run"):
        storage.run("demo")


def test_a_run_reads_a_copied_storage_and_artifacts_of_another(
    storage: Storage, tmp_path: Path
) -> None:
    other = Storage(str(tmp_path / "other"))
    write_record(other.store, "uses", {"s2l": [Artifact(storage.store, "subset", "b1" + "0" * 22)]})
    assert other.run("uses").artifact("subset").uri.startswith(storage.uri)
    (tmp_path / "stored").rename(tmp_path / "moved")
    moved = Storage(str(tmp_path / "moved"))
    assert moved.run("demo").artifact("subset").uri.startswith(moved.uri)
    with pytest.raises(UserError, match=r"reading subset of run uses: there is no manifest\.json"):
        other.run("uses").artifact("subset")


def test_an_artifact_says_what_it_is(storage: Storage) -> None:
    found = storage.latest("trajectories")
    assert (found.stage, found.rows) == ("trajectories", 4)
    assert found.uri == f"{storage.uri}/trajectories/{found.fingerprint}"
    assert found.manifest.fingerprint == found.fingerprint
    assert isinstance(found.info, TrajectoriesInfo)
    assert found.info.steps == [[0, 0], [0, 10]]
    assert INFOS.keys() == set(NAMES) - {"report"}


def test_parts_are_read_one_by_one_and_together(storage: Storage) -> None:
    found = storage.latest("trajectories")
    parts = list(found.parts(["example_id"]))
    assert [part["example_id"].to_pylist() for part in parts] == [[0, 1], [2, 3]]
    assert found.arrow().num_rows == 4
    assert found.arrow(["num_tokens"]).column_names == ["num_tokens"]
    assert storage.latest("examples").arrow(role="rejects")["row"].to_pylist() == [7]


def test_unknown_columns_and_roles_are_refused(storage: Storage) -> None:
    with pytest.raises(UserError, match=r"no column 'loss'. Expected some of example_id, source"):
        storage.latest("trajectories").arrow(["example_id", "loss"])
    with pytest.raises(UserError, match="role 'chat'; its roles with tables: data, rejects"):
        storage.latest("examples").arrow(role="chat")


def test_a_changed_file_is_refused(storage: Storage) -> None:
    found = storage.latest("subset")
    entry = found.manifest.parts[0].files["data"]
    storage.store.write(f"subset/{found.fingerprint}/{entry.name}", b"x" * entry.bytes)
    with pytest.raises(UserError, match="expected SHA-256"):
        found.arrow()


def test_pandas_or_a_plain_error_without_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = storage.latest("trajectories")
    assert list(found.pandas(["example_id"])["example_id"]) == [0, 1, 2, 3]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        found.pandas()


def test_the_matrix_holds_the_scored_rows(storage: Storage) -> None:
    ids, losses = storage.latest("trajectories").matrix()
    assert (ids.dtype, losses.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(ids, [0, 1, 3])
    np.testing.assert_array_equal(losses, np.array([[3, 2], [4, 1], [5, 0.5]], np.float32))
    with pytest.raises(UserError, match="expected trajectories, got subset"):
        storage.latest("subset").matrix()


def test_a_job_is_loaded_and_planned(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 40)
    job = {
        **demo.CONFIG,
        "run": {"name": "n", "storage": str(tmp_path / "stored")},
        "examples": {"files": [str(tmp_path / "rows.jsonl")]},
        "evaluation": {"files": [str(tmp_path / "rows.jsonl")]},
    }
    plan = s2l_ray.plan(
        s2l_ray.load(job, "examples.rows_per_part=10", "proxy.epochs=40"), until="examples"
    )
    assert [node.stage.name for node in plan.nodes] == ["examples"]
    assert len(plan.nodes[0].ranges) == 4
    with pytest.raises(UserError, match=r"reading the job: [\s\S]*run\.nam: unknown key"):
        s2l_ray.load({"run": {"nam": "n"}})


def test_the_package_itself_loads_nothing() -> None:
    code = "import sys, s2l_ray; print(sorted(m for m in sys.modules if m in " + (
        "('torch', 'ray', 'pyarrow', 'numpy', 'pydantic', 's2l_ray.api')))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_names_of_the_package() -> None:
    for name in s2l_ray.__all__:
        assert getattr(s2l_ray, name)
    with pytest.raises(AttributeError, match="no attribute 'shut'"):
        s2l_ray.shut  # noqa: B018


def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.read_text().split("## From Python\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks
    tiny_storage(tmp_path / "s2l_ray_storage")
    monkeypatch.chdir(tmp_path)
    exec(compile(textwrap.dedent(blocks[0]), str(README), "exec"), {})
    assert "(3, 2)" in capsys.readouterr().out


def test_examples_of_several_formats_are_one_table(tmp_path: Path) -> None:
    tree = tiny.job(tmp_path, evaluation=None)
    rows = [{**row, "more": [1, {"a": None}]} for row in tiny.rows(3)]
    folder = tmp_path / "mixed"
    tiny.write_jsonl(folder / "a.jsonl", rows)
    columns = {"instruction": ["q"], "output": ["a"], "source": ["b"], "n": [7]}
    pq.write_table(pa.table(columns), folder / "b.parquet")
    pq.write_table(pa.table({**columns, "n": ["x"]}), folder / "c.parquet")
    tree["examples"]["files"] = [str(folder)]
    with inline_ray.used():
        pipeline.run(pipeline.plan(config.load(None, [], tree), "examples"))
    found = s2l_ray.open(str(tmp_path / "storage")).latest("examples")
    table = found.arrow()
    assert table["source"].to_pylist() == [*(row["source"] for row in rows), "b", "b"]
    original = table["original"].to_pylist()
    for row, made in zip(rows, original, strict=False):
        assert {name: made[name] for name in ("id", "instruction", "output")} == {
            name: row[name] for name in ("id", "instruction", "output")
        }
    assert [made["n"] for made in original] == [None, None, None, "7", '"x"']
    assert found.arrow(["source"]).column_names == ["source"]
