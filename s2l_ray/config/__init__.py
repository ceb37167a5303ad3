"""The configuration of a job: a YAML file with a section per artifact, dotted overrides, variants.

Everything that can be known to be wrong from the config alone is refused here, in one message that
lists every problem. `scaling` says where and how fast; it is recorded, never hashed. All other
sections enter the names of the artifacts.
"""

from s2l_ray.config.clustering import Clusters
from s2l_ray.config.data import Columns, Evaluation, Examples, Report, Run
from s2l_ray.config.job import Config, Job
from s2l_ray.config.loading import load, with_overrides
from s2l_ray.config.messages import describe
from s2l_ray.config.rules import FACILITY_LOCATION, GROUPS, RULES, Rule, Subset, group_kind
from s2l_ray.config.scaling import ModelWorkers, Scaling, ShardWorkers, TrainingWorkers
from s2l_ray.config.section import MAX_ROWS_PER_PART, Section, merge
from s2l_ray.config.training import (
    Adapter,
    Model,
    Proxy,
    Statistic,
    Target,
    Training,
    Trajectories,
    Validation,
)

__all__ = [
    "FACILITY_LOCATION",
    "GROUPS",
    "MAX_ROWS_PER_PART",
    "RULES",
    "Adapter",
    "Clusters",
    "Columns",
    "Config",
    "Evaluation",
    "Examples",
    "Job",
    "Model",
    "ModelWorkers",
    "Proxy",
    "Report",
    "Rule",
    "Run",
    "Scaling",
    "Section",
    "ShardWorkers",
    "Statistic",
    "Subset",
    "Target",
    "Training",
    "TrainingWorkers",
    "Trajectories",
    "Validation",
    "describe",
    "group_kind",
    "load",
    "merge",
    "with_overrides",
]
