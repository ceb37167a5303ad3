"""The section `scaling`: where and how fast; recorded with an artifact, never part of its name.

A subsection per stage says how many processes work on it and what each of them has.
"""

from typing import Literal

from pydantic import Field, field_validator

from s2l_ray.config.section import Section
from s2l_ray.config.training import Training

# Ray gives every machine with GPUs this label.
ACCELERATOR_LABEL = "ray.io/accelerator-type"


class Workers(Section):
    """The processes of a stage, and what each of them takes of the cluster."""

    workers: int = Field(1, ge=1, description="processes that work on this stage")
    cpus: float | None = Field(
        None,
        gt=0,
        description="CPUs of one worker; default: one, or an equal share of what is free",
    )


class ModelWorkers(Workers):
    """Workers that hold a model."""

    gpus: float = Field(0.0, ge=0, description="GPUs of one worker; scorers may share one")
    accelerator_type: str | None = Field(
        None, description="kind of GPU that the machines must have, as Ray names it, such as H100"
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of Ray that the machines must have, such as {pool: target}",
    )
    threads: int = Field(1, ge=1, description="CPU threads of torch in one worker")

    @property
    def required_labels(self) -> tuple[tuple[str, str], ...]:
        """Labels of Ray that the machines must have, the kind of GPU included."""
        kind = self.accelerator_type
        return (*self.labels.items(), *([] if kind is None else [(ACCELERATOR_LABEL, kind)]))


class Scorers(ModelWorkers):
    workers: int = Field(
        2, ge=1, description="actors, each with a model; fewer start when the cluster is smaller"
    )


class TrainingWorkers(ModelWorkers):
    workers: int = Field(1, ge=1, description="data-parallel workers of one training")
    readers: int = Field(2, ge=1, description="tasks that read and tokenise for one worker")
    micro_batch: int = Field(
        16,
        ge=1,
        description="examples of one worker and forward pass; gradient accumulation follows",
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute the activations of every layer again in the backward pass: a third "
        "more time, far less memory",
    )
    attention: Literal["sdpa", "flash_attention_2", "eager"] | None = Field(
        None,
        description="how attention is computed; default: as transformers chooses for the model. "
        "flash_attention_2 needs the package flash-attn, a GPU and dtype: bf16",
    )
    packing: bool = Field(
        False,
        description="put rows behind one another in place of padding them, none of which sees "
        "another; a pass then has up to micro_batch x max_length tokens. Fast with attention: "
        "flash_attention_2",
    )
    offload_to: str | None = Field(
        None,
        description="folder on a local NVMe disk of every machine, which takes AdamW's state with "
        "deepspeed: zero3_offload in place of the CPU's memory",
    )

    @field_validator("gpus")
    @classmethod
    def _a_whole_gpu(cls, value: float) -> float:
        if value not in (0, 1):
            raise ValueError(
                f"expected 0 or 1, because a training worker computes on one whole GPU; got "
                f"{value:g}. More GPUs are more workers"
            )
        return value

    def micro_batch_of(self, section: Training) -> int:
        """Under dropout 1: alone in a pass, an example draws the same whatever workers compute."""
        return 1 if section.draws else self.micro_batch


class TargetWorkers(TrainingWorkers):
    micro_batch: int = Field(
        4,
        ge=1,
        description="examples of one worker and forward pass; gradient accumulation follows",
    )


class ShardWorkers(Workers):
    workers: int = Field(2, ge=1, description="k-means shard actors; each holds some parts")
    memory: int | None = Field(
        None,
        ge=1,
        description="bytes that one shard actor may use for rows; where its parts need more, it "
        "reads them again every round. Default: it holds all",
    )


class Scaling(Section):
    proxy: TrainingWorkers = Field(default_factory=TrainingWorkers)
    trajectories: Scorers = Field(default_factory=Scorers)
    clusters: ShardWorkers = Field(default_factory=ShardWorkers)
    target: TargetWorkers = Field(default_factory=TargetWorkers)
    evaluation: Scorers = Field(default_factory=Scorers)
    side_by_side: int = Field(
        1,
        ge=1,
        description="artifacts made at the same time where none needs another, such as the targets "
        "of several variants; trainings share the CPUs and GPUs equally",
    )
    max_failures: int = Field(
        3, ge=0, description="worker or node losses that a stage survives before the run stops"
    )
    local_cpus: int | None = Field(
        None, ge=1, description="CPUs of a Ray started on this machine; default: all"
    )
    local_object_store: int = Field(
        500_000_000,
        ge=80_000_000,
        description="bytes of shared memory of a Ray started on this machine",
    )
