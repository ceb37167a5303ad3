"""The order in which training sees the data: a pure function of seed, parts and step (design, section 3, "Training").

In each epoch the parts come in keyed order, rows are shuffled inside windows of parts, and the stream is cut into global
batches; a batch may reach into the next epoch. Neither the number of workers nor a restart changes a batch, and every row
is trained exactly once an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from s2l_ray.core.hashing import keyed_hash
from s2l_ray.errors import UserError


@dataclass(frozen=True)
class Window:
    """Parts whose rows are shuffled together, and the stream position of the first of them."""

    epoch: int
    number: int
    parts: tuple[int, ...]
    first: int
    rows: int


@dataclass(frozen=True)
class Stream:
    """The whole training stream: `positions` examples in batches of `global_batch`."""

    part_rows: tuple[int, ...]
    window: int
    seed: int
    global_batch: int
    positions: int

    @property
    def steps(self) -> int:
        return -(-self.positions // self.global_batch)


def stream(
    part_rows: list[int],
    window: int,
    seed: int,
    global_batch: int,
    epochs: int | None = None,
    steps: int | None = None,
) -> Stream:
    """The stream for a number of epochs (the last batch may be short), or of exactly `steps` full batches."""
    rows = sum(part_rows)
    if rows == 0:
        raise UserError("planning the training: there are no rows to train on.")
    positions = rows * epochs if epochs is not None else global_batch * int(steps or 0)
    return Stream(tuple(part_rows), window, seed, global_batch, positions)


def windows(plan: Stream, first_step: int = 0) -> Iterator[Window]:
    """The windows in stream order, beginning with the one that holds the first position of `first_step`."""
    numbers = np.arange(len(plan.part_rows), dtype=np.int64)
    rows_in_epoch = sum(plan.part_rows)
    start = first_step * plan.global_batch
    epoch = start // rows_in_epoch
    first = epoch * rows_in_epoch
    while first < plan.positions:
        order = np.argsort(keyed_hash(_mix(plan.seed, epoch), numbers)).tolist()
        for number, begin in enumerate(range(0, len(order), plan.window)):
            parts = tuple(order[begin : begin + plan.window])
            rows = sum(plan.part_rows[part] for part in parts)
            if first + rows > start and first < plan.positions and rows:
                yield Window(epoch, number, parts, first, rows)
            first += rows
        epoch += 1


def _mix(seed: int, epoch: int) -> int:
    return (seed << 20) + epoch


def shuffled(plan: Stream, window: Window) -> np.ndarray:
    """Which row of the window (its parts one after the other) stands at each of its positions, int64 [rows]."""
    return np.random.Generator(
        np.random.PCG64([plan.seed, window.epoch, window.number])
    ).permutation(window.rows)


def owned(
    plan: Stream, window: Window, rank: int, world_size: int, first_step: int = 0
) -> np.ndarray:
    """The offsets in the window whose rows the worker trains: its contiguous share of every global batch, from `first_step` on.

    A short last batch is cut the same way, so that the first workers have more of it than the last.
    """
    share = plan.global_batch // world_size
    position = window.first + np.arange(window.rows)
    mine = (position % plan.global_batch) // share == rank
    wanted = (position >= first_step * plan.global_batch) & (position < plan.positions)
    return np.flatnonzero(mine & wanted)


def share_of(plan: Stream, step: int, rank: int, world_size: int) -> int:
    """How many examples of a step's batch the worker trains."""
    share = plan.global_batch // world_size
    size = min(plan.global_batch, plan.positions - step * plan.global_batch)
    return int(np.clip(size - rank * share, 0, share))
