"""`trajectories`: every example's loss at every checkpoint of every proxy."""

from collections.abc import Sequence
from typing import Any

from s2l_ray.config import Config, Training
from s2l_ray.contract.stage import Cost, Facts, Request, Stage
from s2l_ray.core.model.architecture import output_shape, parameters
from s2l_ray.core.model.cost import BYTES_OF_DTYPE, scoring_flops


def identity(config: Config, assume: bool) -> dict[str, Any]:
    return config.trajectories.model_dump(mode="json")


def models(config: Config) -> Sequence[Training]:
    return config.proxy.each()


def request(config: Config) -> Request:
    return Request.of("actors", config.scaling.trajectories, "trajectories")


def cost(config: Config, facts: Facts) -> Cost:
    """Of all rows at every checkpoint, step 0 included; half of the tokens are taken as learned."""
    section, rows = config.trajectories, facts.scored
    flops, held = 0.0, 0
    for proxy in config.proxy.each():
        size, length = parameters(proxy.model) or 0, min(facts.tokens_per_row, proxy.max_length)
        shape = output_shape(proxy.model)
        one_row = scoring_flops(size, shape, [length], [length / 2], section.statistics)
        flops += rows * (proxy.checkpoints + 1) * one_row
        held += size * (proxy.checkpoints + 1)
    memory = held * BYTES_OF_DTYPE[section.dtype]
    return Cost(rows, rows * facts.tokens_per_row, flops, memory)


TRAJECTORIES = Stage(
    name="trajectories",
    version=4,
    make="s2l_ray.stages.trajectories.make",
    identity=identity,
    inputs=lambda config: {"examples": "examples", "proxy": "proxy"},
    models=models,
    request=request,
    cost=cost,
)
