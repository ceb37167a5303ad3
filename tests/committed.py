"""Manifests and committed artifacts for tests: what the pipeline makes of a stage's outcome, less
what is only for people.
"""

from typing import Any

from s2l_ray.contract.work import Outcome
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import stored
from s2l_ray.core.storage.manifest import FORMAT, Manifest


def manifest(stage: str, **fields: Any) -> Manifest:
    """A manifest with nothing in it but the given fields."""
    plain: dict[str, Any] = {
        "format": FORMAT, "stage": stage, "fingerprint": "f", "inputs": {}, "section": {},
        "parts": [], "files": [],
        "info": {}, "seconds": 0.0, "run": "", "made_at": "", "scaling": {}, "versions": {},
    }  # fmt: skip
    return Manifest(**{**plain, **fields})


def commit(artifact: Artifact, outcome: Outcome | None = None, **fields: Any) -> Manifest:
    """Commit an artifact with the outcome of its stage, and further fields of the manifest."""
    made = {**vars(outcome), "info": stored(outcome.info)} if outcome is not None else {}
    result = manifest(artifact.stage, fingerprint=artifact.fingerprint, **made, **fields)
    artifact.commit(result)
    return result
