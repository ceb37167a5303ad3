"""What a reader takes of the parts of a window, and how much it holds."""

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.text.encoding import ROWS_AT_ONCE
from s2l_ray.stages.training.feed import Rows


def test_rows_come_in_the_wanted_order_while_one_whole_part_is_held() -> None:
    held: list[weakref.ref[pa.Table]] = []

    def read_part(part: Part, columns: Sequence[str], role: str) -> pa.Table:
        assert [ref for ref in held if ref() is not None] == []
        table = pa.table({"example_id": 100 * part.index + np.arange(part.rows)})
        held.append(weakref.ref(table))
        return table

    parts = [Part(index, 50, {}) for index in range(9)]
    artifact: Any = SimpleNamespace(read_part=read_part)
    draw = np.random.default_rng(0)
    wanted = np.stack([draw.integers(0, 9, 900), draw.integers(0, 50, 900)], axis=1)
    wanted = wanted[wanted[:, 0] != 4]
    taken = list(Rows(artifact, parts, "data").take(wanted))
    assert max(table.num_rows for table in taken) == ROWS_AT_ONCE
    assert pa.concat_tables(taken)["example_id"].to_pylist() == (wanted @ [100, 1]).tolist()
    assert len(held) == 8
