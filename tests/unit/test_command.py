"""The console command hands its arguments to the command that the first of them names."""

import subprocess
import sys
from pathlib import Path

import pytest

import s2l_ray
from s2l_ray import command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"s2l_ray {s2l_ray.__version__}\n"


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_is_a_module_with_its_own_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m s2l_ray.{name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "sweep", "check"])
def test_help_is_short_and_help_all_has_every_field(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for words in ([], ["all"]):
        with pytest.raises(SystemExit) as ended:
            command.main([name, "--help", *words])
        assert ended.value.code == 0
        texts.append(capsys.readouterr().out)
    short, full = texts
    assert "clusters.k = 100" in short
    assert "--help all" in short
    assert "adam_beta2" not in short
    assert len(short.splitlines()) < 60
    assert "proxy.adam_beta2 = 0.999" in full


@pytest.mark.parametrize(
    "arguments", [["--until", "cluster"], ["clusters.k"], ["--clusters.k={"], ["--help", "every"]]
)
def test_a_wrong_command_line_ends_with_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command.main(["run", f"--run.storage={tmp_path}", "--dry-run", *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert "error: " in capsys.readouterr().err


def test_an_unknown_command_is_refused_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["rum"])
    assert ended.value.code == 2
    assert "run" in capsys.readouterr().err


def test_the_command_loads_nothing_heavy_before_it_is_known() -> None:
    heavy = ("ray", "torch", "pydantic")
    code = f"import sys, s2l_ray.command; print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
