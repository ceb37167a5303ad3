"""The order of the training data: exact passes, and global batches independent of workers.

They are the same for any number of workers and after any restart.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.model.order import Stream, owned, share_of, shuffled, stream, windows
from s2l_ray.errors import UserError

Row = tuple[int, int]  # part, row of the part
KEPT = [
    0,
    12,
    13,
    2,
    11,
    1,
    10,
    20,
    21,
    11,
    20,
    10,
    21,
    12,
    13,
    2,
    0,
    1,
]  # part * 10 + row, as first written


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    part_rows = draw(st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(any))
    length = draw(st.sampled_from(["epochs", "steps"]))
    return stream(
        part_rows,
        window=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**40)),
        global_batch=draw(st.sampled_from([4, 8, 12])),
        epochs=draw(st.integers(1, 4)) if length == "epochs" else None,
        steps=draw(st.integers(1, 20)) if length == "steps" else None,
    )


def batches_of(plan: Stream, workers: int = 1, first_step: int = 0) -> dict[int, list[Row]]:
    """Step -> rows of the global batch in order, from what each worker takes of each window."""
    found: dict[int, dict[int, Row]] = {}
    taken = Counter[tuple[int, int]]()
    for window in windows(plan, first_step):
        rows = [(part, row) for part in window.parts for row in range(plan.part_rows[part])]
        assert len(rows) == window.rows
        places = shuffled(plan, window)
        assert sorted(places.tolist()) == list(range(window.rows))
        for rank in range(workers):
            for offset in owned(plan, window, rank, workers, first_step).tolist():
                position = window.first + offset
                step = position // plan.global_batch
                assert position not in found.setdefault(step, {})
                found[step][position] = rows[places[offset]]
                taken[step, rank] += 1
    for step in found:
        assert [taken[step, rank] for rank in range(workers)] == [
            share_of(plan, step, rank, workers) for rank in range(workers)
        ]
        assert sorted(found[step]) == list(
            range(step * plan.global_batch, step * plan.global_batch + len(found[step]))
        )
    return {
        step: [batch[position] for position in sorted(batch)]
        for step, batch in sorted(found.items())
    }


@settings(max_examples=120, deadline=None)
@given(plan=streams())
def test_every_row_is_seen_equally_often_and_every_epoch_is_whole(plan: Stream) -> None:
    seen = [row for batch in batches_of(plan).values() for row in batch]
    everyone = {(part, row) for part, rows in enumerate(plan.part_rows) for row in range(rows)}
    assert len(seen) == plan.positions
    whole, rest = divmod(plan.positions, len(everyone))
    for epoch in range(whole):
        assert set(seen[epoch * len(everyone) : (epoch + 1) * len(everyone)]) == everyone
    last = seen[whole * len(everyone) :]
    assert len(set(last)) == len(last) == rest


@settings(max_examples=120, deadline=None)
@given(plan=streams(), workers=st.sampled_from([2, 4]), data=st.data())
def test_batches_depend_neither_on_workers_nor_on_restarts(
    plan: Stream, workers: int, data: st.DataObject
) -> None:
    whole = batches_of(plan)
    assert list(whole) == list(range(plan.steps))
    assert [len(batch) for batch in whole.values()][:-1] == [plan.global_batch] * (plan.steps - 1)
    assert sum(map(len, whole.values())) == plan.positions
    first = data.draw(st.integers(0, plan.steps))
    for count in (1, workers):
        assert batches_of(plan, count, first) == {
            step: batch for step, batch in whole.items() if step >= first
        }


def test_epochs_may_end_in_a_short_batch_and_steps_never_do() -> None:
    epochs = stream([5, 6], 2, 0, 4, epochs=3)
    assert (epochs.positions, epochs.steps) == (33, 9)
    assert [len(batch) for batch in batches_of(epochs, 2).values()] == [4] * 8 + [1]
    assert [share_of(epochs, 8, rank, 4) for rank in range(4)] == [1, 0, 0, 0]
    steps = stream([5, 6], 2, 0, 4, steps=9)
    assert (steps.positions, steps.steps) == (36, 9)
    assert (
        Counter(row for batch in batches_of(steps).values() for row in batch).most_common()[-1][1]
        == 3
    )


def test_the_order_is_decided_by_the_seed_and_differs_between_epochs() -> None:
    def order(seed: int, epochs: int = 1) -> list[Row]:
        return [
            row
            for batch in batches_of(stream([40] * 6, 2, seed, 8, epochs=epochs)).values()
            for row in batch
        ]

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(8)}) == 8
    twice = order(3, 2)
    assert twice[:240] == order(3)
    assert twice[240:] != twice[:240]
    parts = [[part for part, _ in half[::80]] for half in (twice[:240], twice[240:])]
    assert all(len({part for part, _ in twice[n : n + 80]}) == 2 for n in range(0, 480, 80)), (
        "two parts a window"
    )
    assert parts[0] != [0, 2, 4]


def test_a_window_shuffles_rows_across_its_parts() -> None:
    rows = [
        row for batch in batches_of(stream([50, 50], 2, 1, 10, epochs=1)).values() for row in batch
    ]
    first_half = Counter(part for part, _ in rows[:50])
    assert min(first_half[0], first_half[1]) > 10
    apart = [
        row for batch in batches_of(stream([50, 50], 1, 1, 10, epochs=1)).values() for row in batch
    ]
    assert len({part for part, _ in apart[:50]}) == 1


@pytest.mark.parametrize("first_step", [0, 1, 2, 7, 24, 25])
def test_a_restart_reads_no_window_it_does_not_need(first_step: int) -> None:
    plan = stream([10] * 10, 1, 0, 4, epochs=1)
    needed = list(windows(plan, first_step))
    assert len(needed) == 10 - (first_step * 4) // 10
    assert all(window.first + window.rows > first_step * 4 for window in needed)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="there are no rows to train on"):
        stream([0, 0], 1, 0, 4, epochs=1)


def test_the_order_is_what_it_was() -> None:
    """Kept: another order would make other checkpoints under the same name.

    A change needs a new version of `proxy`.
    """
    plan = stream([3, 4, 2], 2, 7, 4, epochs=2)
    flat = [part * 10 + row for batch in batches_of(plan).values() for part, row in batch]
    assert flat == KEPT
    assert owned(plan, next(windows(plan)), 0, 2).dtype == np.int64
