"""The few rows with the smallest keys, as they are found by shards and merged."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TopK:
    """A few rows: keys [m], ids int64 [m], rows float32 [m, T]; in order where stated."""

    keys: np.ndarray
    ids: np.ndarray
    rows: np.ndarray

    @classmethod
    def none(cls, key_type: type, num_columns: int) -> "TopK":
        """No rows, with T columns."""
        rows = np.empty((0, num_columns), np.float32)
        return cls(np.empty(0, key_type), np.empty(0, np.int64), rows)

    def smallest(self, m: int) -> "TopK":
        """The m smallest by (key, id), in this order."""
        return self._take(np.lexsort((self.ids, self.keys))[:m])

    def smallest_and_ties(self, m: int) -> "TopK":
        """Those with the m smallest keys, and all that tie with the last; nothing is sorted."""
        if len(self.keys) <= m:
            return self
        return self._take(np.flatnonzero(self.keys <= np.partition(self.keys, m - 1)[m - 1]))

    def smallest_distinct(self, m: int, skip: set[bytes]) -> "TopK":
        """The m smallest by (key, id), in this order, that differ from each other and from `skip`.

        Args:
            skip: values of rows, see `row_value`.
        """
        seen, chosen = set(skip), []
        for i in np.lexsort((self.ids, self.keys)):
            value = row_value(self.rows[i])
            if value not in seen:
                seen.add(value)
                chosen.append(i)
            if len(chosen) == m:
                break
        return self._take(np.array(chosen, dtype=np.int64))

    def joined(self, other: "TopK") -> "TopK":
        """Both, unordered."""
        # Without rows, T may not be known: the other one has it.
        if not len(self.ids):
            return other
        if not len(other.ids):
            return self
        return TopK(
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.rows, other.rows]),
        )

    def _take(self, index: np.ndarray) -> "TopK":
        return TopK(self.keys[index], self.ids[index], self.rows[index])


def row_value(row: np.ndarray) -> bytes:
    """Equal bytes for equal values; adding zero turns -0.0 into 0.0."""
    return (row + np.float32(0)).tobytes()
