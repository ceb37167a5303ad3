"""The order in which training sees the data: a pure function of seed, parts and step.

In each epoch the parts come in keyed order, rows are shuffled inside windows of parts, and the
stream is cut into global batches; a batch may reach into the next epoch. Neither the number of
workers nor a restart changes a batch, and every row is trained exactly once an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from s2l_ray.core.hashing import TRAINING_ORDER, keyed_hash
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
    """The stream of whole epochs, whose last batch may be short, or of `steps` full batches."""
    rows = sum(part_rows)
    if rows == 0:
        raise UserError("planning the training: there are no rows to train on.")
    positions = rows * epochs if epochs is not None else global_batch * int(steps or 0)
    return Stream(tuple(part_rows), window, seed, global_batch, positions)


def windows(stream: Stream, first_step: int = 0) -> Iterator[Window]:
    """The windows in stream order, from the one with the first position of `first_step` on."""
    numbers = np.arange(len(stream.part_rows), dtype=np.int64)
    rows_in_epoch = sum(stream.part_rows)
    start = first_step * stream.global_batch
    epoch = start // rows_in_epoch
    first = epoch * rows_in_epoch
    while first < stream.positions:
        order = np.argsort(keyed_hash(TRAINING_ORDER, _mix(stream.seed, epoch), numbers)).tolist()
        for number, begin in enumerate(range(0, len(order), stream.window)):
            parts = tuple(order[begin : begin + stream.window])
            rows = sum(stream.part_rows[part] for part in parts)
            if first + rows > start and first < stream.positions and rows:
                yield Window(epoch, number, parts, first, rows)
            first += rows
        epoch += 1


def _mix(seed: int, epoch: int) -> int:
    return (seed << 20) + epoch


def shuffled(stream: Stream, window: Window) -> np.ndarray:
    """The row at each position of the window, int64 [rows]; its parts' rows one after the other."""
    return np.random.Generator(
        np.random.PCG64([stream.seed, window.epoch, window.number])
    ).permutation(window.rows)


def owned(
    stream: Stream, window: Window, rank: int, world_size: int, first_step: int = 0
) -> np.ndarray:
    """The offsets in the window whose rows the worker trains, from `first_step` on.

    They are its contiguous share of every global batch.

    A short last batch is cut the same way, so that the first workers have more of it than the last.
    """
    share = stream.global_batch // world_size
    position = window.first + np.arange(window.rows)
    mine = (position % stream.global_batch) // share == rank
    wanted = (position >= first_step * stream.global_batch) & (position < stream.positions)
    return np.flatnonzero(mine & wanted)


def share_of(stream: Stream, step: int, rank: int, world_size: int) -> int:
    """How many examples of a step's batch the worker trains."""
    share = stream.global_batch // world_size
    size = min(stream.global_batch, stream.positions - step * stream.global_batch)
    return int(np.clip(size - rank * share, 0, share))
