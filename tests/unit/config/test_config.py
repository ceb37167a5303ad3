"""What a job file and a command line may say, and how mistakes are named."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from s2l_ray import config
from s2l_ray.config.section import merge
from s2l_ray.core.selection.quotas import budget_rows
from s2l_ray.errors import UserError

MODEL = {"config": {"model_type": "llama", "hidden_size": 8}}


def base(**sections: Any) -> dict[str, Any]:
    training = {"model": MODEL, "tokenizer": "bytes", "epochs": 1}
    return {
        "examples": {"files": "rows.jsonl"},
        "proxy": dict(training),
        "target": dict(training),
        **sections,
    }


def load(*overrides: str, **sections: Any) -> config.Config:
    return config.load(None, list(overrides), base(**sections)).first


def refusal(*overrides: str, **sections: Any) -> str:
    with pytest.raises(UserError) as error:
        load(*overrides, **sections)
    return str(error.value)


def test_defaults_are_filled_in_and_one_file_may_be_a_bare_string() -> None:
    made = load()
    assert made.examples.files == ["rows.jsonl"]
    assert made.proxy.checkpoints == 12
    assert made.subset.budget == 0.11
    assert made.target is not None
    assert made.evaluation is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--clusters.kk=5", ["clusters.kk: unknown key", "Did you mean k?"]),
        (
            "--proxy.learning_rat=1",
            ["proxy.learning_rat: unknown key", "Did you mean learning_rate?"],
        ),
        ("--cluster.k=5", ["cluster: unknown key", "Did you mean clusters?"]),
        ("--varients.a=5", ["varients: unknown key", "Did you mean variants?"]),
        (
            "--examples.columns.output_text=a",
            ["examples.columns.output_text: unknown key", "Did you mean output?"],
        ),
        ("--target.model.pth=a", ["target.model.pth: unknown key", "Did you mean path?"]),
        ("--proxy.checkpoint=3", ["proxy.checkpoint: unknown key", "Did you mean checkpoints?"]),
        ("--target.checkpoints=3", ["target.checkpoints: unknown key"]),
        (
            "--clusters.zzzzzz=3",
            ["clusters.zzzzzz: unknown key. Known here: features, initial, k, max_rounds"],
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override: str, said: list[str]) -> None:
    message = refusal(override)
    assert all(text in message for text in said), message


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("--clusters.k=many", "clusters.k"),
        ("--clusters.k=true", "clusters.k"),
        ("--clusters.k=2.5", "clusters.k"),
        ("--clusters.k='5'", "clusters.k"),
        ("--clusters.k=null", "clusters.k"),
        ("--clusters.k=0", "clusters.k"),
        ("--clusters.k=[5]", "clusters.k"),
        ("--proxy.learning_rate=fast", "proxy.learning_rate"),
        ("--proxy.learning_rate=0", "proxy.learning_rate"),
        ("--proxy.learning_rate=.nan", "proxy.learning_rate"),
        ("--proxy.learning_rate=.inf", "proxy.learning_rate"),
        ("--proxy.dtype=fp16", "proxy.dtype"),
        ("--target.state_dtype=fp16", "target.state_dtype"),
        ("--proxy.warmup_ratio=1", "proxy.warmup_ratio"),
        ("--target.deepspeed=zero4", "target.deepspeed"),
        ("--subset.rule=best", "subset.rule"),
        ("--examples.files={a: b}", "examples.files"),
        ("--examples.files=[1]", "examples.files.0"),
        ("--examples.rows_per_part=65537", "examples.rows_per_part"),
        ("--trajectories.sample=0", "trajectories.sample"),
        ("--run.name=../x", "run.name"),
        ("--run.storage=5", "run.storage"),
        ("--scaling.target.gpus=-1", "scaling.target.gpus"),
        ("--scaling.target.gpus=0.5", "scaling.target.gpus"),
        ("--scaling.proxy.gpus=1.5", "scaling.proxy.gpus"),
        ("--scaling.target.gpus=2", "scaling.target.gpus"),
        ("--scaling.target.labels={pool: 1}", "scaling.target.labels.pool"),
    ],
)
def test_a_wrong_type_or_range_is_named_with_its_field(override: str, field: str) -> None:
    message = refusal(override)
    assert f"  - {field}: " in message
    assert "1 problem(s)" in message


@pytest.mark.parametrize(
    "budget", [0, -1, 0.0, -0.5, 1.5, True, False, "abc", "0.5", None, [1], float("nan")]
)
def test_a_budget_is_a_count_or_a_share_and_nothing_else(budget: object) -> None:
    message = refusal(subset={"budget": budget})
    assert "1 problem(s)" in message
    assert "subset.budget: expected a count (an integer from 1) or a share" in message
    assert message.endswith(f"got {budget!r}")


@pytest.mark.parametrize(
    ("budget", "rows"), [(1, 1), (7, 7), (1.0, 10), (0.5, 5), (0.11, 1), (0.01, 1)]
)
def test_a_whole_number_is_a_count_and_a_decimal_one_a_share(budget: float, rows: int) -> None:
    chosen = load(subset={"budget": budget}).subset.budget
    assert type(chosen) is type(budget)
    assert budget_rows(chosen, 10) == rows


def test_a_budget_above_the_data_says_how_many_there_are() -> None:
    with pytest.raises(UserError, match=r"11 rows, but only 10 .* Lower the budget"):
        budget_rows(11, 10)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["--scaling.proxy.workers=3"],
            "proxy.global_batch: expected a multiple of scaling.proxy.workers x",
        ),
        (
            ["--target.global_batch=6"],
            "target.global_batch: expected a multiple of scaling.target.workers x",
        ),
        (
            ["--proxy.epochs=null", "--proxy.steps=5", "--proxy.checkpoints=12"],
            "proxy.checkpoints: expected at most proxy.steps = 5, got 12",
        ),
        (
            ["--proxy.steps=50"],
            "proxy: expected exactly one of epochs and steps; got epochs=1, steps=50",
        ),
        (
            ["--proxy.schedule=constant", "--proxy.warmup_ratio=0.1"],
            "schedule: constant has no warm-up, but warmup_ratio is 0.1. Set schedule: "
            "constant_with_warmup",
        ),
        (
            ["--proxy.epochs=null"],
            "proxy: expected exactly one of epochs and steps; got epochs=None",
        ),
        (["--target.tokenizer=null"], "target: model.config has no tokenizer of its own"),
        (["--examples.files=[]"], "examples.files: expected at least one file"),
        (["--examples.dataset=a/b"], "examples: expected either files or dataset; got both"),
        (["--examples.dataset_config=main"], "examples: dataset_config is only used with dataset"),
        (
            ["--examples.columns={messages: m, output: o}"],
            "examples.columns: expected either messages or instruction and output; "
            "got messages and ['output']",
        ),
        (
            ["--evaluation.max_new_tokens=3"],
            "evaluation.files: expected at least one held-out file",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused(overrides: list[str], said: str) -> None:
    assert said in refusal(*overrides)


@pytest.mark.parametrize(
    "model", [{}, {"parameters": 5}, {**MODEL, "path": "folder"}, {"path": "folder", "hub": "a/b"}]
)
def test_a_model_is_of_exactly_one_kind(model: dict[str, Any]) -> None:
    message = refusal(proxy={"model": model, "tokenizer": "bytes", "epochs": 1})
    assert "proxy.model: expected exactly one of path, hub, config" in message


def test_a_model_config_needs_its_type() -> None:
    training = {"model": {"config": {"hidden_size": 8}}, "tokenizer": "bytes", "epochs": 1}
    assert "proxy.model: config needs a model_type" in refusal(proxy=training)


def test_evaluation_needs_a_target() -> None:
    tree = base(evaluation={"files": ["h.jsonl"]})
    tree.pop("target")
    with pytest.raises(UserError, match="evaluation: there is no target section"):
        config.load(None, [], tree)


def test_all_problems_come_in_one_message() -> None:
    message = refusal(
        "--clusters.k=0", "--clusters.kk=1", "--subset.budget=0", "--proxy.dtype=fp64"
    )
    assert "4 problem(s)" in message
    assert [
        message.count(f"  - {field}: ")
        for field in ("clusters.k", "clusters.kk", "subset.budget", "proxy.dtype")
    ] == [1] * 4
    together = refusal(
        "--scaling.proxy.workers=3", "--target.global_batch=7", "--examples.files=[]"
    )
    assert "3 problem(s)" in together


def test_overrides_are_yaml() -> None:
    made = load(
        "--proxy.learning_rate=1e-3",
        "--target.adam_epsilon=1.5E-7",
        "--proxy.model.config.initializer_range=2e-2",
        "--examples.files=[a.jsonl, 'b c.parquet']",
        "--proxy.epochs=null",
        "--proxy.steps=24",
        "--subset.budget=.5",
        "--trajectories.statistics=[el2n, grand]",
        "--target.model={path: folder}",
        "--run.storage=s3://bucket/x?region=eu&scheme=http",
    )
    assert made.proxy.learning_rate == 0.001
    assert made.proxy.model.config == {
        "model_type": "llama",
        "hidden_size": 8,
        "initializer_range": 0.02,
    }
    assert made.examples.files == ["a.jsonl", "b c.parquet"]
    assert (made.proxy.epochs, made.proxy.steps) == (None, 24)
    assert made.subset.budget == 0.5
    assert made.trajectories.statistics == ["el2n", "grand"]
    assert made.target is not None
    assert made.target.adam_epsilon == 1.5e-7
    assert (made.target.model.path, made.target.model.config) == ("folder", None)
    assert made.run.storage == "s3://bucket/x?region=eu&scheme=http"


def test_a_later_override_wins() -> None:
    assert load("--clusters.k=5", "--clusters.k=6").clusters.k == 6


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("clusters.k", "expected --section.field=value, got 'clusters.k'"),
        ("--verbose=1", "expected --section.field=value, got '--verbose=1'"),
        ("stray", "expected --section.field=value"),
        ("--clusters.k=[1", "is not YAML. Put it in quotes"),
        ("--variants.other.clusters.k=1", "NAME one of ['s2l']"),
        ("--variants.s2l=1", "expected variants.NAME.section.field"),
    ],
)
def test_an_override_that_cannot_be_read_is_shown(override: str, said: str) -> None:
    assert said in refusal(override)


def test_variants_are_the_job_with_their_own_overrides() -> None:
    tree = base(
        variants={
            "s2l": None,
            "random": {"subset.rule": "random"},
            "nested": {"subset": {"seed": 4, "rule": "random"}},
        }
    )
    job = config.load(None, ["--clusters.k=7", "--variants.random.subset.seed=9"], tree)
    assert list(job.variants) == ["s2l", "random", "nested"]
    assert job.first is job.variants["s2l"]
    assert [made.clusters.k for made in job.variants.values()] == [7, 7, 7]
    assert [(made.subset.rule, made.subset.seed) for made in job.variants.values()] == [
        ("s2l", 0),
        ("random", 9),
        ("random", 4),
    ]
    assert config.load(None, [], base()).variants.keys() == {"s2l"}


def test_the_command_line_changes_what_a_variant_sets_itself_only_by_its_name() -> None:
    tree = base(variants={"a": {"clusters.k": 3}, "b": {}})
    for overrides, expected in (
        (["--clusters.k=9"], [3, 9]),
        (["--variants.a.clusters.k=4"], [4, 100]),
        (["--variants.a.clusters.k=4", "--clusters.k=9"], [4, 9]),
    ):
        job = config.load(None, overrides, tree)
        assert [made.clusters.k for made in job.variants.values()] == expected


@pytest.mark.parametrize("change", [{"scaling.clusters.workers": 3}, {"run.name": "other"}])
def test_variants_share_run_and_scaling(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="variants must not change run or scaling"):
        config.load(None, [], base(variants={"a": {}, "b": change}))


@pytest.mark.parametrize("name", ["rule/random", "/", "", "..", "a\x1b[31m", "a\nb"])
def test_variants_have_names_that_folders_can_have(name: str) -> None:
    with pytest.raises(UserError, match="names of variants that can be names of folders"):
        config.load(None, [], base(variants={name: {}}))
    assert list(config.load(None, [], base(variants={"[link=a]": {}})).variants) == ["[link=a]"]


@pytest.mark.parametrize("variants", [["a"], {"a": "subset.rule"}, {"a": [1]}, "a"])
def test_variants_that_are_no_mapping_are_refused(variants: object) -> None:
    with pytest.raises(UserError, match="expected variants to map each name to overrides"):
        config.load(None, [], base(variants=variants))


def test_a_problem_of_all_variants_is_told_once_and_one_of_a_variant_too() -> None:
    tree = base(variants={"a": {}, "b": {"subset.budget": 0}})
    with pytest.raises(UserError, match=r"2 problem\(s\)"):
        config.load(None, ["--clusters.k=0"], tree)


def test_members_take_the_sections_values_and_their_own() -> None:
    made = load(
        "--proxy.seed=3",
        "--proxy.members=[{}, {seed: 8}, {model: {path: folder}, tokenizer: null}, "
        "{steps: 40, epochs: null}]",
    )
    plain, seeded, other, counted = made.proxy.each()
    assert (plain.seed, seeded.seed, other.seed) == (3, 8, 3)
    assert plain.model.config == seeded.model.config == MODEL["config"]
    assert (other.model.path, other.model.config, other.tokenizer) == ("folder", None, None)
    assert (counted.steps, counted.epochs) == (40, None)
    assert all(not member.members for member in made.proxy.each())
    assert [member.seed for member in load("--proxy.seed=3").proxy.each()] == [3]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ("[{sed: 1}]", "Did you mean seed?"),
        ("[{seed: x}]", "valid integer, got 'x'"),
        ("[{seed: 100000000000000000000000}]", "less than 9223372036854775808"),
        ("[{members: []}]", "members[0] must not have members of its own"),
        ("[{steps: 5}]", "exactly one of epochs and steps"),
        ("[{steps: 5, epochs: null, checkpoints: 6}]", "expected at most proxy.steps = 5"),
        ("[{global_batch: 7}]", "proxy.global_batch: expected a multiple"),
        ("{seed: 1}", "valid list"),
    ],
)
def test_a_member_that_is_no_proxy_is_refused(members: str, said: str) -> None:
    assert said in refusal(f"--proxy.members={members}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "expected sections (a mapping), got list"),
        ("", "expected sections (a mapping), got NoneType"),
        ("just text", "expected sections (a mapping), got str"),
        ("a: [1\n", "Expected a YAML file that can be read"),
        ("proxy: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("clusters: {k: 5}\nproxy: {}\nclusters: {k: 6}\n", "the key 'clusters' stands twice"),
        ("a: " + "[" * 3_000 + "]" * 3_000, "at most 50 levels of nesting"),
        ("a: " + "{b: " * 3_000 + "}" * 3_000, "at most 50 levels of nesting"),
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
            "its anchors stand for more",
        ),
        ("a: &a [*a]\n", "its anchors stand for more"),
        ("clusters: {k: " + "9" * 5_000 + "}", "Expected a YAML file that can be read"),
    ],
)
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(str(path), [])
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}")
    for name in ("absent.yaml", "latin.yaml", "."):
        with pytest.raises(UserError, match="reading the job file"):
            config.load(str(tmp_path / name), [])


def test_a_job_file_means_what_the_same_mapping_means(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "common: &common {model: {config: {model_type: llama, hidden_size: 8}}, "
        "tokenizer: bytes, epochs: 1}\n"
        "examples: {files: rows.jsonl}\n"
        "proxy: {<<: *common, learning_rate: 2e-5}\n"
        "target: *common\n"
    )
    with pytest.raises(UserError, match="common: unknown key"):
        config.load(str(path), [])
    path.write_text(
        path.read_text()
        .replace("common: &common", "proxy: &common")
        .replace("proxy: {<<", "target: {<<")
        .replace("target: *common\n", "")
    )
    assert config.load(str(path), []).first == load()


def test_nothing_can_be_changed_after_loading() -> None:
    made = load()
    with pytest.raises(ValueError, match="frozen"):
        made.clusters.k = 3  # type: ignore[misc]


def fields(section: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, info in section.model_fields.items():
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found.update(
            fields(inner[0], f"{prefix}{name}.") if inner else {f"{prefix}{name}": info.description}
        )
    return found


def test_help_explains_every_field_with_its_default() -> None:
    text = config.describe()
    lines = text.splitlines()
    every = fields(config.Config)
    assert len(every) > 80
    for name, description in every.items():
        assert description, name
        places = [number for number, line in enumerate(lines) if line.startswith(f"  {name} = ")]
        assert len(places) == 1, name
        assert lines[places[0] + 1].strip() == description
    assert "  clusters.k = 100\n" in text
    assert "  proxy.prompt = 'alpaca'  (one of: alpaca, plain, chat)\n" in text
    assert "  proxy.checkpoints = 12\n" in text
    assert "  examples.files = []\n" in text


def test_help_of_some_fields_is_theirs_alone() -> None:
    text = config.describe(["clusters.k", "run.storage"])
    assert [line.split()[0] for line in text.splitlines()[::2]] == ["run.storage", "clusters.k"]


@pytest.mark.parametrize(
    ("budget", "eligible", "rows"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.58, 100, 58), (0.001, 10, 1), (1.0, 7, 7), (5, 7, 5)],
)
def test_a_share_of_the_rows_is_that_of_its_digits(budget: float, eligible: int, rows: int) -> None:
    assert budget_rows(budget, eligible) == rows


def test_a_statistic_is_stored_once() -> None:
    message = refusal("--trajectories.statistics=[el2n, grand, el2n]")
    assert (
        "trajectories.statistics: expected every statistic once, got el2n twice or more" in message
    )
    assert "trajectories.statistics.0" in refusal("--trajectories.statistics=[perplexity]")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--clusters.steps=[]"], "clusters: steps: expected distinct step numbers from 0, got []"),
        (["--clusters.steps=[5, 5]"], "distinct step numbers from 0, got [5, 5]"),
        (["--clusters.steps=[-1]"], "distinct step numbers from 0, got [-1]"),
        (
            ["--clusters.steps=0"],
            "steps: expected at least 1 with features: raw and initial: false, got 0",
        ),
        (
            ["--clusters.steps=1", "--clusters.features=zscored"],
            "at least 2 with features: zscored",
        ),
        (
            ["--clusters.steps=1", "--clusters.initial=true"],
            "at least 2 with features: raw and initial: true",
        ),
        (["--clusters.steps=13"], "clusters.steps: expected at most 12, the steps of every proxy"),
        (["--clusters.steps=14", "--clusters.initial=true"], "clusters.steps: expected at most 13"),
        (
            ["--clusters.weights=[1, -1]"],
            "weights: expected numbers from 0, not all of them 0, got [1.0, -1.0]",
        ),
        (["--clusters.weights=[0, 0]"], "not all of them 0"),
        (["--clusters.weights=[]"], "not all of them 0, got []"),
        (
            ["--clusters.weights=[1, 2]"],
            "clusters.weights: expected 12 numbers, one for every step",
        ),
        (
            ["--clusters.steps=3", "--clusters.weights=[1, 2]"],
            "clusters.weights: expected 3 numbers",
        ),
        (["--clusters.refine=true"], "refine: expected clusters.use"),
    ],
)
def test_clusters_that_cannot_be_made_are_refused(overrides: list[str], said: str) -> None:
    assert said in refusal(*overrides)


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({}, 12 + 4),
        ({"initial": True}, 13 + 5),
        ({"steps": 3}, 6),
        ({"steps": 3, "initial": True}, 6),
        ({"steps": [5, 10], "initial": True}, 6),
        ({"steps": [0, 5, 10], "features": "differences"}, 4),
        ({"features": "differences"}, 11 + 3),
    ],
)
def test_the_number_of_feature_columns_is_that_of_the_features(
    fields: dict[str, Any], columns: int
) -> None:
    from s2l_ray.core.kmeans.features import feature_steps

    section = config.Clusters.model_validate(fields)
    stored = [[0, 5 * step] for step in range(13)] + [[1, 5 * step] for step in range(5)]
    assert section.num_features([12, 4]) == columns == len(feature_steps(stored, section))


def test_a_config_of_another_family_replaces_the_whole_config() -> None:
    old = {"model": {"config": {"model_type": "llama", "hidden_size": 8, "num_key_value_heads": 2}}}
    other = {"model": {"config": {"model_type": "gpt_neox", "hidden_size": 16}}}
    assert merge(old, other) == other
    wider = merge(old, {"model": {"config": {"hidden_size": 16}}})
    assert wider["model"]["config"] == {**old["model"]["config"], "hidden_size": 16}


def test_evaluation_names_its_scores_once_and_writes_programs() -> None:
    def refused(**section: Any) -> str:
        return refusal(evaluation={"files": ["h.jsonl"], **section})

    assert "answers: hybrid needs max_new_tokens above 0" in refused(
        answers="hybrid", max_new_tokens=0
    )
    assert "bert_score and bert_model belong together" in refused(scores=["bert_score"])
    assert "scores: each is named once" in refused(scores=["exact", "exact"])
    assert "evaluation.scores.0" in refused(scores=["exactly"])
    assert "evaluation.sets.mine" in refused(sets={"mine": "gsm"})
