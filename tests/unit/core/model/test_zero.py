"""DeepSpeed's settings: presets, a JSON of the user's, what contradicts, what names an artifact."""

import json
from pathlib import Path
from typing import Any

import pytest

from s2l_ray.config import Model, Training, TrainingWorkers
from s2l_ray.core.model.zero import (
    check_settings,
    content_of,
    engine_settings,
    offloads,
    zero_stage,
)
from s2l_ray.errors import UserError
from tests import tiny


def section(deepspeed: str = "zero1", **fields: Any) -> Training:
    given = {"steps": 4, "global_batch": 8, "model": Model(config=tiny.LLAMA), **fields}
    return Training(tokenizer="bytes", deepspeed=deepspeed, **given)


WORKERS = TrainingWorkers(micro_batch=2, workers=2)


def written(folder: Path, settings: Any) -> str:
    path = folder / "own.json"
    path.write_text(json.dumps(settings))
    return str(path)


def refused(training: Training, workers: TrainingWorkers = WORKERS) -> str:
    with pytest.raises(UserError) as caught:
        check_settings(training, workers, "target")
    return str(caught.value)


@pytest.mark.parametrize(
    ("preset", "stage", "is_offloaded"),
    [("zero1", 1, False), ("zero2", 2, False), ("zero3", 3, False), ("zero3_offload", 3, True)],
)
def test_each_preset_has_its_stage(preset: str, stage: int, is_offloaded: bool) -> None:
    made = engine_settings(section(preset), WORKERS, 2, on_cpu=True, bucket=5)
    assert made["zero_optimization"]["stage"] == zero_stage(section(preset)) == stage
    assert offloads(made) == is_offloaded
    check_settings(section(preset), WORKERS, "target")


def test_on_gpus_gradients_are_scattered_while_the_next_are_computed() -> None:
    for on_cpu in (True, False):
        made = engine_settings(section(), WORKERS, 2, on_cpu, bucket=5)["zero_optimization"]
        assert (made["overlap_comm"], made["reduce_scatter"]) == (not on_cpu, not on_cpu)


def test_keys_of_a_file_count_over_ours_and_auto_leaves_them_to_us(tmp_path: Path) -> None:
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False}
    own = section(written(tmp_path, {"zero_optimization": zero, "communication_data_type": "bf16"}))
    made = engine_settings(own, WORKERS, 2, on_cpu=False, bucket=5)
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 5
    assert made["zero_optimization"]["contiguous_gradients"]
    assert not made["zero_optimization"]["overlap_comm"]
    assert made["communication_data_type"] == "bf16"
    assert made["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_batch_size": 16}, "train_batch_size = 16, but target.global_batch makes it 8"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu = 4, but scaling.target.micro_batch makes it 2",
        ),
        (
            {"gradient_accumulation_steps": 3},
            "gradient_accumulation_steps = 3, but scaling.target.micro_batch makes it 2",
        ),
        (
            {"gradient_clipping": 0.5},
            "gradient_clipping = 0.5, but target.gradient_clipping makes it 1.0",
        ),
        ({"bf16": {"enabled": False}}, "bf16.enabled = false, but target.dtype makes it true"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true, but target.dtype makes it false"),
        ({"optimizer": {"type": "Lion"}}, 'optimizer.type = "Lion", but'),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}},
            "optimizer.params.lr = 0.001, but target.learning_rate makes it 2e-05",
        ),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.95]}}},
            "optimizer.params.betas = [0.9, 0.95], but target.adam_beta1 and target.adam_beta2",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            'scheduler.type = "WarmupLR", but the learning rate follows target.schedule = cosine',
        ),
        ({"zero_optimization": {"stage": 0}}, "expected zero_optimization.stage to be 1, 2 or 3"),
        ([1], "expected a JSON object, got a list"),
    ],
)
def test_a_file_that_contradicts_is_refused_with_both_values(
    tmp_path: Path, settings: Any, said: str
) -> None:
    message = refused(section(written(tmp_path, settings)))
    assert said in message
    assert "own.json" in message


def test_a_file_that_agrees_passes(tmp_path: Path) -> None:
    agreeing = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": "auto"}},
        "zero_optimization": {"stage": 3},
    }
    check_settings(section(written(tmp_path, agreeing)), WORKERS, "target")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("{")
    assert "Expected a file with a JSON object" in refused(section(str(tmp_path / "own.json")))
    assert "none.json" in refused(section(str(tmp_path / "none.json")))


def test_a_disk_to_offload_to_needs_an_offload() -> None:
    disk = WORKERS.model_copy(update={"offload_to": "/nvme"})
    assert "offloads nothing" in refused(section("zero3"), disk)
    check_settings(section("zero3_offload"), disk, "target")
    made = engine_settings(section("zero3_offload"), disk, 2, on_cpu=False, bucket=5)
    offload = made["zero_optimization"]["offload_optimizer"]
    assert (offload["device"], offload["nvme_path"]) == ("nvme", "/nvme")


def test_the_content_of_a_file_counts_and_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    stage = {"zero_optimization": {"stage": 2}}
    one, other = written(tmp_path, stage), written(tmp_path / "elsewhere", stage)
    assert content_of(section(one)) == content_of(section(other)) == content_of(section("zero2"))
    fast = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 9}, "steps_per_print": 1}
    assert content_of(section(written(tmp_path, fast))) == content_of(section("zero2"))
    changed = {**stage, "communication_data_type": "bf16"}
    assert content_of(section(written(tmp_path, changed))) != content_of(section("zero2"))
    assert content_of(section("zero3_offload")) == content_of(section("zero3"))
