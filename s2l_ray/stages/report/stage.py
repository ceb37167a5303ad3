"""`report`: one page about all artifacts of a job."""

from typing import Any

from s2l_ray.config import Config
from s2l_ray.contract.stage import Stage


def identity(config: Config, assume: bool) -> dict[str, Any]:
    return {"run": config.run.name, **config.report.model_dump()}


REPORT = Stage(
    name="report",
    version=3,
    make="s2l_ray.stages.report.make",
    identity=identity,
    inputs=lambda config: {},
    of_job=True,
)
