"""The plan that --dry-run prints: the jobs in the repository, without network, and numbers one can
check by hand.
"""

import json
import re
from pathlib import Path

import pytest

from s2l_ray import config, pipeline, run
from s2l_ray.errors import UserError
from s2l_ray.pipeline import estimate
from tests import tiny
from tests.committed import commit

GPT2 = {
    "model_type": "gpt2", "vocab_size": 260, "n_positions": 256, "n_embd": 32, "n_layer": 1,
    "n_head": 2,
}  # fmt: skip
JOBS = sorted((Path(__file__).parents[3] / "jobs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


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
    # ZeRO-3, 8 ways: bf16 weights, fp32 gradients, master and two moments, and a bucket of fp32
    # gradients; then 10^9 gathered weights and their gradients
    assert costs["target"].memory == target * 18 / 8 + 4 * 200_000_000 + 2 * 2 * 1_000_000_000
    # ZeRO-1 shards the optimiser only; gradients of a pass and what is summed come on top
    assert costs["proxy"].memory == proxy * (2 + 4 + 12 / 4) + proxy * (2 + 4)


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


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--scaling.proxy.workers=2"], None),
        (
            ["--scaling.proxy.workers=200", "--proxy.global_batch=1600", "--proxy.epochs=16"],
            "200 workers take 2 of 2 CPUs .1 x 2., at most 200 of 200 fit, and 2 tasks of 0.25 "
            "CPUs .* Lower scaling.proxy.workers or",
        ),
        (["--scaling.target.cpus=1.6"], "1 workers take 1.6 of 2 CPUs .*Lower scaling.target"),
        (["--scaling.proxy.gpus=1"], "need more than the 0 GPUs that there are. Lower scaling.pro"),
        (["--scaling.trajectories.cpus=3"], "need 3 CPUs .* there are 2 .*scaling.trajectories"),
        (["--scaling.clusters.workers=300"], "300 .* CPUs .* there are 2 .*Lower scaling.clusters"),
    ],
)
def test_a_dry_run_refuses_what_this_machine_cannot_hold_after_its_plan(
    overrides: list[str],
    said: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "num_gpus", lambda: 0)
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(tiny.job(tmp_path)))
    status = run.main(["--config", str(job), "--dry-run", *overrides])
    printed = capsys.readouterr()
    assert "│ target" in printed.out
    assert "this machine has 2 CPUs (scaling.local_cpus)" in " ".join(printed.out.split())
    assert status == (1 if said else 0)
    assert re.search(said or "^$", " ".join(printed.err.split("error: ")[-1].split()))


def test_a_dry_run_of_data_that_are_elsewhere_says_what_does_not_fit_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny.job(tmp_path, examples={"files": ["not/here"], "expected_rows": 300})
    made_plan = pipeline.plan(
        config.load(None, ["--scaling.target.workers=2", "--scaling.target.cpus=1"], tree),
        assume=True,
    )
    estimate.dry_run(made_plan)
    assert "it does NOT fit: placing target: 2 workers take 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--proxy.max_length=257"], "proxy.max_length = 257 tokens, but its table of positions"),
        (
            ["--target.max_length=250", "--evaluation.max_new_tokens=7"],
            "target.max_length [+] evaluation.max_new_tokens = 257 tokens",
        ),
        (["--proxy.model.config.n_head=5"], "building the model"),
        (["--target.tokenizer=not/at/hand"], None),
        (["--proxy.model={hub: org/not-here}"], None),
    ],
)
def test_a_dry_run_looks_at_the_models_that_are_at_hand(
    overrides: list[str], said: str | None, tmp_path: Path
) -> None:
    model = {"config": GPT2}
    tree = tiny.job(tmp_path, proxy={"model": model}, target={"model": model})
    made_plan = pipeline.plan(config.load(None, overrides, tree), assume=True)
    if said is None:
        estimate.dry_run(made_plan)
        return
    with pytest.raises(UserError, match=said):
        estimate.dry_run(made_plan)
