"""Facility location in blocks: how many rows each passes on, and which merges follow.

Rows are cut into blocks of at most BLOCK_ROWS neighbours of one part, in id order. Each block
passes on candidates (see core/selection/facility.py), and merges choose among the candidates of
neighbouring blocks until exactly the budget is left.

A block passes on OVERSAMPLING times its share of the budget, and at least one in
ROWS_PER_CANDIDATE of its rows, or the whole budget if that is smaller. A merge takes as many
neighbours as have at most MERGED_CANDIDATES together. Where that is not all of them, there are
several merges: first to thin the candidates out, and, if thinning would hardly make them fewer, a
last level in which each merge gets its share of the budget. Rows of two such merges do not see each
other.

This is not the tree reduction of edge/reduction.py. That one merges a fixed number of answers to a
query whose merge is associative, so the shape of its tree does not matter, and one answer is left.
Here each merge keeps a different number of candidates, that number depends on the rows below it,
the choice depends on what is merged with what, and several results may be left, which nobody joins.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

# Most rows of a block.
BLOCK_ROWS = 4_096
# Most candidates of a merge: its time grows with their square, half a minute here.
MERGED_CANDIDATES = 32_768
# Candidates of a block, as a multiple of its share of the budget.
OVERSAMPLING = 2
# Most rows that a candidate stands for on average, where the whole budget is not less.
ROWS_PER_CANDIDATE = 16

Handle = TypeVar("Handle")


def blocks(num_rows: int) -> list[tuple[int, int]]:
    """The blocks of a part: (first, last + 1) of each, all full but the last.

    Args:
        num_rows: scored rows of the part.
    """
    starts = range(0, num_rows, BLOCK_ROWS)
    return [(start, min(start + BLOCK_ROWS, num_rows)) for start in starts]


def run_tree(
    sizes: Sequence[int],
    budget: int,
    choose: Callable[[int, int], Handle],
    merge: Callable[[Sequence[Handle], int], Handle],
) -> list[Handle]:
    """Start the choice of every block and all merges, and return what is left in the end.

    Args:
        sizes: rows of each block, in id order; none is empty. choose: (number of a block, count) ->
        `count` candidates of the block, or a reference to them. merge: (results of `choose` or of
        `merge`, count) -> `count` of their candidates, likewise.

    Returns:
        Results of the last merges, in id order. They have exactly `budget` candidates in all.

    Raises:
        ValueError: `budget` is below 1 or above the number of rows.
    """
    total = sum(sizes)
    if not 1 <= budget <= total:
        raise ValueError(f"expected a budget from 1 to {total}, got {budget}")
    weights = list(sizes)
    counts = [_num_candidates(size, size, budget, total) for size in sizes]
    handles = [choose(number, count) for number, count in enumerate(counts)]
    while True:
        runs = _runs(counts)
        weights = [sum(weights[start:stop]) for start, stop in runs]
        found = [sum(counts[start:stop]) for start, stop in runs]
        counts = [
            _num_candidates(have, weight, budget, total)
            for have, weight in zip(found, weights, strict=True)
        ]
        # More than three quarters would be left: another level would hardly thin them out.
        is_last = len(runs) == 1 or 4 * sum(counts) > 3 * sum(found)
        if is_last:
            counts = _apportion(budget, weights, found)
        handles = [
            merge(handles[start:stop], count)
            for (start, stop), count in zip(runs, counts, strict=True)
            if count
        ]
        if is_last:
            return handles


def _num_candidates(have: int, weight: int, budget: int, total: int) -> int:
    """How many of `have` candidates to pass on, which stand for `weight` of all `total` rows."""
    share = -(-OVERSAMPLING * budget * weight // total)
    least = min(budget, -(-have // ROWS_PER_CANDIDATE))
    return min(have, max(share, least))


def _runs(counts: Sequence[int]) -> list[tuple[int, int]]:
    """The longest runs of neighbours with at most MERGED_CANDIDATES: (first, last + 1) of each."""
    starts, together = [0], 0
    for number, count in enumerate(counts):
        if together and together + count > MERGED_CANDIDATES:
            starts.append(number)
            together = 0
        together += count
    return list(zip(starts, [*starts[1:], len(counts)], strict=True))


def _apportion(budget: int, weights: Sequence[int], limits: Sequence[int]) -> list[int]:
    """The budget in proportion to weights, none above its limit, by largest remainders.

    Proportions are rounded down, and what is left goes one by one to those that lost most by that,
    the first of equals first.
    """
    total = sum(weights)
    shares = [
        min(budget * weight // total, limit) for weight, limit in zip(weights, limits, strict=True)
    ]
    by_loss = sorted(
        range(len(shares)),
        key=lambda number: (-(budget * weights[number] / total - shares[number]), number),
    )
    while rest := budget - sum(shares):
        for number in [one for one in by_loss if shares[one] < limits[one]][:rest]:
            shares[number] += 1
    return shares
