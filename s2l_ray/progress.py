"""Progress of long work: how much is done, at what rate, and how long it will take.

It is a bar on a terminal, and lines in a log elsewhere.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from s2l_ray.display import Console

log = logging.getLogger("s2l_ray")
SECONDS_BETWEEN_LINES = 15.0


class Tracker:
    """Counts finished units; `note` is a short word on the state of things, such as the loss."""

    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.last_line = time.monotonic()
        # Units done and time when the first one was: it waits for what must start, which says
        # nothing about those after it.
        self.first: tuple[int, float] | None = None
        # Set where there is a bar.
        self.show: Callable[[str], None] | None = None

    def advance(self, units: int = 1, note: str = "") -> None:
        """Say that `units` more are done."""
        self.done += units
        if self.first is None:
            self.first = self.done, time.monotonic()
        if self.show is not None:
            self.show(note)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            log.info("%s: %s", self.label, self.line(note))

    def line(self, note: str = "") -> str:
        """Done of total, rate, time left."""
        done, began = self.first or (self.done, 0.0)
        rate = (self.done - done) / max(1e-9, time.monotonic() - began)
        left = (
            f"{rate:,.1f}/s, {(self.total - self.done) / rate:,.0f} s left"
            if rate
            else "time left unknown"
        )
        return f"{self.done:,} of {self.total:,} {self.unit}, {left}{', ' + note if note else ''}"


class _Bars:
    """The bars of all work of this process, on one screen, which exists while any bar does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.screen: Progress | None = None

    def add(self, label: str, total: int, unit: str, done: int) -> tuple[Progress, TaskID]:
        with self.lock:
            if self.screen is None:
                self.screen = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[unit]}", markup=False),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}", markup=False),
                    console=Console(stderr=True),
                    transient=True,
                )
                self.screen.start()
            return self.screen, self.screen.add_task(
                label, total=total, completed=done, unit=unit, note=""
            )

    def remove(self, task: TaskID) -> None:
        with self.lock:
            assert self.screen is not None
            self.screen.remove_task(task)
            if not self.screen.tasks:
                self.screen.stop()
                self.screen = None


_bars = _Bars()


@contextmanager
def track(label: str, total: int, unit: str, done: int = 0) -> Iterator[Tracker]:
    """Follow `total` units of work, `done` of which an earlier run finished."""
    tracker = Tracker(label, total, unit, done)
    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        yield tracker
        return
    screen, task = _bars.add(label, total, unit, done)
    tracker.show = lambda note: screen.update(task, completed=tracker.done, note=note)
    try:
        yield tracker
    finally:
        _bars.remove(task)
