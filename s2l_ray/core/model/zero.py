"""DeepSpeed's settings of a training: what a preset or a JSON of the user says, and what is added.

Imports neither torch nor DeepSpeed, because planning a job reads a JSON and refuses what
contradicts the config.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

from s2l_ray.config import Training, TrainingWorkers
from s2l_ray.config.section import merge
from s2l_ray.config.training import PRESETS
from s2l_ray.core.storage.store import filesystem
from s2l_ray.errors import UserError

# Gradients reduced at once. Buffers of this size are allocated, so a smaller model lowers it to its
# own size.
BUCKET_ELEMENTS = 200_000_000
# Keys of a JSON that say where something lies, how fast it is done or what is printed. All others
# may change numbers.
NOT_CONTENT = {
    "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "flops_profiler",
    "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "aio", "compile",
    "zero_optimization.offload_optimizer", "zero_optimization.offload_param",
    "zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size",
    "zero_optimization.overlap_comm", "zero_optimization.reduce_scatter",
    "zero_optimization.allgather_partitions", "zero_optimization.contiguous_gradients",
    "zero_optimization.round_robin_gradients", "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_max_live_parameters", "zero_optimization.log_trace_cache_warnings",
    "zero_optimization.stage3_param_persistence_threshold",
}  # fmt: skip


def settings_of(section: Training) -> dict[str, Any]:
    """The keys that `deepspeed` of a section stands for; those that are "auto" are left to us.

    Raises:
        UserError: there is no such file, or it holds no JSON object.
    """
    name = section.deepspeed
    if name in PRESETS:
        return copy.deepcopy(PRESETS[name])
    filesystem_, path = filesystem(name)
    try:
        with filesystem_.open_input_stream(path, compression=None) as stream:
            read = json.loads(stream.read())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"reading the DeepSpeed settings {name}: {error}. Expected a file with a JSON object; "
            "correct `deepspeed`."
        ) from None
    if not isinstance(read, dict):
        raise UserError(
            f"reading the DeepSpeed settings {name}: expected a JSON object, got a "
            f"{type(read).__name__}. Correct the file."
        )
    return _without_auto(read)


def zero_stage(section: Training) -> int:
    """1: AdamW's state is sharded over the workers, 2: also gradients, 3: also weights."""
    zero = settings_of(section).get("zero_optimization")
    return zero.get("stage", 1) if isinstance(zero, dict) else 1


def offloads(settings: dict[str, Any]) -> bool:
    """Whether AdamW's state lies in the memory of the CPU or on a disk."""
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def content_of(section: Training) -> dict[str, Any]:
    """What of the settings decides the weights that a training ends with, by dotted key."""
    return {
        key: value
        for key, value in _leaves(settings_of(section))
        if not any(key == name or key.startswith(f"{name}.") for name in NOT_CONTENT)
    }


def check_settings(section: Training, scaling: TrainingWorkers, name: str) -> None:
    """Refuse a JSON that contradicts the config.

    Args:
        name: of the section, such as target.

    Raises:
        UserError: naming the key and the field, with both values.
    """
    settings = dict(_leaves(settings_of(section)))
    for key, (field, expected) in _decided(section, scaling, name).items():
        came = settings.get(key, expected)
        if came != expected and not (key == "optimizer.type" and came == "Adam"):
            raise UserError(
                f"reading the DeepSpeed settings {section.deepspeed}: {key} = {json.dumps(came)}, "
                f"but {field} makes it {json.dumps(expected)}. Remove the key from the file, or "
                f"change {field}."
            )
    scheduler = settings.get("scheduler.type")
    if scheduler is not None:
        raise UserError(
            f"reading the DeepSpeed settings {section.deepspeed}: scheduler.type = "
            f"{json.dumps(scheduler)}, but the learning rate follows {name}.schedule = "
            f"{section.schedule}. Remove the scheduler from the file."
        )
    zero = settings_of(section).get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 1) not in (1, 2, 3):
        raise UserError(
            f"reading the DeepSpeed settings {section.deepspeed}: expected zero_optimization.stage "
            f"to be 1, 2 or 3, got {json.dumps(zero)}. Correct the file."
        )
    if scaling.offload_to is not None and not offloads({"zero_optimization": zero}):
        raise UserError(
            f"planning the {name}: scaling.{name}.offload_to = {scaling.offload_to}, but "
            f"{name}.deepspeed = {section.deepspeed} offloads nothing. Set {name}.deepspeed to "
            "zero3_offload, or leave out offload_to."
        )


