"""Wrong models, tokenizers, storages, rules and bases: one error that names the thing and the
remedy, before Ray, and nothing made.

Bad raw files are in test_bad_files.py, wrong types in test_config.py; what only shows in the data,
in integration/test_bad_data.py.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from s2l_ray import config, pipeline, run
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import ExamplesInfo, NumberedFile
from s2l_ray.core.storage.store import Store
from s2l_ray.core.text.byte_tokenizer import byte_tokenizer
from s2l_ray.pipeline import execution
from tests import tiny
from tests.committed import commit, info_with, manifest

Job = dict[str, Any]


class Case:
    """A tiny job whose proxy is a model folder, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.storage = folder, folder / "model", folder / "storage"
        self.job = tiny.job(folder, count=40, subset={"budget": 10}, target=None, evaluation=None)
        self.job["proxy"] = {
            **self.job["proxy"],
            "model": {"path": str(self.model)},
            "checkpoints": 2,
        }
        del self.job["proxy"]["tokenizer"]
        self.arguments: list[str] = []

    def plan(self) -> pipeline.Plan:
        return pipeline.plan(config.load(None, [], self.job))

    def commit(self, stage: str, **fields: Any) -> Artifact:
        """An artifact of another job in the same storage."""
        artifact = Artifact(Store(str(self.storage)), stage, "0123456789abcdef01234567")
        commit(artifact, **fields)
        return artifact

    def commit_examples(self) -> Artifact:
        """What `examples` would record of the job's raw files."""
        node = self.plan().nodes[0]
        files = [
            NumberedFile(file.file_number, file.file.name, file.file.bytes, file.file.sha256)
            for file in {part.file_number: part for part in node.ranges}.values()
        ]
        info = info_with(ExamplesInfo, files=files, next_file_number=len(files))
        return self.commit("examples", section=node.section, info=info)

    def edit(self, name: str, **changes: Any) -> None:
        """Change fields of a JSON file of the model folder."""
        path = self.model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with its weights in shards."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    raw = dict(tiny.LLAMA)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw.pop("model_type"), **raw))
    model.save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def case(saved: Path, tmp_path: Path) -> Case:
    shutil.copytree(saved, tmp_path / "model")
    return Case(tmp_path)


# ---- models and tokenizers


def no_folder(case: Case) -> list[str]:
    shutil.rmtree(case.model)
    return ["model", "no such folder", "Correct model.path"]


def no_config(case: Case) -> list[str]:
    (case.model / "config.json").unlink()
    return ["no config.json", "Name a Hugging Face model folder"]


def config_is_no_json(case: Case) -> list[str]:
    (case.model / "config.json").write_text("{")
    return ["reading the config of", str(case.model), "Correct the section's model"]


def unknown_family(case: Case) -> list[str]:
    case.edit("config.json", model_type="no_such_family")
    return ["no_such_family", "Correct the section's model"]


def missing_shard(case: Case) -> list[str]:
    gone = sorted(case.model.glob("*.safetensors"))[1]
    gone.unlink()
    return [gone.name, "missing", "Complete the folder"]


