"""`target`: the model that is fine-tuned on the subset."""

from collections.abc import Sequence
from typing import Any

from s2l_ray.config import Config, Training
from s2l_ray.contract.stage import Cost, Facts, Request, Stage
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.data.parts import PartRange
from s2l_ray.stages.training.declared import (
    check_training,
    training_cost,
    training_identity,
)


def identity(config: Config, assume: bool) -> dict[str, Any]:
    (section,) = models(config)
    return training_identity(section, assume)


def models(config: Config) -> Sequence[Training]:
    return [] if config.target is None else [config.target]


def parts(config: Config, raw: RawFiles) -> list[PartRange]:
    """Of the files with held-out rows, where these are looked at during the training."""
    if config.target is None or config.target.validation is None:
        return []
    assert config.evaluation is not None
    return raw.ranges(config.evaluation, "evaluation")


def cost(config: Config, facts: Facts) -> Cost:
    return training_cost(models(config), facts.chosen, facts, config.scaling.target)


def check(config: Config, facts: Facts) -> None:
    check_training(models(config), config.scaling.target, "target")


TARGET = Stage(
    name="target",
    version=4,
    make="s2l_ray.stages.target.make",
    identity=identity,
    inputs=lambda config: {"subset": "subset"},
    check=check,
    parts=parts,
    wanted=lambda config: config.target is not None,
    models=models,
    texts=lambda config: [(own, own.max_length, "target.max_length") for own in models(config)],
    request=lambda config: Request.of("workers", config.scaling.target, "target"),
    cost=cost,
)
