"""From a job to its plan: the artifacts of all variants, each once, by name, before any work.

An artifact is named by the hash of everything that decides its content: the stage's version, its
section of the config, its seed, and the names of what it is made from. So variants share what they
have in common, and the same command finds what earlier runs made.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from s2l_ray.config import Config, Job
from s2l_ray.contract.stage import Facts, Request, Stage
from s2l_ray.core.data.catalog import RawFiles
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.data.uses import Use
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import FORMAT, fingerprint
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UsageError
from s2l_ray.pipeline.small_data import fitted
from s2l_ray.stages import STAGES

log = logging.getLogger("s2l_ray")
NAMES = tuple(stage.name for stage in STAGES)


@dataclass
class Node:
    """One artifact of the plan: what makes it, from what, and for which variants.

    Attributes:
        section: what of the config names it.
        ranges: the parts of raw files that it is made from.
        at_once: how many artifacts with an equal request may be made at the same time.
    """

    stage: Stage
    artifact: Artifact
    config: Config
    section: dict[str, Any]
    inputs: dict[str, Artifact]
    ranges: list[PartRange] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    at_once: int = 1

    @property
    def label(self) -> str:
        return self.artifact.label

    @property
    def request(self) -> Request:
        return self.stage.request(self.config)

    def made_from(self) -> set[str]:
        """Labels of the artifacts that must be there first."""
        return {artifact.label for artifact in self.inputs.values()}


@dataclass
class Plan:
    """The union of all variants' artifacts, each once, in the order of the stages.

    Attributes:
        uses: what becomes of the columns of raw files, by section and file.
        passed_over: by section and URI, why a file that a folder or glob names is not read.
    """

    job: Job
    store: Store
    nodes: list[Node]
    facts: dict[str, Facts]
    uses: dict[str, dict[str, list[Use]]] = field(default_factory=dict)
    passed_over: dict[str, dict[str, str]] = field(default_factory=dict)

    def of(self, variant: str) -> dict[str, Node]:
        """A variant's artifacts by stage; those of the job belong to all variants."""
        return {node.stage.name: node for node in self.nodes if variant in node.variants}


def plan(job: Job, until: str = NAMES[-1], assume: bool = False, checked: bool = True) -> Plan:
    """Name every artifact of a job, looking at raw files and model folders but starting nothing.

    Args:
        until: the last stage wanted.
        assume: take models that are not at hand, and files that `examples.expected_rows` or a data
            set of the Hub stands for, as the config describes them (for --dry-run).
        checked: refuse what the stages that are wanted could not make.

    Raises:
        UserError: files that are missing, a budget larger than the data, more clusters than rows.
    """
    if until not in NAMES:
        raise UsageError(
            f"reading the command line: --until expects one of {', '.join(NAMES)}, got {until!r}."
        )
    store = Store(job.first.run.storage)
    store.check()
    sections = [config.examples for config in job.variants.values()]
    described = any(each.expected_rows is not None or each.dataset for each in sections)
    raw = RawFiles(store, assume and described)
    wanted = STAGES[: NAMES.index(until) + 1]
    nodes: dict[str, Node] = {}
    facts = {variant: Facts.of(config, raw) for variant, config in job.variants.items()}
    job = _fitted(job, facts)
    for variant, config in job.variants.items():
        if checked and (facts[variant].rows or not assume):
            _check(wanted, config, facts[variant])
        own: dict[str, Node] = {}
        for stage in wanted:
            if stage.wanted(config) and not stage.of_job:
                found = _node(stage, config, own, raw, assume)
                node = nodes.setdefault(found.artifact.path, found)
                node.variants.append(variant)
                own[stage.name] = node
    of_job = [_node_of_job(stage, job, store, nodes) for stage in wanted if stage.of_job]
    ordered = sorted(nodes.values(), key=lambda node: NAMES.index(node.stage.name))
    return Plan(job, store, [*ordered, *of_job], facts, raw.uses, raw.passed_over)


def _fitted(job: Job, facts: dict[str, Facts]) -> Job:
    """The job with defaults for as many rows as there are; says what is not as for more."""
    found = {variant: fitted(config, facts[variant]) for variant, config in job.variants.items()}
    for line in dict.fromkeys(line for _, said in found.values() for line in said):
        log.info("small data: %s", line)
    return Job({variant: config for variant, (config, _) in found.items()})


def _check(wanted: Sequence[Stage], config: Config, facts: Facts) -> None:
    for stage in wanted:
        if stage.wanted(config):
            stage.check(config, facts)


def _node(stage: Stage, config: Config, own: dict[str, Node], raw: RawFiles, assume: bool) -> Node:
    """One stage of one variant; `own` holds the variant's stages before it."""
    used = stage.given(config, assume)
    if used is not None:
        return Node(stage, used, config, used.manifest().section, {})
    inputs = {
        name: own[source].artifact if isinstance(source, str) else source
        for name, source in stage.inputs(config).items()
    }
    ranges = stage.parts(config, raw)
    section = stage.identity(config, assume)
    name = _name(stage, section, inputs, raw.identity(ranges))
    return Node(stage, Artifact(raw.store, stage.name, name), config, section, inputs, ranges)


def _node_of_job(stage: Stage, job: Job, store: Store, nodes: dict[str, Node]) -> Node:
    """A stage that is made once, from everything; its inputs are named `variant/stage`."""
    inputs = {
        f"{variant}/{node.stage.name}": node.artifact
        for node in nodes.values()
        for variant in node.variants
    }
    section = stage.identity(job.first, False)
    artifact = Artifact(store, stage.name, _name(stage, section, inputs, []))
    return Node(stage, artifact, job.first, section, inputs, variants=list(job.variants))


def _name(
    stage: Stage, section: dict[str, Any], inputs: dict[str, Artifact], files: list[Any]
) -> str:
    return fingerprint(
        {
            "format": FORMAT,
            "stage": stage.name,
            "version": stage.version,
            "section": section,
            "inputs": {name: artifact.fingerprint for name, artifact in inputs.items()},
            "files": files,
        }
    )