def damaged_shard(case: Case) -> list[str]:
    shard = sorted(case.model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    return [shard.name, "damaged", "restore it"]


def weights_of_another_size(case: Case) -> list[str]:
    case.edit("config.json", intermediate_size=65)
    return ["65", "64", "correct its config.json"]


def pickled_weights(case: Case) -> list[str]:
    for path in case.model.glob("model*"):
        path.unlink()
    torch.save({"weight": torch.zeros(1)}, case.model / "pytorch_model.bin")
    return ["expected model.safetensors", "can run code", "convert the weights"]


def index_is_no_json(case: Case) -> list[str]:
    (case.model / "model.safetensors.index.json").write_text("{")
    return ["model.safetensors.index.json", "not JSON", "restore it"]


def no_tokenizer(case: Case) -> list[str]:
    for path in case.model.glob("tokenizer*"):
        path.unlink()
    return ["loading the tokenizer", str(case.model), "Correct the section's tokenizer"]


def tokenizer_is_damaged(case: Case) -> list[str]:
    path = case.model / "tokenizer.json"
    path.write_text(path.read_text()[:-100])
    return ["loading the tokenizer", str(case.model), "Correct the section's tokenizer"]


def no_end_token(case: Case) -> list[str]:
    case.edit("tokenizer_config.json", eos_token=None)
    return ["no end token", "Set eos_token"]


def no_chat_template(case: Case) -> list[str]:
    case.job["proxy"]["prompt"] = "chat"
    return ["no chat template", "`template`"]


def template_file_is_missing(case: Case) -> list[str]:
    case.job["proxy"] |= {"prompt": "chat", "template": str(case.folder / "absent.jinja")}
    return ["absent.jinja"]


def template_is_no_jinja(case: Case) -> list[str]:
    path = case.folder / "broken.jinja"
    path.write_text("{% for message in messages %}{{ message.content }}")
    case.job["proxy"] |= {"prompt": "chat", "template": str(path)}
    return ["chat template", "line 1", "Correct the template"]


def vocabulary_is_larger(case: Case) -> list[str]:
    case.job["proxy"] |= {
        "model": {"config": {**tiny.LLAMA, "vocab_size": 200}},
        "tokenizer": "bytes",
    }
    return ["258 tokens", "only 200 embeddings", "raise vocab_size"]


# ---- storage


def storage_is_a_file(case: Case) -> list[str]:
    case.storage.write_text("")
    return [str(case.storage), "run.storage"]


def manifest_is_no_json(case: Case) -> list[str]:
    case.plan().nodes[0].artifact.write("manifest.json", b"{")
    return ["manifest.json", "not a manifest of this version", "Remove the folder"]


def manifest_of_another_format(case: Case) -> list[str]:
    artifact = case.plan().nodes[0].artifact
    artifact.write("manifest.json", manifest("examples", format=99).to_bytes())
    return ["manifest.json", "expected format 1, got 99", "another storage"]


# ---- sizes


def more_checkpoints_than_steps(case: Case) -> list[str]:
    case.job["proxy"]["checkpoints"] = 9
    return ["proxy.checkpoints = 9", "only 3 steps", "Lower proxy.checkpoints"]


def more_clusters_than_rows(case: Case) -> list[str]:
    case.job["clusters"] = {"k": 41}
    return ["clusters.k = 41", "only 40 of 40 rows", "Lower clusters.k"]


def budget_above_the_rows(case: Case) -> list[str]:
    case.job["subset"] = {"budget": 41}
    return ["subset.budget", "41 rows", "only 40", "Lower the budget"]


# ---- rules


def unknown_rule(case: Case) -> list[str]:
    case.job["subset"]["rule"] = "s2ll"
    return ["subset.rule", "s2ll", "Did you mean s2l"]


def rule_without_its_statistic(case: Case) -> list[str]:
    case.job["subset"]["rule"] = "el2n"
    return ["el2n", "trajectories.statistics"]


def score_is_no_expression(case: Case) -> list[str]:
    case.job["subset"]["rule"] = {"score": "num_tokens +"}
    return ["subset.rule", "num_tokens +"]


def score_of_an_unknown_name(case: Case) -> list[str]:
    case.job["subset"]["rule"] = {"score": "-num_token"}
    return ["subset.rule", "num_token", "num_tokens"]


def score_that_runs_code(case: Case) -> list[str]:
    case.job["subset"]["rule"] = {"score": "__import__('os').getpid()"}
    return ["subset.rule", "__import__"]


def unknown_group(case: Case) -> list[str]:
    case.job["subset"]["rule"] = {"group": "topic"}
    return ["subset.rule", "topic", "source"]


# ---- incremental runs


def base_is_no_artifact(case: Case) -> list[str]:
    case.job["examples"]["extends"] = "somewhere"
    return ["examples.extends", "somewhere", "<storage>/examples/<fingerprint>"]


def base_is_not_committed(case: Case) -> list[str]:
    case.job["examples"]["extends"] = f"{case.storage}/examples/abc"
    return ["examples.extends", "no manifest.json", "run the job"]


def file_of_the_base_is_gone(case: Case) -> list[str]:
    case.job["examples"]["extends"] = case.commit_examples().uri
    (case.folder / "raw" / "a.jsonl").unlink()
    return ["gone (a.jsonl)", "examples.on_changed_file: drop"]


def file_of_the_base_is_changed(case: Case) -> list[str]:
    case.job["examples"]["extends"] = case.commit_examples().uri
    tiny.write_jsonl(case.folder / "raw" / "b.jsonl", tiny.rows(21, seed=5))
    return ["changed (b.jsonl)", "examples.on_changed_file: drop"]


def base_is_cut_otherwise(case: Case) -> list[str]:
    case.job["examples"]["extends"] = case.commit_examples().uri
    case.job["examples"]["rows_per_part"] = 63
    return ["examples.rows_per_part = 64", "63", "Set it as it was"]


def used_proxy_reads_otherwise(case: Case) -> list[str]:
    case.job["proxy"]["use"] = case.commit("proxy", section=case.plan().nodes[1].section).uri
    case.job["proxy"]["max_length"] = 32
    return ["proxy.use", "max_length = 64", "32", "as they were"]


def used_clusters_are_not_there(case: Case) -> list[str]:
    case.job["clusters"]["use"] = f"{case.storage}/clusters/abc"
    return ["clusters.use", "no manifest.json"]


def of_config(case: Case, **fields: Any) -> None:
    case.job["proxy"] |= {"model": {"config": {**tiny.LLAMA, **fields}}, "tokenizer": "bytes"}


def a_field_of_the_model_is_misspelt(case: Case) -> list[str]:
    of_config(case, hidden_sise=32)
    return ["model.config of type llama", "hidden_sise", "Did you mean hidden_size?"]


def an_activation_is_unknown(case: Case) -> list[str]:
    of_config(case, hidden_act="swishh")
    return ["hidden_act = 'swishh' is not known"]


def heads_do_not_divide(case: Case) -> list[str]:
    of_config(case, num_attention_heads=3)
    return ["hidden size (32) is not a multiple of the number of attention heads (3)"]


def a_model_without_layers(case: Case) -> list[str]:
    of_config(case, num_hidden_layers=0)
    return ["expected num_hidden_layers of at least 1, got 0"]


def a_model_that_looks_ahead(case: Case) -> list[str]:
    fields = {name: value for name, value in tiny.LLAMA.items() if "key_value" not in name}
    case.job["proxy"] |= {
        "model": {"config": {**fields, "model_type": "bert"}},
        "tokenizer": "bytes",
    }
    return ["It looks ahead", "is_decoder: true"]


def texts_beyond_the_positions(case: Case) -> list[str]:
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 260}
    case.job["proxy"] |= {
        "model": {"config": {"model_type": "gpt2", **sizes}},
        "tokenizer": "bytes",
    }
    return ["proxy.max_length = 64 tokens", "has 32", "Lower proxy.max_length"]


