"""The draw of a rule with a group and a score: every part is read once, and its keys are queried.

Tasks read chunks of parts and leave their sorted keys in Ray's object store. Queries go to tasks
that run where the keys lie, their answers are merged in a tree, and the driver holds samples and
counts.
"""

import functools
import math
import time
from typing import Any

import numpy as np
import ray

from s2l_ray.contract.work import Work
from s2l_ray.core.query import Query
from s2l_ray.core.selection.draw import Answer, Draw, draw
from s2l_ray.core.selection.keys import GroupSizes, Keys, Points
from s2l_ray.core.selection.quotas import quotas
from s2l_ray.edge.parts import PartContext, part_context
from s2l_ray.edge.placement import TASK_CPUS
from s2l_ray.edge.reduction import reduced
from s2l_ray.stages.subset.rows import Choice, Descriptors, RowReader, Rows, descriptors

# A query takes 1 ms of the driver for each chunk (tests/bench/bench_rules.py), and a draw has some
# 8. So where there are more rows, chunks are larger instead of more, until sorting one takes 1 s
# and 190 MB.
ROWS_PER_TASK = 2**17
MOST_CHUNKS = 1000
MOST_ROWS_PER_TASK = 2**21
# Ray's default strategy runs a task where most bytes of its arguments lie, if there is room. It is
# named, because a trial of a sweep would otherwise hand down its own placement, without room for
# it.
NEAR_KEYS = {"num_cpus": TASK_CPUS, "scheduling_strategy": "DEFAULT"}


def find(work: Work, reader: RowReader, budget: int) -> Choice:
    """The rows with the smallest (or the middle) keys of each group, `budget` in all.

    Raises:
        UserError: a score is NaN, or cannot be computed.
    """
    chunks = _chunks(descriptors(work, reader.columns))
    shared = ray.put((part_context(work), reader))
    sorted_keys = _sorted_keys.options(
        num_returns=3, num_cpus=TASK_CPUS, scheduling_strategy="SPREAD"
    )
    made: list[Any] = [sorted_keys.remote(shared, chunk) for chunk in chunks]
    keys = [own for own, _, _ in made]

    def ask(query: Query[Keys, Answer], /) -> Answer:
        sent: Any = ray.put(query)
        return reduced(query, [_answer.options(**NEAR_KEYS).remote(sent, ref) for ref in keys])

    sizes = _all_sizes([own for _, own, _ in made], len(reader.groups.names))
    for began in ray.get([began for _, _, began in made]):
        work.rows_began(began)
    taken = quotas(sizes, budget, work.config.subset.small_last, reader.groups.parents)
    found = draw(ask, sizes, taken, reader.rule.take)
    sent = ray.put(found)
    counts = [
        _rows_of_parts.options(**NEAR_KEYS).remote(sent, ref, len(chunk))
        for ref, chunk in zip(keys, chunks, strict=True)
    ]
    rows_of_part = np.concatenate(ray.get(counts)).tolist()
    return Choice(sizes, taken, functools.partial(_chosen, found), rows_of_part)


def _all_sizes(of_chunks: list[Any], num_groups: int) -> np.ndarray:
    if not of_chunks:
        return np.zeros(num_groups, np.int64)
    return reduced(GroupSizes(), of_chunks)


def _chosen(found: Draw, rows: Rows) -> np.ndarray:
    return found.chosen(rows.points)


def rows_per_task(total: int) -> int:
    """Rows of a chunk where there are so many in all."""
    return min(max(ROWS_PER_TASK, math.ceil(total / MOST_CHUNKS)), MOST_ROWS_PER_TASK)


def _chunks(parts: list[Descriptors]) -> list[list[Descriptors]]:
    """Neighbouring parts, some `rows_per_task` together."""
    rows_of_part = [next(iter(part.values()))["rows"] for part in parts]
    most = rows_per_task(sum(rows_of_part))
    chunks: list[list[Descriptors]] = []
    together = most
    for part, rows in zip(parts, rows_of_part, strict=True):
        if together + rows > most:
            chunks.append([])
            together = 0
        chunks[-1].append(part)
        together += rows
    return chunks


@ray.remote
def _sorted_keys(
    shared: tuple[PartContext, RowReader], chunk: list[Descriptors]
) -> tuple[Keys, np.ndarray, float]:
    """Keys of a chunk of parts; how many rows each group has there; and when this began."""
    (context, reader), began = shared, time.time()
    points = [reader.read(context, parts).points for parts in chunk]
    # One byte a row where there are few parts.
    numbers = np.arange(len(points), dtype=np.min_scalar_type(len(points)))
    numbers = np.repeat(numbers, [len(part.groups) for part in points])
    keys = Keys.of(Points.joined(points), numbers, len(reader.groups.names))
    return keys, GroupSizes().of(keys), began


@ray.remote
def _answer(query: Query[Keys, Answer], keys: Keys) -> Answer:
    return query.of(keys)


@ray.remote
def _rows_of_parts(found: Draw, keys: Keys, num_parts: int) -> np.ndarray:
    return found.rows_of_parts(keys, num_parts)
