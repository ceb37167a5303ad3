"""`examples`: the rows of the raw files, checked and cut into parts."""

from typing import Any

from s2l_ray.config import Config
from s2l_ray.contract.stage import Cost, Facts, Request, Stage
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.data.incremental import extended
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.storage.artifact import Artifact, artifact_at
from s2l_ray.errors import UserError

# Fields that say where the data lie, or what to expect of them: the files' content has its hash.
NOT_CONTENT = {
    "files", "root", "dataset", "dataset_config", "split", "expected_rows",
    "expected_tokens_per_row", "extends", "on_changed_file", "most_rejects",
}  # fmt: skip


def identity(config: Config, assume: bool) -> dict[str, Any]:
    return config.examples.model_dump(mode="json", exclude=NOT_CONTENT)


def inputs(config: Config) -> dict[str, str | Artifact]:
    base = _base(config)
    return {} if base is None else {"base": base}


def _base(config: Config) -> Artifact | None:
    uri = config.examples.extends
    return None if uri is None else artifact_at(uri, "examples", "examples.extends")


def parts(config: Config, raw: RawFiles) -> list[PartRange]:
    """The parts of the raw files, which keep the file numbers of the base, if there is one."""
    ranges, base = raw.ranges(config.examples, "examples"), _base(config)
    if base is None:
        return ranges
    on_changed = config.examples.on_changed_file
    return extended(ranges, base.manifest(), identity(config, False), on_changed, base.uri)


def check(config: Config, facts: Facts) -> None:
    if not facts.rows:
        raise UserError(
            "planning the run: examples.files names no file. Name files, a folder, a glob or a "
            "data set; --dry-run goes without."
        )


EXAMPLES = Stage(
    name="examples",
    version=3,
    make="s2l_ray.stages.examples.make",
    identity=identity,
    inputs=inputs,
    parts=parts,
    check=check,
    request=lambda config: Request("tasks", stage="examples"),
    cost=lambda config, facts: Cost(rows=facts.rows),
)
