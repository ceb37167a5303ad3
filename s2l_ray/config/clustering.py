"""The section `clusters`: what of a trajectory is clustered, and how."""

from typing import Literal

from pydantic import Field, model_validator

from s2l_ray.config.section import MAX_ROWS_PER_PART, Section, Seed, short


class Clusters(Section):
    k: int = Field(
        100,
        ge=1,
        le=MAX_ROWS_PER_PART,
        description="number of k-means groups, of each source with within: source",
    )
    within: Literal["all", "source"] = Field(
        "all", description="cluster all rows together, or those of each source by themselves"
    )
    features: Literal["raw", "centred", "differences", "zscored", "relative"] = Field(
        "raw",
        description="what of a trajectory is clustered: its losses, these less their mean, their "
        "differences, centred and divided by their standard deviation, or divided by the first "
        "loss",
    )
    steps: int | list[int] | None = Field(
        None,
        description="which steps make the trajectory: exactly so many, evenly spaced and with the "
        "last, or these; default: all",
    )
    initial: bool = Field(
        False, description="let trajectories begin with the loss before training (step 0)"
    )
    weights: list[float] | None = Field(
        None,
        description="weight of each of the trajectory's steps (features are multiplied by its "
        "root)",
    )
    points_per_centroid: int | None = Field(
        None,
        ge=1,
        description="find the centroids on at most k times so many rows; default: on all",
    )
    use: str | None = Field(
        None,
        description="URI of a committed clusters artifact, whose centroids are taken instead of "
        "new ones",
    )
    refine: bool = Field(
        False,
        description="with use: go on from these centroids; otherwise they are kept as they are",
    )
    max_rounds: int = Field(100, ge=1, description="most rounds of k-means")
    tolerance: float = Field(
        1e-4,
        ge=0,
        description="stop when no centroid moves further than this, relative to the data's spread",
    )
    seed: Seed = Field(0, description="seed of the start (k-means++)")

    @model_validator(mode="after")
    def _features_can_be_made(self) -> "Clusters":
        problems = []
        named = self.steps if isinstance(self.steps, list) else []
        if self.steps == [] or len(set(named)) < len(named) or min(named, default=0) < 0:
            problems.append(
                f"steps: expected distinct step numbers from 0, got {short(self.steps)}"
            )
        fewest = 1 + (self.initial or self.features != "raw")
        if isinstance(self.steps, int) and self.steps < fewest:
            problems.append(
                f"steps: expected at least {fewest} with features: {self.features} and initial: "
                f"{str(self.initial).lower()}, got {self.steps}"
            )
        if self.weights is not None and (min(self.weights, default=0) < 0 or not any(self.weights)):
            problems.append(
                f"weights: expected numbers from 0, not all of them 0, got {short(self.weights)}"
            )
        if self.refine and self.use is None:
            problems.append(
                "refine: expected clusters.use, the artifact whose centroids are refined"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def num_features(self, checkpoints: list[int]) -> int:
        """Columns that are clustered, from each proxy's number of steps after step 0."""
        if isinstance(self.steps, list):
            chosen = [len({*self.steps, *([0] if self.initial else [])})] * len(checkpoints)
        else:
            chosen = [
                count + self.initial if self.steps is None else self.steps for count in checkpoints
            ]
        return sum(count - (self.features == "differences") for count in chosen)
