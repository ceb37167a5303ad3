"""Gives the tests of this folder a Ray cluster, and skips them, with the reason, where hosts cannot
be made.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_not
from tests.cluster.ray_hosts import RayHosts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    if reason and "S2L_RAY_CI" in os.environ:
        raise pytest.UsageError(f"the cluster tests must run in CI, but {reason}")
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def ray_hosts() -> Iterator[RayHosts]:
    """Three hosts with Ray, shared by the tests of a module, which leave it as they found it."""
    with Hosts(3) as hosts:
        cluster = RayHosts(hosts)
        for i in hosts.numbers:
            cluster.start(i)
        cluster.wait_for_nodes(hosts.numbers)
        yield cluster
