"""Rows of a few parts that a shard works on together.

Shapes: n rows of a block, T columns.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from s2l_ray.core.kmeans.assign import Pruning

# Rows up to which parts are put together. Fewer cost more a round, more cost more to sort.
MAX_ROWS = 524_288


class Block:
    """Rows float32 [n, T] of some parts with their ids; in the order given until they are sorted.

    Attributes:
        pruning: what `assign` remembers of the rows, from when they are sorted on.
    """

    def __init__(
        self, ids: Sequence[np.ndarray], rows: Sequence[np.ndarray], least: int, most: int
    ) -> None:
        """With the ids int64 [n] of each part, all between `least` and `most`.

        Ids are stored as what they are above the least: mostly in 4 bytes or fewer.
        """
        self.rows = rows[0] if len(rows) == 1 else np.concatenate(rows)
        self.pruning: Pruning | None = None
        self._first, size = np.int64(least), np.min_scalar_type(most - least)
        first = self._first.view(np.uint64)
        self._above = np.concatenate([(own.view(np.uint64) - first).astype(size) for own in ids])
        # Where each row was as given, once they are sorted.
        self._places: np.ndarray | None = None

    @property
    def ids(self) -> np.ndarray:
        """Of the rows as they are now, int64 [n]."""
        return (self._above.astype(np.uint64) + self._first.view(np.uint64)).view(np.int64)

    def sort(self, keys: np.ndarray) -> np.ndarray:
        """Sort the rows by keys [n] and begin to prune; returns the order, int64 [n]."""
        # By radix where keys have 16 bits.
        order = np.argsort(keys, kind="stable")
        self._above, self.rows = self._above.take(order), self.rows.take(order, axis=0)
        self._places, self.pruning = order.astype(np.uint32), Pruning(self.rows)
        return order

    def now_at(self, given: slice) -> np.ndarray:
        """Where the rows are now that were given at these places, in the order given: int64 [n]."""
        if self._places is None:
            return np.arange(given.start, given.stop)
        found = np.flatnonzero((self._places >= given.start) & (self._places < given.stop))
        result = np.empty_like(found)
        result[self._places.take(found) - given.start] = found
        return result


def blocks_of(
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[Block, list[slice]]]:
    """Put small parts together: every block, and the places in it of each of its parts.

    Parts of a block have at most MAX_ROWS rows unless it is one part, and ids that 4 bytes tell
    apart.

    Args:
        parts: ids int64 [n] and rows float32 [n, T] of each part.
    """
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    num_rows, ends = 0, (0, 0)
    for ids, rows in parts:
        widened = _widened(ends if num_rows else None, ids)
        too_many = num_rows + len(ids) > MAX_ROWS
        if num_rows and (too_many or widened[1] - widened[0] >= 1 << 32):
            yield _together(waiting, ends)
            num_rows, widened = 0, _widened(None, ids)
        waiting.append((ids, rows))
        num_rows, ends = num_rows + len(ids), widened
    if waiting:
        yield _together(waiting, ends)


def _widened(ends: tuple[int, int] | None, ids: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest id, once these have come; (0, 0) without any."""
    if not len(ids):
        return ends or (0, 0)
    least, most = int(ids.min()), int(ids.max())
    return (least, most) if ends is None else (min(ends[0], least), max(ends[1], most))


def _together(
    waiting: list[tuple[np.ndarray, np.ndarray]], ends: tuple[int, int]
) -> tuple[Block, list[slice]]:
    """The block of these parts, which are forgotten: their memory is free once it is made."""
    bounds = np.cumsum([0, *(len(ids) for ids, _ in waiting)]).tolist()
    ids, rows = zip(*waiting, strict=True)
    waiting.clear()
    block = Block(ids, rows, *ends)
    return block, [slice(*pair) for pair in itertools.pairwise(bounds)]
