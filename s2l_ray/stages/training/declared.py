"""What the stages that train a model declare alike: what names a model, and what training costs.

Estimates take 6 FLOPs a parameter and token for training (2 forward, 4 backward); memory counts
weights, gradients and optimizer state as ZeRO shards them, not activations.
"""

from collections.abc import Sequence
from typing import Any

from s2l_ray.config import Training, TrainingWorkers
from s2l_ray.contract.stage import Cost, Facts, Request
from s2l_ray.core.model.architecture import parameters
from s2l_ray.core.model.cost import BYTES_OF_DTYPE
from s2l_ray.core.model.loading import template_text
from s2l_ray.core.model.places import identity
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


def training_request(scaling: TrainingWorkers, stage: str) -> Request:
    return Request("workers", scaling.workers, scaling.cpus, scaling.gpus, stage=stage)


def training_cost(sections: Sequence[Training], rows: int, facts: Facts, workers: int) -> Cost:
    """Of models that are trained one after the other, each on so many rows."""
    tokens, flops, memory = 0.0, 0.0, 0.0
    for section in sections:
        size = parameters(section.model) or 0
        own = rows_trained(section, rows) * min(facts.tokens_per_row, section.max_length)
        tokens += own
        flops += 6.0 * size * own
        memory = max(memory, size * _bytes_per_parameter(section, workers))
    return Cost(rows, tokens, flops, memory)


def rows_trained(section: Training, rows: int) -> int:
    """Examples that go through the model, all epochs counted."""
    if section.epochs is not None:
        return rows * section.epochs
    return section.global_batch * int(section.steps or 0)


def _bytes_per_parameter(section: Training, workers: int) -> float:
    """ZeRO 1 shards optimizer states (12 bytes), 2 also gradients (4), 3 also the weights."""
    weights, gradients, optimizer = BYTES_OF_DTYPE[section.dtype], 4, 12
    sharded = {
        1: optimizer,
        2: optimizer + gradients,
        3: optimizer + gradients + weights,
    }[zero_stage(section)]
    return weights + gradients + optimizer - sharded + sharded / workers
