"""What a reader takes of the parts of a window, and how much it holds."""

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from s2l_ray.config import Proxy
from s2l_ray.core.model.order import Order
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.text.encoding import ROWS_AT_ONCE
from s2l_ray.stages.training.feed import Feed, Rows, _encode_windows
from tests import tiny


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


def test_a_reader_encodes_by_a_section_of_any_schedule() -> None:
    """`constant` refuses a warm-up that is asked for, and every section has a default."""
    section = Proxy(model={"config": tiny.LLAMA}, tokenizer="bytes", steps=1, schedule="constant")
    feed = Feed(section, Rows(SimpleNamespace(), [], "data"), Order.of([4], section), readers=1)
    assert list(_encode_windows(pa.table({"windows": ["[]"]}), feed, 0, 1, 0)) == []
