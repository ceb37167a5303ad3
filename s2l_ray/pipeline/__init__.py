"""The plan of a job, and the loop that reuses or makes its artifacts."""

from s2l_ray.pipeline.execution import Done, run
from s2l_ray.pipeline.planning import NAMES, Node, Plan, plan

__all__ = ["NAMES", "Done", "Node", "Plan", "plan", "run"]
