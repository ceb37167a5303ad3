"""`python -m s2l_ray.check`, with and without a trained proxy: what it prints, its exit status, and
that it starts no Ray.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from s2l_ray import check
from s2l_ray.core.text.encoding import NO_LEARNED_TOKEN
from tests import tiny
from tests.integration.conftest import Finished

ROW = re.compile(
    r"│ (the job's: )?(fp32|bf16) +│ +([\d,]+|one row) │ (\w+) +│ +(\S+) │ +(\S+)% │"
    r" +(\d+) │ (.+?) +│ (.+?) +│ +(\d+) │"
)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("check starts no Ray")

    monkeypatch.setattr(ray, "init", refused)


def job(folder: Path, **sections: Any) -> Path:
    content = tiny.job(folder, count=80, target=None, evaluation=None, **sections)
    long = [{**row, "instruction": "repeat " + 80 * "x"} for row in tiny.rows(20, seed=2)]
    tiny.write_jsonl(folder / "raw" / "long.jsonl", long)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def lines(out: str) -> list[tuple[str, ...]]:
    return ROW.findall(out)


def test_a_job_that_never_ran_is_checked_on_its_model_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--config", str(job(tmp_path)), "--rows=60"]) == 0
    out = capsys.readouterr().out
    assert "the proxy is not trained yet" in out
    left_out = re.search(rf"│ +(\d+) │ {NO_LEARNED_TOKEN}", out)
    assert left_out
    assert 1 <= int(left_out.group(1)) <= 20
    assert f"left out: {left_out.group(1)} of 60 rows drawn" in out
    table = lines(out)
    assert {
        (dtype, tokens == "one row", attention) for _, dtype, tokens, attention, *_ in table
    } == {
        (dtype, alone, attention)
        for dtype in ("fp32", "bf16")
        for alone, attention in ((True, "default"), (False, "default"), (False, "eager"))
    }
    assert len(table) == 8, "two sizes of padded batches"
    (own,) = [line for line in table if line[0]]
    assert own[1] == "fp32"
    assert all(float(line[4]) < 1e-5 for line in table if line[1] == "fp32")
    assert all(1e-5 < float(line[4]) < 0.05 for line in table if line[1] == "bf16")
    assert all(line[8] == "step 0" for line in table)
    assert "clusters of these rows alone" in out
    assert "made: the index of the raw files alone, " in out
    assert "faithful: the job's setting (fp32" in out
    assert [path.name for path in (tmp_path / "storage").iterdir()] == ["index"]


def test_the_learned_part_of_a_row_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--config", str(job(tmp_path)), "--rows=8"]) == 0
    out = capsys.readouterr().out
    marked = re.search(
        r"example_id (\d+): ⟦learned⟧ are (\d+) of (\d+) tokens.*?│ (.*?) +│\n│ ⟦(.*?)<\|end\|>⟧",
        out,
        re.S,
    )
    assert marked, out
    example_id, learned, tokens, instruction, answer = marked.groups()
    files = [tmp_path / "raw" / name for name in ("a.jsonl", "b.jsonl", "long.jsonl")]
    number, place = int(example_id) >> 40, int(example_id) & (2**40 - 1)
    row = json.loads(files[number].read_text().splitlines()[place])
    assert (instruction, answer) == (row["instruction"], row["output"])
    assert int(learned) == len(answer) + 1
    assert int(tokens) == len(instruction) + 1 + len(answer) + 1


def test_a_setting_beyond_the_tolerance_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(job(tmp_path, trajectories={"dtype": "bf16", "tokens_per_batch": 500}))
    assert check.main(["--config", path, "--rows=20"]) == 0
    assert check.main(["--config", path, "--rows=20", "--tolerance=1e-6"]) == 1
    out = capsys.readouterr().out
    assert "NOT faithful: the job's setting (bf16" in out
    assert "Set trajectories.dtype: fp32" in out
    assert (
        check.main(["--config", path, "--rows=20", "--tolerance=1e-6", "--trajectories.dtype=fp32"])
        == 0
    )


def test_what_cannot_be_checked_is_an_error_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(job(tmp_path))
    assert check.main(["--config", path, "--proxy.max_length=2"]) == 2
    assert "has a token that is learned. Raise proxy.max_length" in capsys.readouterr().err
    assert check.main(["--config", path, f"--examples.files={tmp_path}/nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_several_proxies_are_checked_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**tiny.LLAMA, "hidden_size": 16, "intermediate_size": 32}
    del small["num_key_value_heads"]
    members = [
        {},
        {
            "model": {"config": {**small, "model_type": "gpt_neox"}},
            "prompt": "alpaca",
            "max_length": 240,
        },
    ]
    training = tiny.job(tmp_path)["proxy"]
    path = str(job(tmp_path, proxy={**training, "members": members}))
    assert check.main(["--config", path, "--rows=30"]) == 0
    out = capsys.readouterr().out
    assert out.count("⟦learned⟧ are") == 2
    assert "Below is an instruction" in out
    assert {line[8] for line in lines(out)} <= {"proxy 0 at step 0", "proxy 1 at step 0"}


def test_a_trained_proxy_is_checked_at_its_checkpoints_and_clusters(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses that were stored are those of the reference, so what is printed is about them."""
    assert check.main(["--config", str(finished.job), "--rows=40"]) == 0
    out = capsys.readouterr().out
    steps = finished.manifest("proxy").info["members"][0]["steps"]
    assert f"{len(steps)} checkpoints of {finished.artifact('proxy').uri}" in out.replace("\n", " ")
    assert "the job's 8 clusters" in out
    table = lines(out)
    assert len(table) == 8
    assert all(float(line[4]) < 2e-5 for line in table if line[1] == "fp32")
    assert all(line[9] == "0" for line in table if line[1] == "fp32")
    assert {int(line[8].removeprefix("step ")) for line in table} <= set(steps)
    assert check.main(["--config", str(finished.job), "--rows=12", "--checkpoints=2"]) == 0
    out = capsys.readouterr().out
    assert "2 checkpoints of" in out
    assert "clusters of these rows alone" in out


def test_the_reference_equals_what_the_run_stored(finished: Finished) -> None:
    """Rows that check draws have the very losses that trajectories holds."""
    import torch

    from s2l_ray import config, pipeline
    from s2l_ray.core.fidelity.losses import plain_loss
    from s2l_ray.core.fidelity.rows import draw
    from s2l_ray.core.model import scoring
    from s2l_ray.core.model.loading import load_encoder

    made = config.load(str(finished.job), []).first
    nodes = pipeline.plan(config.load(str(finished.job), []), "clusters").of("s2l")
    drawn = draw(nodes["examples"].ranges, made.examples, 25, seed=3)
    (encoder,) = [load_encoder(proxy) for proxy in made.proxy.each()]
    kept = [example for example in encoder.examples(drawn.table) if example.learned.any()]
    proxy = finished.artifact("proxy")
    folders = proxy.manifest().info["members"][0]["folders"]
    files = scoring.files_of(proxy.manifest())
    models = [
        scoring.load_checkpoint(proxy, folder, files, "fp32", torch.device("cpu"))
        for folder in folders
    ]
    found = {e.example_id: [plain_loss(m, e, torch.device("cpu")) for m in models] for e in kept}
    trajectories = finished.artifact("trajectories")
    for part in trajectories.manifest().parts:
        table = trajectories.read_part(part)
        for example_id, losses in zip(
            table["example_id"].to_pylist(), table["losses"].to_pylist(), strict=True
        ):
            if example_id in found:
                np.testing.assert_allclose(found.pop(example_id), losses, atol=1e-5)
    assert not found