def clusters_of_a_step_that_is_not_stored(case: Case) -> list[str]:
    case.job["clusters"]["steps"] = [1, 3]
    return ["clusters.steps names 1", "will be stored are 0, 2, 3", "Change clusters.steps"]


def a_rule_at_a_step_that_is_not_stored(case: Case) -> list[str]:
    case.job["subset"] |= {"rule": {"score": "at(loss)"}, "at": 1}
    return ["subset.at", "0, 2, 3; got 1"]


def a_score_of_a_step_that_is_not_stored(case: Case) -> list[str]:
    case.job["subset"]["rule"] = {"score": "loss[3]"}
    return ["subset.rule's score 'loss[3]'", "3 stored steps", "Change the score, or make more"]


KINDS = [
    a_score_of_a_step_that_is_not_stored, clusters_of_a_step_that_is_not_stored,
    a_rule_at_a_step_that_is_not_stored,
    a_field_of_the_model_is_misspelt, an_activation_is_unknown, heads_do_not_divide,
    a_model_without_layers, a_model_that_looks_ahead, texts_beyond_the_positions,
    no_folder, no_config, config_is_no_json, unknown_family, missing_shard, damaged_shard,
    weights_of_another_size,
    pickled_weights, index_is_no_json, no_tokenizer, tokenizer_is_damaged, no_end_token,
    no_chat_template,
    template_file_is_missing, template_is_no_jinja, vocabulary_is_larger, storage_is_a_file,
    manifest_is_no_json,
    manifest_of_another_format, more_checkpoints_than_steps, more_clusters_than_rows,
    budget_above_the_rows, unknown_rule,
    rule_without_its_statistic, score_is_no_expression, score_of_an_unknown_name,
    score_that_runs_code, unknown_group,
    base_is_no_artifact, base_is_not_committed, file_of_the_base_is_gone,
    file_of_the_base_is_changed, base_is_cut_otherwise,
    used_proxy_reads_otherwise, used_clusters_are_not_there,
]  # fmt: skip


# What a dry run takes as not at hand.
MAY_COME_LATER = (no_folder,)


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_it_is_refused_in_one_message_before_ray_and_nothing_is_made(
    case: Case,
    kind: Callable[[Case], list[str]],
    dry: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = kind(case)
    # importing it would fail
    monkeypatch.setitem(sys.modules, "s2l_ray.edge.session", None)
    before = set(case.storage.rglob("manifest.json")) if case.storage.is_dir() else set()
    path = case.folder / "job.yaml"
    path.write_text(yaml.safe_dump(case.job))
    status = run.main(["--config", str(path), *(["--dry-run"] if dry else [])])
    if dry and kind in MAY_COME_LATER:
        assert status == 0
        return
    assert status == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    for word in words if not dry or kind is not no_config else ["Should have a `model_type`"]:
        assert word in said, said
    assert (set(case.storage.rglob("manifest.json")) if case.storage.is_dir() else set()) == before


def test_the_case_itself_is_good(case: Case) -> None:
    """Without damage the plan stands and its models load, so that each refusal above is due to its
    damage alone.
    """
    made = case.plan()
    execution.check_models(made.nodes)
    assert [node.stage.name for node in made.nodes][:2] == ["examples", "proxy"]
