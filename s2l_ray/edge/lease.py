"""One job of a Ray cluster makes an artifact; the others wait for it."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from s2l_ray.core.storage.artifact import Artifact

log = logging.getLogger("s2l_ray")


SECONDS_BETWEEN_CLAIMS = 0.5


@contextlib.contextmanager
def lease(artifact: Artifact) -> Iterator[None]:
    """Be the only job of this Ray cluster that makes `artifact`; waits for another that does.

    The lease is the name of a placement group, which Ray gives once, and takes back from a job that
    died. It needs no process; a named actor would take 0.6 s to start for every artifact.
    """
    place = hashlib.sha256(artifact.store.uri.encode()).hexdigest()[:12]
    name = f"{place}-{artifact.stage}-{artifact.fingerprint}"
    held = _claimed(name)
    if held is None:
        log.info("%s: another job makes it; waiting", artifact.label)
    while held is None:
        time.sleep(SECONDS_BETWEEN_CLAIMS)
        held = _claimed(name)
    try:
        yield
    finally:
        remove_placement_group(held)


def _claimed(name: str) -> PlacementGroup | None:
    """A placement group of this name, unless there is one."""
    try:
        # It may wait for its byte of memory; the name is taken at once.
        return placement_group([{"memory": 1}], name=name)
    except ray.exceptions.RaySystemError as error:
        if "already exists" not in str(error):
            raise
        return None
