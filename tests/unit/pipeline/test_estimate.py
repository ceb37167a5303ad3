"""The plan that --dry-run prints: the jobs in the repository, without network, and numbers one can
check by hand.
"""

from pathlib import Path

import pytest

from s2l_ray import config, pipeline, run
from s2l_ray.pipeline import estimate
from tests import tiny
from tests.committed import commit

JOBS = sorted((Path(__file__).parents[3] / "jobs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_every_job_is_planned_without_network_or_files(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "--examples.expected_rows=1000"
    overrides = [] if "expected_rows" in job.read_text() else [rows]
    assert (
        run.main(["--config", str(job), "--dry-run", f"--run.storage={tmp_path}", *overrides]) == 0
    )
    printed = capsys.readouterr().out
    for stage in ("examples", "proxy", "trajectories", "clusters", "subset"):
        assert stage in printed
    assert "needed at once" in printed


def test_the_paper_run_costs_what_its_models_say(tmp_path: Path) -> None:
    path = next(str(path) for path in JOBS if "paper" in path.name)
    made_plan = pipeline.plan(config.load(path, [f"--run.storage={tmp_path}"]), assume=True)
    costs = {node.stage.name: estimate.cost(node, made_plan) for node in made_plan.nodes}
    proxy, target = 70_426_624, 6_738_415_616
    tokens = 262_039 * 210
    assert costs["proxy"].flops == 6 * proxy * 3 * tokens
    assert costs["trajectories"].flops == 2 * proxy * 13 * tokens
    assert costs["target"].rows == int(0.11 * 262_039)
    # columns x clusters x rounds
    assert costs["clusters"].flops == 3 * 262_039 * 12 * 100 * 100
    # ZeRO-3: bf16 weights, fp32 gradients, master and two moments, 8 ways
    assert costs["target"].memory == target * 18 / 8
    # ZeRO-1 shards the optimiser only
    assert costs["proxy"].memory == proxy * (2 + 4 + 12 / 4)


def test_statistics_cost_what_they_compute(tmp_path: Path) -> None:
    def scoring(*statistics: str) -> float:
        chosen = {"statistics": list(statistics), "dtype": "fp32"}
        made_plan = pipeline.plan(config.load(None, [], tiny.job(tmp_path, trajectories=chosen)))
        node = next(node for node in made_plan.nodes if node.stage.name == "trajectories")
        found = estimate.cost(node, made_plan).flops
        assert found is not None
        return found

    plain = scoring()
    assert scoring("el2n", "mean_probability", "min_probability") == plain
    size, rows = 37_280, 300
    # tokens of a row: the file's bytes, cut at max_length
    length = plain / (2 * size * rows * 4)
    assert length == 64
    assert scoring("answer_loss") - plain == pytest.approx(2 * size * rows * 4 * (length / 2 + 1))
    assert scoring("grand") - plain == pytest.approx(
        2 * rows * 4 * (length / 2) * min(length / 2, 32) * (260 + 32)
    )


def test_what_is_there_is_reused_in_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_plan = pipeline.plan(config.load(None, [], tiny.job(tmp_path)))
    examples = made_plan.nodes[0].artifact
    commit(examples)
    estimate.print_plan(made_plan)
    states = [
        line.split("│")[3].strip()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    assert states == ["reuse"] + ["make"] * 7


def test_a_real_run_needs_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(str(path) for path in JOBS if "paper" in path.name)
    assert run.main(["--config", path, f"--run.storage={tmp_path}"]) == 1
    assert "MathInstruct.jsonl matches no" in capsys.readouterr().err
