"""The order in which training sees the data: a pure function of seed, rows of the parts, and step.

An epoch passes PASSES times over the parts, each time in another keyed order, and takes another
share of every part's rows. What is taken is cut into windows of rows and shuffled inside them, and
the stream of epochs is cut into global batches; a batch may reach into the next epoch. So rows of
one file are spread over the whole epoch, however small or large the files are, and the rows of a
window are all that is held at once. An epoch that the training does not end takes an equal share of
every part. Neither the number of workers nor a restart changes a batch, and every row is trained
exactly once an epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from s2l_ray.config import Training
from s2l_ray.core.hashing import TRAINING_ORDER, keyed_hash
from s2l_ray.errors import UserError

# How often an epoch reads a part, unless its shares come together in a window. The mean place of a
# file's rows in the epoch then varies PASSES ** 3 times less than that of a row.
PASSES = 4


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together.

    Attributes:
        epoch, number: from 0.
        first: place of its first row in the stream of all epochs.
        pieces: [part, start, stop]: which rows of a part's permutation in that epoch.
    """

    epoch: int
    number: int
    first: int
    pieces: list[list[int]]

    @property
    def rows(self) -> int:
        return sum(stop - start for _, start, stop in self.pieces)


@dataclass(frozen=True)
class Order:
    """The stream of examples of one training: `positions` of them in batches of `global_batch`.

    Attributes:
        part_rows: rows of each part.
        window: most rows of a window, unless a single piece has more.
    """

    part_rows: tuple[int, ...]
    window: int
    seed: int
    global_batch: int
    positions: int

    @classmethod
    def of(cls, part_rows: Sequence[int], section: Training) -> "Order":
        """Whole epochs, whose last batch may be short, or so many steps of full batches.

        Raises:
            UserError: there are no rows.
        """
        rows, batch = sum(part_rows), section.global_batch
        if rows == 0:
            raise UserError("planning the training: there are no rows to train on.")
        epochs = section.epochs
        positions = rows * epochs if epochs is not None else batch * int(section.steps or 0)
        return cls(tuple(part_rows), section.shuffle_window, section.seed, batch, positions)

    @property
    def steps(self) -> int:
        return -(-self.positions // self.global_batch)

    @property
    def epoch_rows(self) -> int:
        return sum(self.part_rows)

    def windows(self, first_step: int = 0) -> Iterator[Window]:
        """The windows in their order, from the one with the first position of a step on."""
        start = first_step * self.global_batch
        epochs = -(-self.positions // self.epoch_rows)
        for epoch in range(start // self.epoch_rows, epochs):
            for window in self._windows_of(epoch):
                if window.first + window.rows > start:
                    yield window

    def _windows_of(self, epoch: int) -> Iterator[Window]:
        number, rows, first = 0, 0, epoch * self.epoch_rows
        pieces: list[list[int]] = []
        for part, start, stop in self._pieces(epoch).tolist():
            if pieces and rows + stop - start > self.window:
                yield Window(epoch, number, first, pieces)
                number, rows, first, pieces = number + 1, 0, first + rows, []
            pieces.append([part, start, stop])
            rows += stop - start
        yield Window(epoch, number, first, pieces)

    def _pieces(self, epoch: int) -> np.ndarray:
        """What is taken of the parts, in order: part, start, stop of each piece, int64 [n, 3]."""
        rows, numbers = np.array(self.part_rows), np.arange(len(self.part_rows))
        passes = []
        for number in range(PASSES):
            purpose = f"{TRAINING_ORDER}, epoch {epoch}, pass {number}"
            parts = np.argsort(keyed_hash(purpose, self.seed, numbers))
            shares = [rows[parts] * end // PASSES for end in (number, number + 1)]
            passes.append(np.stack([parts, *shares], axis=1))
        pieces = np.concatenate(passes)
        ends = np.cumsum(pieces[:, 2] - pieces[:, 1])
        wanted = min(self.epoch_rows, self.positions - epoch * self.epoch_rows)
        taken = np.diff(ends * wanted // self.epoch_rows, prepend=0)
        pieces[:, 2] = pieces[:, 1] + taken
        return pieces[taken > 0]

    def rows_of(self, window: Window) -> np.ndarray:
        """Part and row in the part at each place of a window, int64 [rows, 2]."""
        permuted = {
            part: self._draw(window.epoch, 0, part).permutation(self.part_rows[part])
            for part in {part for part, _, _ in window.pieces}
        }
        rows = np.concatenate([permuted[part][start:stop] for part, start, stop in window.pieces])
        parts = np.repeat(*np.array([[p, stop - start] for p, start, stop in window.pieces]).T)
        return self._draw(window.epoch, 1, window.number).permutation(
            np.stack([parts, rows], axis=1)
        )

    def _draw(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *purpose]))

    def owned(self, window: Window, rank: int, world_size: int, first_step: int = 0) -> np.ndarray:
        """The places in a window whose rows the worker trains, from `first_step` on.

        They are its contiguous share of every global batch. A short last batch is cut the same way,
        so that the first workers have more of it than the last.
        """
        share = self.global_batch // world_size
        position = window.first + np.arange(window.rows)
        mine = (position % self.global_batch) // share == rank
        return np.flatnonzero(mine & (position >= first_step * self.global_batch))

    def share_of(self, step: int, rank: int, world_size: int) -> int:
        """How many examples of a step's batch the worker trains."""
        share = self.global_batch // world_size
        size = min(self.global_batch, self.positions - step * self.global_batch)
        return int(np.clip(size - rank * share, 0, share))
