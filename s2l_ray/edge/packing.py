"""What fits on the hosts of a cluster, counted host by host, in whole numbers. Knows no Ray.

What is left in a cluster is of no use where each host has too little of it: three workers of 0.83
CPUs on three hosts of one leave 0.5 CPUs, and no place for a reader of 0.25.

Shapes: W + 1 numbers of workers, from none to all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Of a CPU, as finely as Ray counts.
UNITS = 10_000
# What a process may be given of a CPU where nothing is asked for. Those of a quarter and more are
# whole readers' shares, so that what they leave on a host can be used.
SHARES = (1.0, 0.75, 0.5, 0.25, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01)


@dataclass(frozen=True)
class Host:
    """CPUs and GPUs of one host, and its labels in Ray; None: they are not known."""

    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] | None = field(default=None, hash=False)

    def has(self, labels: Iterable[tuple[str, str]]) -> bool:
        """Whether it may have these labels. What Ray writes as an expression is left to Ray."""
        return self.labels is None or all(
            value.startswith(("!", "in(")) or self.labels.get(name) == value
            for name, value in labels
        )


def _units(amount: float) -> int:
    return round(amount * UNITS)


def most(host: Host, cpus: float, gpus: float = 0.0) -> int:
    """How many processes of this size a host holds; each asks for CPUs or GPUs."""
    by_cpus = _units(host.cpus) // _units(cpus) if _units(cpus) else None
    by_gpus = _units(host.gpus) // _units(gpus) if _units(gpus) else None
    return min(limit for limit in (by_cpus, by_gpus) if limit is not None)


def holds(hosts: Sequence[Host], cpus: float, gpus: float = 0.0) -> int:
    """How many processes of this size all hosts hold."""
    return sum(most(host, cpus, gpus) for host in hosts)


def readers_left(
    hosts: Sequence[Host], workers: int, cpus: float, gpus: float, reader: float
) -> int | None:
    """How many readers find room beside workers, wherever Ray places these.

    Args:
        cpus: of one worker.
        gpus: of one worker.
        reader: CPUs of one reader.

    Returns:
        The fewest over all placements; None: the workers themselves do not fit.
    """
    impossible = np.iinfo(np.int64).max // 2
    fewest = np.full(workers + 1, impossible, np.int64)
    fewest[0] = 0
    for host in hosts:
        before, room = fewest, _units(host.cpus)
        fewest = before + room // _units(reader)
        for number in range(1, min(workers, most(host, cpus, gpus)) + 1):
            left = (room - number * _units(cpus)) // _units(reader)
            fewest[number:] = np.minimum(fewest[number:], before[:-number] + left)
    found = int(fewest[workers])
    return found if found < impossible else None


def worker_share(
    hosts: Sequence[Host], workers: int, gpus: float, reader: float, readers: int
) -> float | None:
    """The largest of SHARES beside which so many readers find room; None: not even the smallest."""
    for share in SHARES:
        left = readers_left(hosts, workers, share, gpus, reader)
        if left is not None and left >= readers:
            return share
    return None


def actor_share(hosts: Sequence[Host], count: int, most_cpus: float) -> float | None:
    """The largest share, at most `most_cpus`, of which the hosts hold so many; None: none."""
    shares = (most_cpus, *(share for share in SHARES if share < most_cpus))
    return next((share for share in shares if holds(hosts, share) >= count), None)
