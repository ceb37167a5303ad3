"""What every section of a job's config has in common."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

MAX_ROWS_PER_PART = 65_536
# Every generator takes as much.
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Unknown keys are errors, and so are values of another type; nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new tree: mappings are merged, anything else is replaced.

    A model of another kind (path, hub, config) replaces the whole model, and a config of another
    model_type the whole config.
    """
    family = old.get("model_type")
    if family is not None and new.get("model_type", family) != family:
        old = {}
    if {"path", "hub", "config"} & old.keys() and {
        "path",
        "hub",
        "config",
    } & new.keys() - old.keys():
        old = {}
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
