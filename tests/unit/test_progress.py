"""Progress on a terminal and in a log."""

import logging
import sys

import pytest

from s2l_ray import progress


@pytest.fixture
def terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What progress looks at: a terminal, and a log that takes more than warnings."""
    caplog.set_level(logging.INFO, logger="s2l_ray")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


@pytest.mark.usefixtures("terminal")
def test_bars_of_several_trainings_share_one_screen() -> None:
    with progress.track("target a", 10, "steps", 4) as one:
        screen = progress._bars.screen
        with progress.track("target b", 5, "steps") as other:
            assert progress._bars.screen is screen is not None
            one.advance(2, "loss 1.5")
            other.advance()
            assert [(task.description, task.completed) for task in screen.tasks] == [
                ("target a", 6),
                ("target b", 1),
            ]
            assert screen.tasks[0].fields["note"] == "loss 1.5"
        assert [task.description for task in screen.tasks] == ["target a"]
    assert progress._bars.screen is None


@pytest.mark.usefixtures("terminal")
def test_a_failure_takes_its_bar_away() -> None:
    with pytest.raises(ValueError, match="no rows"), progress.track("examples", 3, "parts"):
        raise ValueError("no rows")
    assert progress._bars.screen is None


def test_a_log_gets_a_line_at_times(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with (
        caplog.at_level(logging.INFO, logger="s2l_ray"),
        progress.track("proxy", 8, "steps", 2) as tracker,
    ):
        tracker.advance(1, "loss 2.1")
        tracker.advance(1, "loss 2.0")
    assert "proxy: 3 of 8 steps, time left unknown, loss 2.1" in caplog.text
    assert "proxy: 4 of 8 steps, " in caplog.text
    assert "s left, loss 2.0" in caplog.text


def test_what_came_before_the_first_unit_does_not_count_for_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tracker = progress.Tracker("target", 100, "steps", 0)
    for now[0], steps in ((60.0, 1), (70.0, 20)):
        tracker.advance(steps)
    assert tracker.line() == "21 of 100 steps, 2.0/s, 40 s left"
