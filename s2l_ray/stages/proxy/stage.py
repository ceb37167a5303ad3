"""`proxy`: small models, trained on all examples, with their checkpoints."""

from collections.abc import Sequence
from typing import Any

from s2l_ray.config import Config, Training
from s2l_ray.contract.stage import Cost, Facts, Request, Stage
from s2l_ray.core.storage.artifact import Artifact, artifact_at
from s2l_ray.errors import UserError
from s2l_ray.stages.training.declared import (
    check_training,
    rows_trained,
    training_cost,
    training_identity,
)

# Fields that decide which tokens a proxy sees of a row; a proxy that is used must have these alike.
WHAT_A_PROXY_READS = (
    "model", "tokenizer", "prompt", "template", "learn", "max_length", "truncation",
)  # fmt: skip


def identity(config: Config, assume: bool) -> dict[str, Any]:
    return {"members": [training_identity(member, assume) for member in config.proxy.each()]}


def given(config: Config, assume: bool) -> Artifact | None:
    """The artifact of proxy.use.

    Raises:
        UserError: it was trained on rows in another form than the config describes.
    """
    if config.proxy.use is None:
        return None
    used = artifact_at(config.proxy.use, "proxy", "proxy.use")
    there, here = used.manifest().section["members"], identity(config, assume)["members"]
    if len(there) != len(here):
        raise UserError(
            f"planning the proxy: proxy.use names an artifact of {len(there)} proxies, but "
            f"proxy.members describes {len(here)}. Describe those that were trained."
        )
    for number, (theirs, ours) in enumerate(zip(there, here, strict=True)):
        wrong = [name for name in WHAT_A_PROXY_READS if theirs.get(name) != ours.get(name)]
        if wrong:
            raise UserError(
                "planning the proxy: the artifact that proxy.use names was trained with "
                f"{wrong[0]} = {theirs.get(wrong[0])} (member {number}), but the config says "
                f"{ours.get(wrong[0])}; also different: {', '.join(wrong[1:]) or 'nothing'}. Set "
                "these fields of proxy as they were then."
            )
    return used


def check(config: Config, facts: Facts) -> None:
    """Every proxy must take at least as many steps as it has checkpoints."""
    check_training(models(config), config.scaling.proxy, "proxy")
    for section in config.proxy.each() if config.proxy.use is None else ():
        checkpoints, batch = section.checkpoints, section.global_batch
        steps = section.steps or -(-rows_trained(section, facts.rows) // batch)
        if checkpoints > steps:
            raise UserError(
                f"planning the proxy: proxy.checkpoints = {checkpoints}, but {facts.rows} rows in "
                f"batches of {batch} make only {steps} steps. Lower proxy.checkpoints or "
                "proxy.global_batch, or train longer."
            )


def models(config: Config) -> Sequence[Training]:
    return config.proxy.each() if config.proxy.use is None else []


def cost(config: Config, facts: Facts) -> Cost:
    return training_cost(config.proxy.each(), facts.rows, facts, config.scaling.proxy)


PROXY = Stage(
    name="proxy",
    version=4,
    make="s2l_ray.stages.proxy.make",
    identity=identity,
    inputs=lambda config: {"examples": "examples"},
    given=given,
    check=check,
    models=models,
    texts=lambda config: [(own, own.max_length, "proxy.max_length") for own in models(config)],
    request=lambda config: Request.of("workers", config.scaling.proxy, "proxy"),
    cost=cost,
)
