"""What a stage is given and what it gives back. Stages meet through committed artifacts only."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from s2l_ray.config import Config
from s2l_ray.contract.stage import Request
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import Info, SomeInfo, info_of
from s2l_ray.core.storage.manifest import FileEntry, Manifest, Part


@dataclass
class Work:
    """One artifact to make.

    Attributes:
        config: the variant's config.
        artifact: the place of what is made.
        inputs: the committed artifacts it is made from, by the names that its stage gave them.
        manifests: theirs.
        run: this run's id.
        ranges: parts of raw files, for stages that read them.
        section: what of the config names the artifact.
        version: of the stage.
        request: what of the cluster the stage may use at once.
        at_once: how many artifacts with an equal request may be made at the same time.
        remaining: how many artifacts with an equal request this run has not begun.
        passed_over: by section and URI, why a raw file that a folder or glob names is not read.
        started: time.time() when the making started.
        began: the same, of the first row.
    """

    config: Config
    artifact: Artifact
    inputs: dict[str, Artifact]
    manifests: dict[str, Manifest]
    run: str
    ranges: list[PartRange] = field(default_factory=list)
    section: dict[str, Any] = field(default_factory=dict)
    version: int = 0
    request: Request = field(default_factory=lambda: Request("nothing"))
    at_once: int = 1
    remaining: Callable[[], int] = lambda: 0
    passed_over: dict[str, dict[str, str]] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    began: float | None = None

    @property
    def label(self) -> str:
        return self.artifact.label

    def info(self, name: str, kind: type[SomeInfo]) -> SomeInfo:
        """The info of an input."""
        return info_of(self.manifests[name], kind)

    def rows_began(self, at: float) -> None:
        """Rows were worked on from this time.time() on; times of earlier runs do not count."""
        if at >= self.started:
            self.began = at if self.began is None else min(at, self.began)

    @property
    def start_seconds(self) -> float | None:
        """How long it took until the first row was worked on; None: no row was."""
        return None if self.began is None else round(self.began - self.started, 3)


@dataclass
class Outcome:
    """What was made: row-wise parts, other files, and facts for later stages and for people."""

    parts: list[Part] = field(default_factory=list)
    files: list[FileEntry] = field(default_factory=list)
    info: Info | None = None
