"""A stage that the package does not know: it counts the examples of each source."""

import json
from typing import Any

from s2l_ray.config import Config
from s2l_ray.contract.stage import Cost, Facts, Request, Stage
from s2l_ray.contract.work import Outcome, Work
from s2l_ray.errors import UserError

MOST_ROWS = 1_000


def make(work: Work) -> Outcome:
    rows = work.manifests["examples"].rows
    counted = json.dumps({"rows": rows}).encode()
    return Outcome(files=[work.artifact.write_named("counted.json", counted)])


def check(config: Config, facts: Facts) -> None:
    if facts.rows > MOST_ROWS:
        raise UserError(f"planning counts: {facts.rows} rows are too many to count.")


def identity(config: Config, assume: bool) -> dict[str, Any]:
    return {"unit": "rows"}


COUNTS = Stage(
    name="counts",
    version=1,
    make="tests.toy_stage",
    identity=identity,
    inputs=lambda config: {"examples": "examples"},
    wanted=lambda config: config.target is None,
    check=check,
    request=lambda config: Request("nothing"),
    cost=lambda config, facts: Cost(rows=facts.rows),
)
