"""Names and texts of others are shown as they are, and credentials are not shown at all."""

import ast
import io
import json
import logging
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

import s2l_ray
from s2l_ray import config, pipeline, run
from s2l_ray.api import Storage
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import Estimate, EvaluationInfo, HeldOut, SourceHeldOut
from s2l_ray.core.storage.store import Store
from s2l_ray.display import Console, say, shown
from s2l_ray.errors import UserError, without_credentials
from s2l_ray.pipeline.record import write_record
from s2l_ray.status import main as status
from tests import tiny
from tests.committed import commit

NAMES = ["[bold]b[/bold]", "[/]", "[/x]", "[link=https://a.b]c[/link]", ":smile:", "a\\[b]"]
STEERING = "a\x1b[31mred\x1b[0m\x07\x9b2J\u202eb"


@pytest.mark.parametrize("name", NAMES)
def test_tables_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    Console(wide=True).print(table)
    Console().print(name)
    say(name)
    assert capsys.readouterr().out.count(name) == 5


def test_nothing_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=STEERING)
    table.add_row(STEERING)
    Console().print(table)
    say(STEERING)
    said = capsys.readouterr().out
    assert said.count("[31mred") == 3
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(said)
    assert shown("zwölf 日本 👩‍🚀\t\n") == "zwölf 日本 👩‍🚀\t\n"


def test_a_plan_and_its_results_show_names_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    names = [name for name in NAMES if "/" not in name]
    tree = tiny.job(tmp_path, variants={name: {} for name in names})
    tree["run"]["storage"] = str(tmp_path / "[bold][" / "x]")
    made = pipeline.plan(config.load(None, [], tree))
    from s2l_ray.pipeline.estimate import print_plan

    print_plan(made)
    assert "[bold][/x]" in "".join(capsys.readouterr().out.split())
    metrics = {"loss": Estimate(1.0, 0.9, 1.1)}
    by_source = {n: SourceHeldOut(metrics=metrics, rows=1) for n in [*NAMES, STEERING]}
    info = EvaluationInfo(by_source=by_source, macro=HeldOut(metrics=metrics))
    console = Console(wide=True)
    console.print(run.comparison({NAMES[2]: info}))
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)
    assert "\x1b" not in said


def test_all_that_is_printed_goes_through_one_module() -> None:
    folder = Path(s2l_ray.__file__).parent
    for path in folder.rglob("*.py"):
        if path.name == "display.py":
            continue
        tree = ast.parse(path.read_text())
        calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
        assert "print" not in [n.id for n in calls if isinstance(n, ast.Name)], path
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert "rich.console.Console" not in [
            f"{n.module}.{a.name}" for n in froms for a in n.names
        ]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s3://AK1:SE/CR+ET@b/x?region=r is gone", "s3://b/x?region=r is gone"),
        ("a s3://AK:p@ss@b/x, s3://AK:SECRET@c", "a s3://b/x, s3://c"),
        ('["s3://AK:SECRET@b", 1]', '["s3://b", 1]'),
        ("hdfs://host:9000/a@b and abfs://box@account/x", "hdfs://host:9000/a@b and abfs://box@account/x"),
        ("x://b/c?sas_token=SECRET&d=1&client_secret=SECRET", "x://b/c?sas_token=***&d=1&client_secret=***"),
        ("12:30 a@b.c {}", "12:30 a@b.c {}"),
    ],
)  # fmt: skip
def test_credentials_of_uris_are_left_out(text: str, left: str) -> None:
    assert without_credentials(text) == left
    assert str(UserError(text)) == str(pickle.loads(pickle.dumps(UserError(text)))) == left


def test_no_command_record_or_log_tells_the_credentials_of_a_storage(
    s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ":secret@" in s3_bucket
    place = s3_bucket.replace("?", "/told?")
    tree = tiny.job(tmp_path)
    tree["run"]["storage"] = place
    made = pipeline.plan(config.load(None, [], tree))
    manifests = {node.label: commit(node.artifact) for node in made.nodes}
    write_record(made, manifests)
    record = made.store.read(f"runs/{made.job.first.run.name}/run.json").decode()
    assert json.loads(record)["artifacts"]["examples"]["uri"].startswith("s3://bucket/told/")
    assert status(["--storage", place]) == 0
    Artifact(Store(place), "subset", "f" * 24).write("manifest.json", b"{")
    assert status(["--storage", place]) == 1
    run.set_up_logging()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    run.log.addHandler(handler)
    run.log.warning("%s [x] \x1b", place)
    run.log.removeHandler(handler)
    said = capsys.readouterr()
    for text in (said.out, said.err, record, stream.getvalue(), repr(Storage(place))):
        assert "bucket/told" in "".join(text.split())
        assert "secret" not in text
        assert "\x1b" not in text


def test_sigterm_ends_a_command_with_143_and_one_line() -> None:
    code = (
        "import signal, time; from s2l_ray.run import exit_status;"
        "exit_status(lambda: print('up', flush=True) or signal.pause())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143
    assert said == "terminated; the same command goes on from here\n"
