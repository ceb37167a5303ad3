"""Workers and their readers are counted host by host, for clusters of many shapes."""

import dataclasses
import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.contract.stage import Request
from s2l_ray.edge.packing import (
    SHARES,
    Host,
    actor_share,
    holds,
    most,
    readers_left,
    worker_share,
)
from s2l_ray.edge.placement import actor_cpus, worker_cpus
from s2l_ray.edge.waiting import Patience
from s2l_ray.errors import UserError

READER = 0.25
CPUS = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
CLUSTERS = st.lists(st.builds(Host, CPUS, st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=4)


def by_hand(hosts: list[Host], workers: int, cpus: float, gpus: float) -> list[int]:
    """Readers that find room under every placement of the workers, tried one by one."""
    found = []
    for numbers in itertools.product(range(workers + 1), repeat=len(hosts)):
        placed = list(zip(hosts, numbers, strict=True))
        if sum(numbers) == workers and all(
            n * cpus <= host.cpus + 1e-9 and n * gpus <= host.gpus for host, n in placed
        ):
            found.append(sum(int((h.cpus - n * cpus + 1e-9) / READER) for h, n in placed))
    return found


@given(
    CLUSTERS, st.integers(1, 5), st.sampled_from([*SHARES, 0.83, 0.3]), st.sampled_from([0.0, 1.0])
)
def test_the_fewest_readers_are_those_of_the_worst_placement(
    hosts: list[Host], workers: int, cpus: float, gpus: float
) -> None:
    found = by_hand(hosts, workers, cpus, gpus)
    assert readers_left(hosts, workers, cpus, gpus, READER) == (min(found) if found else None)
    assert (holds(hosts, cpus, gpus) >= workers) == bool(found)


@given(CLUSTERS, st.integers(1, 5), st.sampled_from([0.0, 1.0]), st.integers(1, 4))
def test_the_share_of_a_worker_is_the_largest_that_leaves_room_for_readers(
    hosts: list[Host], workers: int, gpus: float, readers: int
) -> None:
    share = worker_share(hosts, workers, gpus, READER, readers)
    for each in SHARES[: None if share is None else SHARES.index(share)]:
        found = by_hand(hosts, workers, each, gpus)
        assert not found or min(found) < readers
    assert share is None or min(by_hand(hosts, workers, share, gpus)) >= readers


@pytest.mark.parametrize(
    ("hosts", "workers", "share"),
    [
        # Equal shares of what is left in the cluster, 0.83 and 0.96, leave no host a reader's 0.25.
        ([1, 1, 1], 3, 0.75),
        ([4, 4, 4, 4], 16, 0.75),
        ([1], 1, 0.5),
        ([1], 2, 0.25),
        ([1], 3, 0.15),
        ([2], 1, 1.0),
        ([2], 2, 0.75),
        ([8, 0], 4, 1.0),
        ([0.25], 1, None),
        ([2.5, 2.5], 4, 1.0),
        ([64] * 100, 800, 1.0),
    ],
)
def test_workers_of_known_clusters(hosts: list[float], workers: int, share: float | None) -> None:
    assert worker_share([Host(cpus) for cpus in hosts], workers, 0.0, READER, 2) == share


def test_actors_that_are_needed_at_once_fit_on_single_hosts() -> None:
    three = [Host(1.0)] * 3
    assert actor_share(three, 3, 0.9) == 0.9
    # An equal share, 0.67, would fit once on each host.
    assert actor_share(three, 4, 0.67) == 0.5
    assert actor_share([Host(0.005)], 1, 0.5) is None
    assert [most(Host(96.0, 8.0), 10.0, gpus) for gpus in (0.0, 1.0, 2.0)] == [9, 8, 4]
    assert most(Host(1.0, 2.0), 0.0, 0.5) == 4


def test_whoever_waits_says_for_what_and_ends_when_it_cannot_come(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="s2l_ray")
    lacking = iter([None, None, "3 needed, 2 left", None, "3 needed, 2 left", "3 needed, 1 left"])
    patience = Patience("clusters c", "3 shards", lambda: next(lacking))
    for _ in range(5):
        patience.tick()
    with pytest.raises(UserError, match="3 needed, 1 left"):
        patience.tick()
    assert [record.message for record in caplog.records] == [
        "clusters c: waiting for 3 shards",
        *["clusters c: waiting for hosts to come back: 3 needed, 2 left"] * 2,
    ]


def test_only_hosts_with_the_labels_count() -> None:
    found = [Host(8, 8, {"pool": "proxy"}), Host(4, 1, {"pool": "target", "zone": "a"})]
    target = Request("workers", 1, 1.0, 1.0, labels=(("pool", "target"),), stage="target")
    assert worker_cpus(target, 1, found) == 1.0
    two = dataclasses.replace(target, count=2)
    with pytest.raises(
        UserError, match=r"2 workers on hosts with pool=target .* more than the 1 GPUs"
    ):
        worker_cpus(two, 1, found)
    scorers = dataclasses.replace(two, kind="actors", labels=(("pool", "none"),))
    with pytest.raises(UserError, match=r"on hosts with pool=none need"):
        actor_cpus(scorers, found)
    # What the labels of a host are, or what Ray makes of an expression, is not known.
    assert worker_cpus(two, 1, [Host(8, 8)]) == 1.0
    some = dataclasses.replace(two, labels=(("pool", "!target"),))
    assert worker_cpus(some, 1, found) == 1.0


def test_readers_of_a_training_on_some_hosts_find_room_on_the_others() -> None:
    found = [Host(1, 1, {"pool": "target"}), Host(4, 0, {})]
    target = Request("workers", 1, 1.0, 1.0, labels=(("pool", "target"),), stage="target")
    assert worker_cpus(target, 1, found) == 1.0
    with pytest.raises(UserError, match="must find room beside"):
        worker_cpus(target, 1, found[:1])
