"""`subset`: the chosen rows, exactly the budget."""

from typing import Any

from s2l_ray.config import Config, expressions
from s2l_ray.contract.stage import Cost, Facts, Request, Stage
from s2l_ray.core.model.schedule import stored_steps
from s2l_ray.core.selection.quotas import budget_rows
from s2l_ray.core.selection.rules import by_cluster, rule_of, uses_at
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.errors import UserError


def identity(config: Config, assume: bool) -> dict[str, Any]:
    # A job that sets `at` for one rule does not make the subsets of the others again.
    unused = set() if uses_at(config.subset) else {"at"}
    return config.subset.model_dump(mode="json", exclude=unused)


def inputs(config: Config) -> dict[str, str | Artifact]:
    clusters = {"clusters": "clusters"} if by_cluster(config.subset) else {}
    return {"examples": "examples", "trajectories": "trajectories", **clusters}


def check(config: Config, facts: Facts) -> None:
    if isinstance(config.subset.budget, int):
        budget_rows(config.subset.budget, facts.scored)
    at, score = config.subset.at, expressions.parse(rule_of(config.subset).score)
    for steps in stored_steps(config, facts.rows):
        try:
            expressions.try_on(score, len(steps))
        except expressions.ExpressionError as error:
            raise UserError(
                f"planning the subset: subset.rule's score {error}. Change the score, or make more "
                "checkpoints (proxy.checkpoints)."
            ) from None
        if score.uses_at and isinstance(at, int) and at not in steps:
            raise UserError(
                "planning the subset: expected subset.at to be early, late or one of the steps "
                f"that will be stored, {', '.join(map(str, steps))}; got {at}. Change subset.at."
            )


SUBSET = Stage(
    name="subset",
    version=4,
    make="s2l_ray.stages.subset.make",
    identity=identity,
    inputs=inputs,
    check=check,
    request=lambda config: Request("tasks", stage="subset"),
    cost=lambda config, facts: Cost(rows=facts.chosen),
)