def _decided(section: Training, scaling: TrainingWorkers, name: str) -> dict[str, tuple[str, Any]]:
    """Keys whose values the config decides, each with the field that does."""
    passes = section.global_batch // (scaling.workers * scaling.micro_batch_of(section))
    is_bf16 = section.dtype == "bf16"
    return {
        "train_batch_size": (f"{name}.global_batch", section.global_batch),
        "train_micro_batch_size_per_gpu": (
            f"scaling.{name}.micro_batch",
            scaling.micro_batch_of(section),
        ),
        "gradient_accumulation_steps": (f"scaling.{name}.micro_batch", passes),
        "gradient_clipping": (f"{name}.gradient_clipping", section.gradient_clipping),
        "bf16.enabled": (f"{name}.dtype", is_bf16),
        "bfloat16.enabled": (f"{name}.dtype", is_bf16),
        "bf16.bf16_master_weights_and_grads": (
            f"{name}.state_dtype",
            section.state_dtype == "bf16",
        ),
        "bf16.bf16_optimizer_states": (f"{name}.state_dtype", section.state_dtype == "bf16"),
        "fp16.enabled": (f"{name}.dtype", False),
        "amp.enabled": (f"{name}.dtype", False),
        "optimizer.type": ("the training loop", "AdamW"),
        "optimizer.params.lr": (f"{name}.learning_rate", section.learning_rate),
        "optimizer.params.betas": (
            f"{name}.adam_beta1 and {name}.adam_beta2",
            [section.adam_beta1, section.adam_beta2],
        ),
        "optimizer.params.eps": (f"{name}.adam_epsilon", section.adam_epsilon),
        "optimizer.params.weight_decay": (f"{name}.weight_decay", section.weight_decay),
    }


def engine_settings(
    section: Training, scaling: TrainingWorkers, passes: int, on_cpu: bool, bucket: int
) -> dict[str, Any]:
    """All settings of the engine: ours, and over them what the section says.

    Args:
        passes: forward passes of a worker in a step.
        on_cpu: the workers compute on CPUs.
        bucket: elements of gradients and weights that are sent at once.
    """
    ours = {
        "train_batch_size": section.global_batch,
        "train_micro_batch_size_per_gpu": scaling.micro_batch_of(section),
        "gradient_accumulation_steps": passes,
        "gradient_clipping": section.gradient_clipping,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "fp16": {"enabled": False},
        "bf16": _bf16(section),
        # Gradients of several micro-batches and workers are summed in fp32, so that the sum depends
        # little on their number.
        "data_types": {"grad_accum_dtype": section.state_dtype},
        "communication_data_type": "fp32",
        # Torch's AdamW does on CPUs what DeepSpeed's own, which must be compiled, does beside GPUs.
        "zero_force_ds_cpu_optimizer": not on_cpu,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": 1,
            "contiguous_gradients": True,
            # gloo sums all gradients of two workers together in less time than it takes for each
            # one's part, and computing waits for it.
            "reduce_scatter": not on_cpu,
            "overlap_comm": not on_cpu,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    theirs = {key: value for key, value in settings_of(section).items() if key != "optimizer"}
    merged = merge(ours, theirs)
    if scaling.offload_to is not None:
        merged["zero_optimization"]["offload_optimizer"] |= {
            "device": "nvme",
            "nvme_path": scaling.offload_to,
        }
    return merged


def _bf16(section: Training) -> dict[str, bool]:
    in_bf16 = section.state_dtype == "bf16"
    return {
        "enabled": section.dtype == "bf16",
        "bf16_master_weights_and_grads": in_bf16,
        "bf16_optimizer_states": in_bf16,
    }


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
