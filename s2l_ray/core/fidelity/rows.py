"""The rows that a check looks at: a sample of a job's data, as each of its proxies reads them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from s2l_ray.config import Examples
from s2l_ray.core.data.parts import PartRange
from s2l_ray.core.data.read import read_part
from s2l_ray.core.hashing import CHECKED, keyed_hash
from s2l_ray.core.model.scoring import reason_of
from s2l_ray.core.text.encoding import Encoded, Encoder

# At most so many parts are read for the rows, so that large data sets are as quick as small ones.
PARTS_READ = 16


@dataclass(frozen=True)
class Drawn:
    """Rows of the user's data: the columns of `examples`, and how many were rejected, by reason."""

    table: pa.Table
    rejects: dict[str, int]


def draw(parts: Sequence[PartRange], section: Examples, count: int, seed: int) -> Drawn:
    """A sample of `count` rows by keyed hash, out of PARTS_READ parts by keyed hash, in id order.

    Raises:
        UserError: a bad row, with examples.on_bad_row: stop.
    """
    order = np.argsort(keyed_hash(CHECKED, seed, np.array([part.index for part in parts])))[
        :PARTS_READ
    ]
    read = [
        read_part(parts[number], section.columns, section.on_bad_row, section.ignore)
        for number in sorted(order)
    ]
    columns = ["example_id", "source", "messages", "tools"]
    table = pa.concat_tables([part.table.select(columns) for part in read])
    chosen = np.argsort(keyed_hash(CHECKED, seed, table["example_id"].to_numpy()))[:count]
    rejects = Counter(reject["reason"] for part in read for reject in part.rejects)
    return Drawn(table.take(np.sort(chosen)), dict(rejects))


@dataclass(frozen=True)
class EncodedRows:
    """The drawn rows, encoded by each member of the ensemble.

    Attributes:
        encoders: one a member.
        examples: of each member, the n rows that all members can score.
        sources: of those rows.
        reasons: of every drawn row, why it cannot be scored, or None.
    """

    encoders: list[Encoder]
    examples: list[list[Encoded]]
    sources: list[str]
    reasons: list[str | None]

    @property
    def ids(self) -> np.ndarray:
        """Example ids, int64 [n]."""
        return np.array([example.example_id for example in self.examples[0]])


def encode(table: pa.Table, encoders: list[Encoder]) -> EncodedRows:
    """Read rows as each member of the ensemble does."""
    encoded = [encoder.examples(table) for encoder in encoders]
    reasons = [reason_of(versions) for versions in zip(*encoded, strict=True)]
    scored = [place for place, reason in enumerate(reasons) if reason is None]
    sources = table["source"].to_pylist()
    return EncodedRows(
        encoders,
        # A row that can be scored is encoded by every member.
        [[each[place] for place in scored] for each in encoded],
        [sources[place] for place in scored],
        reasons,
    )
