"""Names of artifacts: what changes them, what does not, what variants share, and what is refused
before Ray starts.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s2l_ray import config, pipeline
from s2l_ray.core.data import catalog
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from s2l_ray.pipeline import execution, planning
from s2l_ray.stages import STAGES
from tests import tiny
from tests.committed import commit

EXAMPLES = ["examples"]
BEFORE_CLUSTERS = [*EXAMPLES, "proxy", "trajectories"]
BEFORE_SUBSET = [*BEFORE_CLUSTERS, "clusters"]
BEFORE_TARGET = [*BEFORE_SUBSET, "subset"]
BEFORE_EVALUATION = [*BEFORE_TARGET, "target"]
BEFORE_REPORT = [*BEFORE_EVALUATION, "evaluation"]
ALL = [*BEFORE_REPORT, "report"]

Names = dict[str, str]
Tiny = Callable[..., Names]


def names_of(plan: pipeline.Plan, variant: str = "s2l") -> Names:
    return {stage: node.artifact.fingerprint for stage, node in plan.of(variant).items()}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return tiny.job(tmp_path)


@pytest.fixture
def named(tree: dict[str, Any]) -> Tiny:
    """Artifact names of the tiny job under overrides."""
    return lambda *overrides, **options: names_of(
        pipeline.plan(config.load(None, list(overrides), tree), **options)
    )


def same(a: Names, b: Names) -> list[str]:
    assert a.keys() == b.keys()
    return [stage for stage in a if a[stage] == b[stage]]


def test_the_stages_of_the_design_in_their_order(named: Tiny) -> None:
    assert list(pipeline.NAMES) == ALL
    assert list(named()) == ALL
    assert len(set(named().values())) == len(ALL)


def test_the_same_job_has_the_same_names(named: Tiny) -> None:
    assert named() == named()


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("--examples.rows_per_part=63", []),
        ("--examples.on_bad_row=reject", []),
        ("--examples.columns.source=source", []),
        ("--examples.ignore=[note]", []),
        ("--proxy.seed=1", EXAMPLES),
        ("--proxy.learning_rate=1e-3", EXAMPLES),
        ("--proxy.checkpoints=4", EXAMPLES),
        ("--proxy.model.config.hidden_size=64", EXAMPLES),
        ("--proxy.deepspeed=zero2", EXAMPLES),
        ("--target.adapter={rank: 4}", BEFORE_TARGET),
        ("--proxy.prompt=alpaca", EXAMPLES),
        ("--proxy.learn=last", EXAMPLES),
        ("--proxy.truncation=left", EXAMPLES),
        ("--proxy.members=[{}, {seed: 1}]", EXAMPLES),
        ("--trajectories.dtype=bf16", [*EXAMPLES, "proxy"]),
        ("--trajectories.tokens_per_batch=4096", [*EXAMPLES, "proxy"]),
        ("--trajectories.sample=0.9", [*EXAMPLES, "proxy"]),
        ("--trajectories.seed=1", [*EXAMPLES, "proxy"]),
        ("--clusters.k=6", BEFORE_CLUSTERS),
        ("--clusters.seed=1", BEFORE_CLUSTERS),
        ("--subset.budget=61", BEFORE_SUBSET),
        ("--subset.budget=0.2", BEFORE_SUBSET),
        ("--subset.seed=1", BEFORE_SUBSET),
        ("--subset.rows_per_file=26", BEFORE_SUBSET),
        ("--target.seed=1", BEFORE_TARGET),
        ("--target.steps=7", BEFORE_TARGET),
        ("--target.model.config.hidden_size=64", BEFORE_TARGET),
        ("--evaluation.max_new_tokens=9", BEFORE_EVALUATION),
        ("--evaluation.rows_per_part=9", BEFORE_EVALUATION),
        ("--report.sample_rows=4", BEFORE_REPORT),
        ("--run.name=other", BEFORE_REPORT),
    ],
)
def test_a_changed_field_renames_its_artifact_and_all_after_it(
    named: Tiny, override: str, kept: list[str]
) -> None:
    assert same(named(), named(override)) == kept


@pytest.mark.parametrize(
    "override",
    [
        "--scaling.proxy.workers=2",
        "--scaling.proxy.micro_batch=4",
        "--scaling.target.activation_checkpointing=true",
        "--scaling.target.attention=eager",
        "--scaling.target.workers=2",
        "--scaling.proxy.threads=2",
        "--scaling.trajectories.workers=7",
        "--scaling.clusters.workers=5",
        "--scaling.target.gpus=1",
        "--scaling.max_failures=0",
        "--proxy.state_every=7",
        "--target.state_every=7",
        "--proxy.model.parameters=70_000_000",
        "--examples.expected_rows=5",
        "--examples.expected_tokens_per_row=50",
        "--proxy.learning_rate=0.003",
        "--proxy.members=[{}]",
    ],
)
def test_how_and_where_it_runs_renames_nothing(named: Tiny, override: str) -> None:
    assert same(named(), named(override)) == ALL


def test_another_storage_or_another_place_of_the_files_renames_nothing(
    tree: dict[str, Any], named: Tiny, tmp_path: Path
) -> None:
    before = named()
    shutil.copytree(tmp_path / "raw", tmp_path / "moved" / "elsewhere")
    moved = f"--examples.files={tmp_path}/moved/elsewhere"
    assert named(moved) == before
    assert named(moved, f"--run.storage={tmp_path}/second") == before
    assert named(f"--examples.files=[{tmp_path}/raw/b.jsonl, {tmp_path}/raw/a.jsonl]") == before
    assert same(before, named(moved, f"--examples.root={tmp_path}/moved")) == []


@pytest.mark.parametrize("change", ["content", "added", "removed", "renamed"])
def test_a_change_of_the_raw_files_renames_everything(
    named: Tiny, tmp_path: Path, change: str
) -> None:
    before = named()
    path = tmp_path / "raw" / "a.jsonl"
    data = path.read_bytes()
    if change == "content":
        path.write_bytes(data.replace(b"row-7", b"row-x"))
    elif change == "added":
        (tmp_path / "raw" / "c.jsonl").write_bytes(data)
    elif change == "removed":
        (tmp_path / "raw" / "b.jsonl").unlink()
    else:
        path.rename(path.with_name("A.jsonl"))
    assert same(before, named()) == []


def test_a_touched_file_renames_nothing(named: Tiny, tmp_path: Path) -> None:
    before = named()
    os.utime(tmp_path / "raw" / "a.jsonl", (1, 1))
    assert named() == before


def test_a_change_of_the_held_out_file_renames_the_evaluation(named: Tiny, tmp_path: Path) -> None:
    before = named()
    tiny.write_jsonl(tmp_path / "heldout" / "h.jsonl", tiny.rows(30, seed=2))
    assert same(before, named()) == BEFORE_EVALUATION


def test_a_change_of_a_stages_version_renames_it_and_all_after_it(
    named: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = named()
    newer = tuple(dataclasses.replace(s, version=99) if s.name == "clusters" else s for s in STAGES)
    monkeypatch.setattr(planning, "STAGES", newer)
    assert same(before, named()) == BEFORE_CLUSTERS


def test_a_model_folder_is_known_by_its_files(
    tree: dict[str, Any], named: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "pytorch_model.bin",
    ):
        (folder / name).write_text(name)
    override = f"--target.model={{path: {folder}}}"
    before = named(override)
    (folder / "README.md").write_text("other words")
    (folder / "pytorch_model.bin").write_text("never read")
    assert named(override) == before
    moved = shutil.copytree(folder, tmp_path / "model2")
    assert named(f"--target.model={{path: {moved}}}") == before
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("other")
        after = named(override)
        assert same(before, after) == BEFORE_TARGET
        before = after
    with pytest.raises(UserError, match="there is no such folder"):
        named("--target.model={path: absent}")


def test_a_template_is_known_by_its_content(named: Tiny, tmp_path: Path) -> None:
    one, moved, other = (tmp_path / name for name in ("one.jinja", "moved.jinja", "other.jinja"))
    one.write_text("{{ messages }}")
    moved.write_text("{{ messages }}")
    other.write_text("{{ messages }}!")
    chat = "--proxy.prompt=chat"
    own, by_one, by_moved, by_other = (
        named(chat, *(f"--proxy.template={path}" for path in paths))
        for paths in ([], [one], [moved], [other])
    )
    assert by_one == by_moved
    assert same(by_one, by_other) == same(by_one, own) == EXAMPLES
    with pytest.raises(UserError, match=r"reading the chat template .*gone\.jinja"):
        named(chat, f"--proxy.template={tmp_path / 'gone.jinja'}")


def test_variants_share_what_they_have_in_common(tree: dict[str, Any]) -> None:
    variants = {
        "full": {"subset.rule": "random", "subset.budget": 300},
        "random": {"subset.rule": "random"},
        "s2l": {},
        "k7": {"clusters.k": 7},
        "again": {},
    }
    plan = pipeline.plan(config.load(None, [], {**tree, "variants": variants}))
    counts = {
        stage: [node.variants for node in plan.nodes if node.stage.name == stage] for stage in ALL
    }
    assert (
        counts["examples"]
        == counts["proxy"]
        == counts["trajectories"]
        == counts["report"]
        == [list(variants)]
    )
    assert counts["clusters"] == [["s2l", "again"], ["k7"]]
    for stage in ("subset", "target", "evaluation"):
        assert counts[stage] == [["full"], ["random"], ["s2l", "again"], ["k7"]]
    assert "clusters" not in plan.of("random")
    assert plan.of("s2l")["subset"] is plan.of("again")["subset"]
    order = [ALL.index(node.stage.name) for node in plan.nodes]
    assert order == sorted(order)
    alone = pipeline.plan(config.load(None, [], tree))
    assert {**names_of(plan, "s2l"), "report": ""} == {**names_of(alone), "report": ""}


def test_k_does_not_matter_to_a_rule_without_clusters(named: Tiny) -> None:
    random = named("--subset.rule=random")
    assert "clusters" not in random
    assert same(random, named("--subset.rule=random", "--clusters.k=9")) == list(random)
    assert same(random, named("--subset.rule=source_balanced")) == BEFORE_CLUSTERS


@pytest.mark.parametrize(("target_workers", "proxy", "target"), [(1, 2, 2), (2, 1, 2)])
def test_trainings_of_equally_many_workers_have_equal_shares(
    tree: dict[str, Any], target_workers: int, proxy: int, target: int
) -> None:
    """So that the target can be trained by the workers of the proxy, beside which nothing is
    trained.
    """
    tree["variants"] = {
        "few": {"subset.budget": 5},
        "more": {"subset.budget": 6},
        "many": {"subset.budget": 7},
    }
    tree["scaling"]["side_by_side"] = 2
    for stage, workers in (("proxy", 1), ("target", target_workers)):
        tree["scaling"][stage] = {"workers": workers, "micro_batch": 8}
    nodes = pipeline.plan(config.load(None, [], tree)).nodes
    execution.share(nodes)
    shares = {(node.stage.name, node.at_once) for node in nodes if node.request.kind == "workers"}
    assert shares == {("proxy", proxy), ("target", target)}


@pytest.mark.parametrize("until", ALL)
def test_until_ends_the_plan_at_a_stage(named: Tiny, until: str) -> None:
    whole, part = named(), named(until=until)
    assert list(part) == ALL[: ALL.index(until) + 1]
    assert part.items() <= whole.items()


def test_sections_that_are_left_out_end_the_plan(tmp_path: Path) -> None:
    plan = pipeline.plan(config.load(None, [], tiny.job(tmp_path, target=None, evaluation=None)))
    assert list(names_of(plan)) == [*BEFORE_TARGET, "report"]


def test_parts_are_fixed_ranges_of_rows_of_one_file(tree: dict[str, Any]) -> None:
    plan = pipeline.plan(config.load(None, [], tree))
    ranges = plan.of("s2l")["examples"].ranges
    assert [(p.index, p.file.name, p.file_number, p.first_row, p.rows) for p in ranges] == [
        (0, "a.jsonl", 0, 0, 64), (1, "a.jsonl", 0, 64, 64), (2, "a.jsonl", 0, 128, 22),
        (3, "b.jsonl", 1, 0, 64), (4, "b.jsonl", 1, 64, 64), (5, "b.jsonl", 1, 128, 22),
    ]  # fmt: skip
    assert plan.facts["s2l"].rows == 300
    assert sum(p.rows for p in plan.of("s2l")["evaluation"].ranges) == 30


def test_a_file_is_read_once_and_remembered_until_it_changes(
    tree: dict[str, Any], named: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    index_file = catalog.index_file
    monkeypatch.setattr(
        catalog, "index_file", lambda file, rows: read.append(file.name) or index_file(file, rows)
    )
    first = named()
    assert sorted(read) == ["a.jsonl", "b.jsonl", "h.jsonl"]
    assert named() == first
    assert len(read) == 3
    os.utime(tmp_path / "raw" / "b.jsonl", (1, 1))
    assert named() == first
    assert read[3:] == ["b.jsonl"]
    for name in Store(tree["run"]["storage"]).list("index"):
        (tmp_path / "storage" / "index" / name).write_bytes(b"{}")
    assert named() == first
    assert len(read) == 7


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--subset.budget=301"], r"subset.budget asks for 301 rows, but only 300"),
        (
            ["--clusters.k=301"],
            r"clusters.k = 301, but only 300 of 300 rows are scored. Lower clusters.k",
        ),
        (["--examples.files=absent"], r"looking for examples.files: absent matches no"),
        (["--evaluation.files=absent"], r"looking for evaluation.files: absent matches no"),
    ],
)
def test_what_cannot_work_is_refused_while_planning(
    named: Tiny, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        named(*overrides)


def test_the_limits_themselves_are_allowed(named: Tiny) -> None:
    assert named("--subset.budget=300", "--clusters.k=300")
    assert named("--subset.rule=random", "--clusters.k=301")


def test_an_unknown_stage_is_refused(named: Tiny) -> None:
    with pytest.raises(UserError, match=r"--until expects one of examples, .* got 'cluster'"):
        named(until="cluster")


def test_a_dry_run_may_assume_what_is_not_at_hand(tree: dict[str, Any]) -> None:
    tree["examples"] = {"files": ["absent.jsonl"], "expected_rows": 1000}
    tree["evaluation"] = {"files": ["absent_too.jsonl"]}
    tree["proxy"]["model"] = {"path": "absent_model", "parameters": 7}
    job = config.load(None, [], tree)
    with pytest.raises(UserError, match=r"absent.jsonl matches no"):
        pipeline.plan(job)
    plan = pipeline.plan(job, assume=True)
    assert plan.facts["s2l"].rows == 1000
    assert list(names_of(plan)) == ALL


def test_names_are_made_of_plain_json(tree: dict[str, Any]) -> None:
    for node in pipeline.plan(config.load(None, [], tree)).nodes:
        assert json.loads(json.dumps(node.section)) == node.section
        assert node.artifact.committed() is None


def committed(tmp_path: Path, stage: str, **fields: Any) -> Artifact:
    """An artifact of another storage, as far as the plan looks at it."""
    artifact = Artifact(Store(str(tmp_path / "elsewhere")), stage, "0123456789abcdef01234567")
    commit(artifact, **fields)
    return artifact


def proxy_of(job: config.Job) -> dict[str, Any]:
    return pipeline.plan(job, until="proxy").of("s2l")["proxy"].section


def test_a_used_proxy_stands_in_the_plan_and_names_what_is_made_with_it(
    tree: dict[str, Any], named: Tiny, tmp_path: Path
) -> None:
    used = committed(tmp_path, "proxy", section=proxy_of(config.load(None, [], tree)))
    with_use = named(f"--proxy.use={used.uri}")
    assert with_use["proxy"] == used.fingerprint
    assert same(named(), with_use) == EXAMPLES
    moved = shutil.copytree(tmp_path / "elsewhere", tmp_path / "moved")
    assert same(with_use, named(f"--proxy.use={moved}/proxy/{used.fingerprint}")) == ALL
    # how it was trained does not matter any more, and need not be given
    del tree["proxy"]["epochs"]
    assert same(with_use, named(f"--proxy.use={used.uri}", "--proxy.global_batch=7")) == ALL


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--proxy.max_length=63", "max_length = 64"),
        ("--proxy.prompt=alpaca", "prompt = plain"),
        ("--proxy.learn=last", "learn = all"),
        ("--proxy.truncation=left", "truncation = right"),
        ("--proxy.model.config.hidden_size=64", "model = "),
        ("--proxy.members=[{}, {seed: 1}]", "an artifact of 1 proxies"),
    ],
)
def test_a_used_proxy_must_read_rows_as_the_config_says(
    tree: dict[str, Any], named: Tiny, tmp_path: Path, override: str, said: str
) -> None:
    used = committed(tmp_path, "proxy", section=proxy_of(config.load(None, [], tree)))
    with pytest.raises(UserError, match=re.escape(said)):
        named(f"--proxy.use={used.uri}", override)


def test_used_clusters_are_an_input(named: Tiny, tmp_path: Path) -> None:
    used = committed(tmp_path, "clusters")
    kept, refined = (
        named(f"--clusters.use={used.uri}", f"--clusters.refine={refine}")
        for refine in ("false", "true")
    )
    assert same(named(), kept) == BEFORE_CLUSTERS
    assert same(kept, refined) == BEFORE_CLUSTERS


@pytest.mark.parametrize("field", ["proxy.use", "clusters.use"])
def test_what_is_used_must_be_there(named: Tiny, tmp_path: Path, field: str) -> None:
    stage = field.split(".")[0]
    with pytest.raises(UserError, match=f"{field}: there is no manifest.json"):
        named(f"--{field}={tmp_path}/nowhere/{stage}/x")
