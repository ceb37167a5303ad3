"""Defaults that are made for large data scale down with small data, and it is said.

What the config sets itself stays as it is: where that does not fit the data, the plan refuses it.
"""

from typing import Any

from pydantic import ValidationError

from s2l_ray.config import Config, Training, TrainingWorkers, merge
from s2l_ray.config.messages import explain
from s2l_ray.contract.stage import Facts
from s2l_ray.errors import UserError

# Clusters of fewer rows than these on average say little about their rows.
ROWS_PER_CLUSTER = 10


def fitted(config: Config, facts: Facts) -> tuple[Config, list[str]]:
    """A config with smaller values in place of defaults that the data are too few for.

    Returns:
        The config, and for each value that was changed what is said of it.

    Raises:
        UserError: other fields of the config do not go with a smaller value.
    """
    changes: dict[str, dict[str, Any]] = {}
    if not facts.rows:
        return config, []
    if config.proxy.use is None and not config.proxy.members:
        changes["proxy"] = _smaller_proxy(config, facts.rows)
    if config.target is not None and _is_default(config.target, "global_batch"):
        changes["target"] = _smaller_batch(config.target, facts.chosen, config.scaling.target, 1)
    clusters = config.clusters
    enough = max(1, facts.scored // ROWS_PER_CLUSTER)
    if _is_default(clusters, "k") and clusters.use is None and clusters.k > enough:
        changes["clusters"] = {"k": enough}
    said = [
        f"{section}.{name} is {value}, not {getattr(getattr(config, section), name)} as for more "
        f"data than {facts.rows:,} rows; set it to have another"
        for section, values in changes.items()
        for name, value in values.items()
    ]
    if not said:
        return config, []
    try:
        tree = merge(config.model_dump(exclude_unset=True), changes)
        return Config.model_validate(tree), said
    except ValidationError as error:
        raise UserError(
            f"planning for {facts.rows:,} rows: {'; '.join(said)}. But {'; '.join(explain(error))}"
        ) from None


def _is_default(section: Any, name: str) -> bool:
    return name not in section.model_fields_set


def _smaller_proxy(config: Config, rows: int) -> dict[str, Any]:
    proxy, changes = config.proxy, {}
    if _is_default(proxy, "global_batch"):
        changes = _smaller_batch(proxy, rows, config.scaling.proxy, proxy.checkpoints)
    batch = changes.get("global_batch", proxy.global_batch)
    steps = proxy.steps or _steps(proxy, rows, batch)
    if _is_default(proxy, "checkpoints") and proxy.checkpoints > steps:
        changes["checkpoints"] = steps
    return changes


def _steps(section: Training, rows: int, batch: int) -> int:
    return max(1, -(-rows * int(section.epochs or 0) // batch))


def _smaller_batch(
    section: Training, rows: int, scaling: TrainingWorkers, least_steps: int
) -> dict[str, Any]:
    """The largest batch that makes so many steps and is no larger than the data; else the smallest
    that the workers can share."""
    unit = scaling.workers * scaling.micro_batch
    batch = section.global_batch

    def fits(size: int) -> bool:
        return size <= rows and (
            section.epochs is None or _steps(section, rows, size) >= least_steps
        )

    while batch > unit and not fits(batch):
        batch = max(unit, batch // 2 // unit * unit)
    return {} if batch >= section.global_batch else {"global_batch": batch}
