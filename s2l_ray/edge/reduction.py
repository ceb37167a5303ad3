"""Answers in Ray's object store become one, along a tree of tasks: no process reads them all."""

from collections.abc import Sequence
from typing import Any, TypeVar

import ray

from s2l_ray.core.query import Query
from s2l_ray.edge.user_errors import reraise_user_errors
from s2l_ray.edge.waiting import Patience, wait_for

# Answers that one process merges. A message costs whoever asks 0.6 to 1.5 ms and a further level
# some 3 ms (tests/bench/bench_nodes.py): 16 is within a fifth of the best for 2 to 272 shards.
FAN_IN = 16

Answer = TypeVar("Answer")


def reduced(
    query: Query[Any, Answer], answers: Sequence[Any], patience: Patience | None = None
) -> Answer:
    """What `query.merge` makes of all answers.

    Args:
        answers: references to the answers of all shards, at least one.
        patience: with answers of actors, which may have lost their hosts.

    Raises:
        UserError: one that was raised while an answer was made.
    """
    assert FAN_IN > 1, "one answer at a time is never fewer answers"
    shared = ray.put(query) if len(answers) > FAN_IN else None
    while len(answers) > FAN_IN:
        answers = [
            _merged.remote(shared, *answers[first : first + FAN_IN])
            for first in range(0, len(answers), FAN_IN)
        ]
    if patience is not None:
        wait_for(list(answers), patience)
    with reraise_user_errors():
        return query.merge(ray.get(list(answers)))


# Without CPUs, because shard actors may hold them all; where its answers lie, as Ray's default
# strategy prefers; named, because a trial of a sweep would otherwise hand down its own placement.
@ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")
def _merged(query: Query[Any, Answer], *answers: Answer) -> Answer:
    return query.merge(answers)
