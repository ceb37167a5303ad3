"""A whole config, what must fit together in it, and a job: a config with variants."""

from pydantic import Field, model_validator

from s2l_ray.config import expressions
from s2l_ray.config.clustering import Clusters
from s2l_ray.config.data import Evaluation, Examples, Report, Run
from s2l_ray.config.rules import FACILITY_LOCATION, RULES, Subset
from s2l_ray.config.scaling import Scaling, TrainingWorkers
from s2l_ray.config.section import Section
from s2l_ray.config.training import Proxy, Target, Training, Trajectories


class Config(Section):
    """One fully resolved variant of a job."""

    run: Run = Field(default_factory=Run)
    examples: Examples = Field(default_factory=Examples)
    proxy: Proxy
    trajectories: Trajectories = Field(default_factory=Trajectories)
    clusters: Clusters = Field(default_factory=Clusters)
    subset: Subset = Field(default_factory=Subset)
    target: Target | None = Field(
        None, description="without this section the job ends at the subset"
    )
    evaluation: Evaluation | None = Field(
        None, description="without this section nothing is evaluated"
    )
    report: Report = Field(default_factory=Report)
    scaling: Scaling = Field(default_factory=Scaling)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        problems = []
        for member in self.proxy.each():
            problems += _batch_problem("proxy", member, self.scaling.proxy)
            given = "checkpoints" in member.model_fields_set
            # The default scales down with the steps (pipeline/small_data.py).
            if given and member.steps is not None and member.checkpoints > member.steps:
                problems.append(
                    f"proxy.checkpoints: expected at most proxy.steps = {member.steps}, got "
                    f"{member.checkpoints}"
                )
        if self.target is not None:
            problems += _batch_problem("target", self.target, self.scaling.target)
        if self.evaluation is not None and self.target is None:
            problems.append(
                "evaluation: there is no target section, so there is nothing to evaluate"
            )
        if self.evaluation is not None and not self.evaluation.files:
            problems.append("evaluation.files: expected at least one held-out file, folder or glob")
        if self.target is not None and self.target.validation and self.evaluation is None:
            problems.append(
                "target.validation: expected evaluation.files, from which its rows are; there is "
                "no evaluation section"
            )
        problems += _feature_problems(self.clusters, self.proxy)
        if not (self.examples.files or self.examples.dataset or self.examples.expected_rows):
            problems.append(
                "examples.files: expected at least one file, folder or glob (or examples.dataset)"
            )
        problems += _rule_problem(self.subset, self.trajectories)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _rule_problem(subset: Subset, trajectories: Trajectories) -> list[str]:
    if subset.rule == FACILITY_LOCATION:
        return []
    rule = RULES[subset.rule] if isinstance(subset.rule, str) else subset.rule
    names = expressions.parse(rule.score).names & set(expressions.STATISTICS)
    missing = sorted(names - set(trajectories.statistics))
    if not missing:
        return []
    name = repr(subset.rule if isinstance(subset.rule, str) else rule.score)
    stored = ", ".join([*trajectories.statistics, *missing])
    return [
        f"subset.rule: {name} reads {', '.join(missing)}, which is not stored. Set "
        f"trajectories.statistics to [{stored}]"
    ]


def _batch_problem(section: str, training: Training, scaling: TrainingWorkers) -> list[str]:
    workers, micro_batch = scaling.workers, scaling.micro_batch
    if not training.trained or training.global_batch % (workers * micro_batch) == 0:
        return []
    return [
        f"{section}.global_batch: expected a multiple of scaling.{section}.workers x "
        f"scaling.{section}.micro_batch = {workers} x {micro_batch}, got {training.global_batch}"
    ]


def _feature_problems(clusters: Clusters, proxy: Proxy) -> list[str]:
    """What the checkpoints do not allow; those of a proxy that is used are not in the config."""
    if proxy.use is not None:
        return []
    checkpoints = [member.checkpoints for member in proxy.each()]
    most = min(checkpoints) + clusters.initial
    if isinstance(clusters.steps, int) and clusters.steps > most:
        return [
            f"clusters.steps: expected at most {most}, the steps of every proxy "
            f"(proxy.checkpoints), got {clusters.steps}"
        ]
    columns = clusters.num_features(checkpoints)
    if clusters.weights is not None and len(clusters.weights) != columns:
        return [
            f"clusters.weights: expected {columns} numbers, one for every step that is clustered, "
            f"got {len(clusters.weights)}"
        ]
    return []


class Job:
    """A config with variants, each fully resolved, by name; all share `run` and `scaling`."""

    def __init__(self, variants: dict[str, Config]) -> None:
        self.variants = variants

    @property
    def first(self) -> Config:
        return next(iter(self.variants.values()))
