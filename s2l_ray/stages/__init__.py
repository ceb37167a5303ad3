"""The stages in their order. A new stage is a folder beside these and one line here."""

from s2l_ray.contract.stage import Stage
from s2l_ray.stages.clusters.stage import CLUSTERS
from s2l_ray.stages.evaluation.stage import EVALUATION
from s2l_ray.stages.examples.stage import EXAMPLES
from s2l_ray.stages.proxy.stage import PROXY
from s2l_ray.stages.report.stage import REPORT
from s2l_ray.stages.subset.stage import SUBSET
from s2l_ray.stages.target.stage import TARGET
from s2l_ray.stages.trajectories.stage import TRAJECTORIES

STAGES: tuple[Stage, ...] = (
    EXAMPLES,
    PROXY,
    TRAJECTORIES,
    CLUSTERS,
    SUBSET,
    TARGET,
    EVALUATION,
    REPORT,
)
