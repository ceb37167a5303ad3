"""Progress of long work: how much is done, at what rate, and how long it will take. A bar on a terminal, lines in a log."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger("s2l_ray")
SECONDS_BETWEEN_LINES = 15.0


class Tracker:
    """Counts finished units; `note` is a short word on the state of things, such as the loss."""

    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.first, self.began, self.last_line = done, time.monotonic(), time.monotonic()
        self.bar: Progress | None = None

    def advance(self, units: int = 1, note: str = "") -> None:
        """Say that `units` more are done."""
        self.done += units
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, note=note)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            log.info("%s: %s", self.label, self.line(note))

    def line(self, note: str = "") -> str:
        """Done of total, rate, time left."""
        rate = (self.done - self.first) / max(1e-9, time.monotonic() - self.began)
        left = f"{(self.total - self.done) / rate:,.0f} s left" if rate > 0 else "time left unknown"
        return (
            f"{self.done:,} of {self.total:,} {self.unit}, {rate:,.1f}/s, {left}{', ' + note if note else ''}"
        )


@contextmanager
def track(label: str, total: int, unit: str, done: int = 0) -> Iterator[Tracker]:
    """Follow `total` units of work, `done` of which an earlier run finished."""
    tracker = Tracker(label, total, unit, done)
    if not sys.stderr.isatty():
        yield tracker
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True
    ) as bar:
        bar.add_task(label, total=total, completed=done, note="")
        tracker.bar = bar
        yield tracker
