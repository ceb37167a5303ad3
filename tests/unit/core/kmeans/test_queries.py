"""Answers merged along a tree: what one shard of all rows would answer, however the tree grows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from s2l_ray.core.kmeans.queries import (
    Farthest,
    HashCounts,
    HashesWith,
    LloydStep,
    SmallestHashes,
    SquaredDeviations,
    Summarise,
)
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.query import Query

ROWS, STEPS, K = 700, 4, 9
NUMBERS = np.random.default_rng(3)
# Few values, so that rows tie and repeat.
VALUES = NUMBERS.integers(-3, 4, (ROWS, STEPS)).astype(np.float32)
IDS = NUMBERS.permutation(10 * ROWS)[:ROWS]
CENTROIDS = NUMBERS.normal(0, 2, (K, STEPS)).astype(np.float32)
QUERIES: list[Query[Shard, Any]] = [
    Summarise(),
    SmallestHashes(7, 50),
    HashCounts(7),
    HashesWith(7, 12_345),
    LloydStep(CENTROIDS, 40),
    Farthest(30, CENTROIDS, VALUES[:5]),
    SquaredDeviations(CENTROIDS),
]


def chain(count: int) -> list[list[int]]:
    """Everyone has one below."""
    return [[number + 1] if number + 1 < count else [] for number in range(count)]


def pairs(count: int) -> list[list[int]]:
    """Everyone has two below."""
    return [[child for child in (2 * n + 1, 2 * n + 2) if child < count] for n in range(count)]


def in_tree(
    shards: list[Shard],
    below: list[list[int]],
    number: int,
    query: Query[Shard, Any],
    reverse: bool,
) -> Any:
    """What shard `number` answers with all below it."""
    own = query.of(shards[number])
    rest = [in_tree(shards, below, child, query, reverse) for child in below[number]]
    return query.merge([*rest[::-1], own] if reverse else [own, *rest])


def facts(answer: Any) -> Any:
    fields = vars(answer) if hasattr(answer, "__dict__") else {"all": answer}
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in fields.items()
    }


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: type(query).__name__)
@pytest.mark.parametrize("tree", [chain, pairs])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_tree_of_shards_answers_as_one_shard(
    query: Query[Shard, Any], tree: Callable[[int], list[list[int]]], reverse: bool
) -> None:
    # one row, no row, many
    cuts = [0, 1, 1, 200, 290, 640, 641, ROWS]
    shards = [Shard([(IDS[a:b], VALUES[a:b])]) for a, b in zip(cuts, cuts[1:], strict=False)]
    answer = in_tree(shards, tree(len(shards)), 0, query, reverse)
    alone = query.of(Shard([(IDS, VALUES)]))
    # For pictures: added up in any order.
    if isinstance(query, SquaredDeviations):
        np.testing.assert_allclose(answer, alone, rtol=1e-12)
    # Whoever asked sorts them.
    elif isinstance(query, HashesWith):
        assert sorted(answer.tolist()) == sorted(alone.tolist())
    else:
        assert facts(answer) == facts(alone)
