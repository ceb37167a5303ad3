"""What every bench shares: sides measured in turn in one run, the machine, a table for people and
one last line of JSON for machines.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def in_turn(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every side, `repeats` times, the sides one after the other in each round, so that
    a noisy machine is noisy for all.

    Args:
        warm_up: run each side once before, unmeasured. clock: time.process_time counts the
        processor's seconds instead, where all work is done in this process; other work on the
            machine matters less then.
    """
    if warm_up:
        for side in sides.values():
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            began = clock()
            side()
            seconds[name].append(clock() - began)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of one side's seconds divided by the other's in the same round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def machine() -> dict[str, Any]:
    """The machine, as far as it matters to figures."""
    name = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    memory = next(
        (int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0
    )
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20, 1),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table: texts to the left, numbers to the right with four digits."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        texts = all(isinstance(row[number], str) for row in rows)
        table.add_column(column, justify="left" if texts else "right")
    for row in rows:
        table.add_row(
            *(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row)
        )
    Console(width=max(118, Console().width)).print(table)


def finish(bench: str, **result: Any) -> None:
    """The last line: everything as one JSON object, with the machine."""
    print(json.dumps({"bench": bench, "machine": machine(), **result}))
