"""Manifests and committed artifacts for tests: what the pipeline makes of a stage's outcome, less
what is only for people.
"""

from typing import Any

from s2l_ray.contract.work import Outcome
from s2l_ray.core.storage import info
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import Info, SomeInfo, stored
from s2l_ray.core.storage.manifest import FORMAT, Manifest

TRAINING: dict[str, Any] = {
    "total_steps": 0, "examples": 0, "tokens": 0, "parameters": None, "flops": None,
    "train_seconds": 0.0,
    "wait_seconds": 0.0, "curve": info.Curve(step=[], loss=[], learning_rate=[]),
}  # fmt: skip
PLAIN: dict[type[Info], dict[str, Any]] = {
    info.ExamplesInfo: {
        "sources": {}, "rejects": {}, "files": [], "next_file_number": 0, "new_files": [],
        "dropped_files": [], "schema": "",
    },
    info.ProxyMember: {**TRAINING, "steps": [0], "folders": ["step-0"]},
    info.ProxyInfo: {"members": [], "flops": None},
    info.TargetInfo: {**TRAINING, "model": "model"},
    info.TrajectoriesInfo: {
        "steps": [], "statistics": [], "scored": 0, "sources": {}, "left_out": {}, "tokens": 0,
        "learned_tokens": 0, "flops": None,
    },
    info.ClustersInfo: {
        "k": 0, "cluster_sources": [], "fewer": {}, "centroids": [], "spread": [], "sizes": [],
        "objective": 0.0, "objectives": [], "moves": [], "reseeded": 0, "converged": True,
        "features": "raw", "steps": [],
    },
}  # fmt: skip


def info_with(kind: type[SomeInfo], **fields: Any) -> SomeInfo:
    """An info with nothing in it but the given fields."""
    return kind(**{**PLAIN[kind], **fields})


def manifest(stage: str, **fields: Any) -> Manifest:
    """A manifest with nothing in it but the given fields."""
    plain: dict[str, Any] = {
        "format": FORMAT, "stage": stage, "fingerprint": "f", "inputs": {}, "section": {},
        "parts": [], "files": [],
        "info": {}, "seconds": 0.0, "run": "", "made_at": "", "scaling": {}, "versions": {},
    }  # fmt: skip
    if isinstance(fields.get("info"), Info):
        fields["info"] = stored(fields["info"])
    return Manifest(**{**plain, **fields})


def commit(artifact: Artifact, outcome: Outcome | None = None, **fields: Any) -> Manifest:
    """Commit an artifact with the outcome of its stage, and further fields of the manifest."""
    made = {name: value for name, value in vars(outcome or Outcome()).items() if value is not None}
    result = manifest(artifact.stage, fingerprint=artifact.fingerprint, **made, **fields)
    artifact.commit(result)
    return result
