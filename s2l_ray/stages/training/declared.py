"""What the stages that train a model declare alike: what names a model, and what training costs.

Estimates take 6 FLOPs a parameter and token for training (2 forward, 4 backward); memory counts
everything that one worker holds at its peak (core/model/footprint.py).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from s2l_ray.config import Training, TrainingWorkers
from s2l_ray.contract.stage import Cost, Facts
from s2l_ray.core.model.architecture import parameters
from s2l_ray.core.model.footprint import check_fits, footprint
from s2l_ray.core.model.loading import template_text
from s2l_ray.core.model.places import folder_hashes, identity
from s2l_ray.core.model.zero import check_settings, content_of, zero_stage
from s2l_ray.core.storage.manifest import fingerprint
from s2l_ray.errors import UserError

# Fields that do not decide what is trained, or enter by the content of what they name.
NOT_CONTENT = {"model", "tokenizer", "deepspeed", "state_every", "members", "use"}


def training_identity(section: Training, assume: bool) -> dict[str, Any]:
    """What decides the weights that a training ends with, model files by their content.

    Raises:
        UserError: the model or the template is not there, unless that is to be assumed.
    """
    dumped = section.model_dump(mode="json", exclude=NOT_CONTENT)
    try:
        template = template_text(section)
        dumped["template"] = template and fingerprint(template)
        dumped["deepspeed"] = content_of(section)
        if section.adapter is not None and section.adapter.start is not None:
            dumped["adapter"]["start"] = folder_hashes(section.adapter.start)
        return {**dumped, **identity(section.model, section.tokenizer)}
    except UserError:
        if not assume:
            raise
        assumed = section.model.model_dump()
        return {
            **dumped,
            "assumed": assumed,
            "deepspeed": section.deepspeed,
            "tokenizer": section.tokenizer,
        }


def check_training(sections: Sequence[Training], scaling: TrainingWorkers, stage: str) -> None:
    """Refuse what does not fit together, before any work."""
    for section in sections:
        check_settings(section, scaling, stage)
        if scaling.packing and section.draws:
            raise UserError(
                f"planning the {stage}: scaling.{stage}.packing puts several rows into a pass, and "
                "dropout makes every row a pass by itself. Choose one of them."
            )
        if section.adapter is not None:
            _check_adapter(section, scaling, stage)
        check_fits(section, scaling, stage)


def _check_adapter(section: Training, scaling: TrainingWorkers, stage: str) -> None:
    """Refuse an adapter for which a package or a GPU is missing."""
    assert section.adapter is not None
    is_quantized = section.adapter.kind == "qlora"
    doing = f"planning the {stage} with an adapter of kind {section.adapter.kind}"
    if find_spec("peft") is None:
        raise UserError(
            f"{doing}: the package peft is not installed. Install s2l_ray[adapters] on every "
            f"machine, or leave out {stage}.adapter."
        )
    if is_quantized and not scaling.gpus:
        raise UserError(
            f"{doing}: it needs a GPU, and scaling.{stage}.gpus is 0. Give its workers GPUs, or "
            "choose lora."
        )
    if is_quantized and find_spec("bitsandbytes") is None:
        raise UserError(
            f"{doing}: the package bitsandbytes is not installed. Install it on every machine, or "
            "choose lora."
        )
    if is_quantized and zero_stage(section) == 3:
        raise UserError(
            f"{doing}: weights of 4 bits cannot be sharded, and {stage}.deepspeed is "
            f"{section.deepspeed}. Choose zero1 or zero2: every worker holds all of them."
        )


def training_cost(
    sections: Sequence[Training], rows: int, facts: Facts, scaling: TrainingWorkers
) -> Cost:
    """Of models that are trained one after the other, each on so many rows."""
    tokens, flops, memory = 0.0, 0.0, 0.0
    for section in sections:
        size = parameters(section.model) or 0
        own = rows_trained(section, rows) * min(facts.tokens_per_row, section.max_length)
        tokens += own
        flops += 6.0 * size * own
        needed = footprint(section, scaling, section.max_length)
        memory = max(memory, 0 if needed is None else needed.peak)
    return Cost(rows, tokens, flops, memory)


def rows_trained(section: Training, rows: int) -> int:
    """Examples that go through the model, all epochs counted."""
    if section.epochs is not None:
        return rows * section.epochs
    return section.global_batch * int(section.steps or 0)
