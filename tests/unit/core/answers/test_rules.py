"""The rules for answers, over a table of cases of our own."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from s2l_ray.core.answers import arithmetic, numeric, published
from s2l_ray.core.answers.verified import Verifier
from tests.unit.core.answers.cases import NUMERIC, PUBLISHED, VERIFIED


@pytest.mark.parametrize(("gold", "generated", "right"), NUMERIC)
def test_an_answer_is_right_by_its_value(gold: str, generated: str, right: bool) -> None:
    assert numeric.correct(generated, gold) is right


@pytest.mark.parametrize(("name", "gold", "generated", "right"), PUBLISHED)
def test_an_answer_is_right_by_the_published_rules(
    name: str, gold: str, generated: str, right: bool
) -> None:
    assert published.correct(name, generated, gold) is right


def test_there_are_two_hundred_cases_and_more() -> None:
    assert len(NUMERIC) + len(PUBLISHED) + len(VERIFIED) > 250


def test_arithmetic_runs_no_code_and_ends() -> None:
    assert arithmetic.value_of("2**3*(1+1)") == 16
    assert arithmetic.value_of("2^10") == 8
    assert arithmetic.value_of("1<2<3") is True
    for text in ("9**9**9", "1<<10**9", "f(1)", "().__class__", "[].append(1)", "'a'*9", "1/0"):
        assert arithmetic.value_of(text) is None
    assert arithmetic.value_of("7" + "*7" * 1000) is None


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(seconds=60) as opened:
        yield opened


@pytest.mark.parametrize(("gold", "generated", "right"), VERIFIED)
def test_an_answer_is_right_by_math_verify(
    verifier: Verifier, gold: str, generated: str, right: bool
) -> None:
    assert verifier.correct(generated, gold) is right


def test_math_verify_answers_off_the_main_thread(verifier: Verifier) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(verifier.correct("$x+1$", "1+x")))
    thread.start()
    thread.join()
    assert found == [True]


def test_a_pair_that_takes_too_long_is_wrong_and_counted() -> None:
    with Verifier(seconds=60) as verifier:
        assert verifier.correct("The answer is 3", "3")
        assert verifier._process is not None
        os.kill(verifier._process.pid, signal.SIGSTOP)
        verifier.seconds = 0.05
        assert not verifier.correct("The answer is 3", "3")
        verifier.seconds = 60
        assert verifier.correct("The answer is 3", "3")
        assert verifier.stopped == 1
