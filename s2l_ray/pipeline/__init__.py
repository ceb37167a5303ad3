"""The plan of a job, and the loop that reuses or makes its artifacts."""

from s2l_ray.pipeline.planning import NAMES, STAGES, Done, Node, Plan, plan, run, versions

__all__ = ["NAMES", "STAGES", "Done", "Node", "Plan", "plan", "run", "versions"]
