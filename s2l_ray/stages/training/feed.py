"""What feeds a training worker: its examples of every step, read and tokenised by Ray Data tasks.

Nothing here imports torch, so that a reader is at work a second after it starts, and takes a third
of the memory.
"""

import functools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import ray.data

from s2l_ray.config import Training
from s2l_ray.contract.work import Work
from s2l_ray.core.model.loading import make_encoder
from s2l_ray.core.model.order import Order, Window
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.text.encoding import ROWS_AT_ONCE, Encoded, Encoder
from s2l_ray.edge.placement import READER_CPUS

# Windows are read together until they have this many rows, so that a reader's start-up is worth it.
ROWS_PER_READ = 8_192
# Of tokenised rows; small, so that the first step does not wait for a whole window.
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Rows:
    """The rows to train on: parts of an artifact, and the role of their files to read."""

    artifact: Artifact
    parts: list[Part]
    role: str

    @classmethod
    def of(cls, work: Work, stage: str, role: str) -> "Rows":
        """The rows of one of a stage's inputs; of its parts only what reading needs."""
        parts = [
            Part(part.index, part.rows, {role: part.files[role]})
            for part in work.manifests[stage].parts
        ]
        return cls(work.inputs[stage], parts, role)

    def order(self, section: Training) -> Order:
        """The order in which a training sees them."""
        return Order.of([part.rows for part in self.parts], section)

    def read(self, part: Part) -> pa.Table:
        """The conversations of a part."""
        return self.artifact.read_part(part, ["example_id", "messages", "tools"], self.role)

    def take(self, wanted: np.ndarray) -> Iterator[pa.Table]:
        """The conversations in some rows, in their order, ROWS_AT_ONCE at a time.

        Of the parts, one is held whole at a time.

        Args:
            wanted: number of the part and row in the part, int64 [n, 2].
        """
        by_part = np.argsort(wanted[:, 0], kind="stable")
        parts, firsts = np.unique(wanted[by_part, 0], return_index=True)
        rows_of_parts = np.split(wanted[by_part, 1], firsts[1:])
        taken = [
            self.read(self.parts[part]).take(pa.array(rows))
            for part, rows in zip(parts.tolist(), rows_of_parts, strict=True)
        ]
        together, order = pa.concat_tables(taken), np.argsort(by_part)
        for first in range(0, len(order), ROWS_AT_ONCE):
            yield together.take(pa.array(order[first : first + ROWS_AT_ONCE]))


@dataclass(frozen=True)
class Feed:
    """The rows of a training and their order; small, because it travels with every task."""

    section: Training
    rows: Rows
    order: Order
    readers: int

    def batches(self, rank: int, world_size: int, first_step: int) -> Iterator[list[Encoded]]:
        """A worker's examples of every step from `first_step` on.

        They come from a Ray Data pipeline of the worker's own, which starts at once.
        """
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.target_max_block_size = BLOCK_BYTES
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # Wrapped in Ray's own exception, a UserError would lose its cause on its way here.
        context.raise_original_map_exception = True
        reads = [
            {"windows": json.dumps([asdict(window) for window in group])}
            for group in _reads(self.order.windows(first_step))
        ]
        rows = ray.data.from_items(reads, override_num_blocks=len(reads)).map_batches(
            _encode_windows,  # type: ignore[arg-type]
            fn_args=(self, rank, world_size, first_step),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=READER_CPUS,
            compute=ray.data.TaskPoolStrategy(size=self.readers),
        )
        blocks = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        return _steps(self.order, _begun(iter(blocks)), rank, world_size, first_step)


def _begun(blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same blocks; the first is asked for at once, in a thread, which starts the readers."""
    first: Future[pa.Table | None] = Future()

    def ask() -> None:
        try:
            first.set_result(next(blocks, None))
        except BaseException as error:
            first.set_exception(error)

    def all_of_them() -> Iterator[pa.Table]:
        block = first.result()
        if block is not None:
            yield block
            yield from blocks

    threading.Thread(target=ask, name="first block", daemon=True).start()
    return all_of_them()


def _steps(
    order: Order, blocks: Iterator[pa.Table], rank: int, world_size: int, first_step: int
) -> Iterator[list[Encoded]]:
    """The blocks' examples cut into this worker's shares of the steps."""
    waiting: list[Encoded] = []
    step = first_step
    need = order.share_of(step, rank, world_size)
    for block in blocks:
        for example in _from_arrow(block):
            waiting.append(example)
            if len(waiting) == need:
                yield waiting
                waiting, step = [], step + 1
                need = order.share_of(step, rank, world_size) if step < order.steps else -1
    if step < order.steps and not need:
        # The short last batch has nothing for this worker.
        yield waiting


def _reads(windows: Iterator[Window]) -> Iterator[list[Window]]:
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(w.rows for w in group) >= ROWS_PER_READ:
            yield group
            group = []
    if group:
        yield group


@functools.lru_cache(maxsize=2)
def _encoder(section: str) -> Encoder:
    """A section's encoder, cached in the process.

    Loading a large vocabulary takes as long as encoding thousands of rows.
    """
    return make_encoder(Training.model_validate_json(section))


def _encode_windows(
    batch: pa.Table, feed: Feed, rank: int, world_size: int, first_step: int
) -> Iterator[pa.Table]:
    fields = set(Training.model_fields)
    # A default that is written out would count as asked for.
    encoder = _encoder(feed.section.model_dump_json(include=fields, exclude_unset=True))
    for raw in json.loads(batch["windows"][0].as_py()):
        window = Window(**raw)
        mine = feed.order.owned(window, rank, world_size, first_step)
        if len(mine):
            for table in feed.rows.take(feed.order.rows_of(window)[mine]):
                yield _to_arrow(encoder.examples(table))


def _to_arrow(encoded: list[Encoded]) -> pa.Table:
    lengths = np.cumsum([0, *(len(example.input_ids) for example in encoded)])
    ids = np.concatenate([example.input_ids for example in encoded])
    learned = np.concatenate([example.learned for example in encoded])
    return pa.table(
        {
            "example_id": pa.array([example.example_id for example in encoded], pa.int64()),
            "input_ids": pa.ListArray.from_arrays(
                pa.array(lengths, pa.int32()), pa.array(ids, pa.int32())
            ),
            "learned": pa.ListArray.from_arrays(
                pa.array(lengths, pa.int32()), pa.array(learned, pa.bool_())
            ),
        }
    )


def _from_arrow(block: pa.Table) -> Iterator[Encoded]:
    for chunk in block.to_batches():
        columns = (chunk.column(name) for name in ("input_ids", "learned"))
        ids, learned = (column.flatten().to_numpy(zero_copy_only=False) for column in columns)
        ends = np.cumsum(chunk.column("input_ids").value_lengths().to_numpy())
        for example_id, first, end in zip(
            chunk.column("example_id").to_pylist(), [0, *ends[:-1]], ends, strict=True
        ):
            yield Encoded(example_id, ids[first:end], learned[first:end])
