"""Things are made in order, side by side where they may be, and an error loses nothing that was
being made.
"""

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.pipeline.task_graph import in_order, unrelated

TARGETS = {
    "examples": set[str](),
    "proxy": {"examples"},
    "all": {"proxy"},
    "few": {"proxy"},
    "other proxy": {"examples"},
    "report": {"all", "few", "other proxy"},
}


@st.composite
def graphs(draw: Any) -> dict[str, set[str]]:
    """Up to eight things, each needing some of those before it."""
    names = [str(number) for number in range(draw(st.integers(0, 8)))]
    return {
        name: draw(st.sets(st.sampled_from(names[:number]))) if number else set()
        for number, name in enumerate(names)
    }


@settings(deadline=None)
@given(graphs(), st.integers(1, 4))
def test_each_is_made_once_and_after_what_it_needs(
    needs: dict[str, set[str]], at_once: int
) -> None:
    made: list[str] = []

    def make(name: str) -> None:
        assert needs[name] <= set(made)
        made.append(name)

    in_order(needs, make, at_once)
    assert sorted(made) == sorted(needs)


def test_one_at_a_time_keeps_the_order_given() -> None:
    made: list[str] = []
    in_order({"b": {"elsewhere"}, "a": set(), "d": {"c"}, "c": set()}, made.append, 1)
    assert made == ["b", "a", "c", "d"]


def test_what_needs_nothing_of_one_another_is_made_at_the_same_time() -> None:
    # broken, and so an error, unless two wait at it
    together = threading.Barrier(2, timeout=20)
    in_order(
        {"a": set(), "b": set(), "c": set(), "d": set()}, lambda name: together.wait() and None, 2
    )


def test_no_more_are_made_at_once_than_may_be() -> None:
    lock, now, most = threading.Lock(), set[str](), []
    both_in = threading.Barrier(2, timeout=20)

    def make(name: str) -> None:
        with lock:
            now.add(name)
            most.append(len(now))
        both_in.wait()
        with lock:
            now.remove(name)

    in_order({str(number): set() for number in range(6)}, make, 2)
    assert max(most) == 2


def test_what_is_still_being_made_counts_when_another_one_has_ended() -> None:
    third_ended, fourth_began, early = threading.Event(), threading.Event(), []

    def make(name: str) -> None:
        if name == "slow":
            assert third_ended.wait(20)
        if name == "third":
            # It would begin at once, beside this one and the slow one.
            early.append(fourth_began.wait(0.2))
            third_ended.set()
        if name == "fourth":
            fourth_began.set()

    in_order({"slow": set(), "quick": set(), "third": set(), "fourth": set()}, make, 2)
    assert early == [False]


def test_after_an_error_what_is_being_made_is_finished_and_nothing_begun() -> None:
    made: list[str] = []
    failed = threading.Event()

    def make(name: str) -> None:
        if name == "bad":
            failed.set()
            raise ValueError("bad rows")
        assert failed.wait(20)
        made.append(name)

    with pytest.raises(ValueError, match="bad rows"):
        in_order({"bad": set(), "slow": set(), "later": set(), "of slow": {"slow"}}, make, 2)
    assert made == ["slow"]


def test_unrelated_are_those_that_could_be_made_at_the_same_time() -> None:
    assert unrelated("all", TARGETS, TARGETS) == {"few", "other proxy"}
    assert unrelated("all", TARGETS, {"all", "few"}) == {"few"}
    assert unrelated("proxy", TARGETS, TARGETS) == {"other proxy"}
    assert unrelated("report", TARGETS, TARGETS) == set()
