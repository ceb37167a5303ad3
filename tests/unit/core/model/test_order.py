"""The order of the training data: exact passes, rows of every file all over the epoch, and global
batches that are the same for any number of workers and after any restart.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.config import Model, Training
from s2l_ray.core.model.order import PASSES, Order
from s2l_ray.errors import UserError

# part, row of the part
Row = tuple[int, int]
# part * 10 + row, as first written
KEPT = [11, 0, 10, 20, 13, 2, 1, 21, 12, 2, 0, 13, 10, 20, 21, 12, 11, 1]


def of_epochs(
    part_rows: Sequence[int], window: int, seed: int, batch: int, epochs: float = 1
) -> Order:
    return Order(tuple(part_rows), window, seed, batch, round(sum(part_rows) * epochs))


@st.composite
def orders(draw: st.DrawFn) -> Order:
    part_rows = draw(st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(any))
    return Order(
        tuple(part_rows),
        window=draw(st.integers(1, 60)),
        seed=draw(st.integers(0, 2**40)),
        global_batch=draw(st.sampled_from([4, 8, 12])),
        positions=draw(st.integers(1, 4 * sum(part_rows))),
    )


def batches_of(order: Order, workers: int = 1, first_step: int = 0) -> dict[int, list[Row]]:
    """Step -> rows of the global batch in order, from what each worker takes of each window."""
    found: dict[int, dict[int, Row]] = {}
    taken = Counter[tuple[int, int]]()
    for window in order.windows(first_step):
        rows = order.rows_of(window).tolist()
        assert len(rows) == window.rows
        for rank in range(workers):
            for place in order.owned(window, rank, workers, first_step).tolist():
                position = window.first + place
                step = position // order.global_batch
                assert position not in found.setdefault(step, {})
                found[step][position] = (rows[place][0], rows[place][1])
                taken[step, rank] += 1
    for step in found:
        assert [taken[step, rank] for rank in range(workers)] == [
            order.share_of(step, rank, workers) for rank in range(workers)
        ]
        first = step * order.global_batch
        assert sorted(found[step]) == list(range(first, first + len(found[step])))
    return {
        step: [batch[position] for position in sorted(batch)]
        for step, batch in sorted(found.items())
    }


def rows_in_order(order: Order) -> list[Row]:
    return [row for batch in batches_of(order).values() for row in batch]


@settings(max_examples=120, deadline=None)
@given(order=orders())
def test_every_row_is_seen_equally_often_and_every_epoch_is_whole(order: Order) -> None:
    seen = rows_in_order(order)
    everyone = {(part, row) for part, rows in enumerate(order.part_rows) for row in range(rows)}
    assert len(seen) == order.positions
    whole, rest = divmod(order.positions, len(everyone))
    for epoch in range(whole):
        assert set(seen[epoch * len(everyone) : (epoch + 1) * len(everyone)]) == everyone
    last = seen[whole * len(everyone) :]
    assert len(set(last)) == len(last) == rest


@settings(max_examples=120, deadline=None)
@given(order=orders(), workers=st.sampled_from([2, 4]), data=st.data())
def test_batches_depend_neither_on_workers_nor_on_restarts(
    order: Order, workers: int, data: st.DataObject
) -> None:
    whole = batches_of(order)
    assert list(whole) == list(range(order.steps))
    assert [len(b) for b in whole.values()][:-1] == [order.global_batch] * (order.steps - 1)
    first = data.draw(st.integers(0, order.steps))
    for count in (1, workers):
        assert batches_of(order, count, first) == {
            step: batch for step, batch in whole.items() if step >= first
        }


def share_between_files(order: Order, parts_of_file: int = 1) -> float:
    """How much of the variance of the places of rows lies between files (correlation ratio)."""
    parts = np.array([part for part, _ in rows_in_order(order)]) // parts_of_file
    places = np.arange(len(parts))
    sizes = np.bincount(parts)
    means = np.bincount(parts, weights=places)[sizes > 0] / sizes[sizes > 0]
    between = (sizes[sizes > 0] * (means - places.mean()) ** 2).sum()
    return float(between / ((places - places.mean()) ** 2).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("part_rows", "window", "parts_of_file"),
    [
        # Files of one part each, all of them in one window: (24 - 1) / (1440 - 1) by chance.
        ([60] * 24, 131_072, 1),
        # More small files than a window holds.
        ([60] * 400, 2_400, 1),
        ([400] + [10] * 200, 500, 1),
        # Two files of many parts, and parts that are as large as a window.
        ([100] * 40, 400, 20),
        ([400] * 40, 400, 1),
    ],
)
def test_rows_of_every_file_are_spread_over_the_epoch(
    part_rows: list[int], window: int, parts_of_file: int, seed: int
) -> None:
    files = len(part_rows) // parts_of_file
    by_chance = files / sum(part_rows)
    share = share_between_files(of_epochs(part_rows, window, seed, 8), parts_of_file)
    assert share < 2 * by_chance + 2 / PASSES**3


@pytest.mark.parametrize("window", [500, 131_072])
def test_a_run_shorter_than_an_epoch_sees_all_files_in_proportion(window: int) -> None:
    part_rows = [60] * 100 + [600] * 10
    for epochs in (0.1, 0.5, 1.25):
        seen = Counter(
            part for part, _ in rows_in_order(of_epochs(part_rows, window, 3, 8, epochs))
        )
        for part, rows in enumerate(part_rows):
            assert abs(seen[part] - rows * epochs) <= PASSES


@settings(max_examples=120, deadline=None)
@given(order=orders())
def test_a_window_holds_no_more_rows_than_it_may_unless_one_piece_has_more(order: Order) -> None:
    largest_piece = -(-max(order.part_rows) // PASSES)
    assert max(window.rows for window in order.windows()) <= max(order.window, largest_piece)


def test_epochs_may_end_in_a_short_batch_and_steps_never_do() -> None:
    section = Training(model=Model(path="m"), epochs=3, global_batch=4)
    epochs = Order.of([5, 6], section)
    assert (epochs.positions, epochs.steps, epochs.window) == (33, 9, section.shuffle_window)
    assert [len(batch) for batch in batches_of(epochs, 2).values()] == [4] * 8 + [1]
    assert [epochs.share_of(8, rank, 4) for rank in range(4)] == [1, 0, 0, 0]
    steps = Order.of([5, 6], section.model_copy(update={"epochs": None, "steps": 9}))
    assert (steps.positions, steps.steps) == (36, 9)


def test_the_order_is_decided_by_the_seed_and_differs_between_epochs() -> None:
    def order(seed: int, epochs: int = 1) -> list[Row]:
        return rows_in_order(of_epochs([40] * 6, 60, seed, 8, epochs))

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(8)}) == 8
    first, second = order(3, 2)[:240], order(3, 2)[240:]
    assert first == order(3)
    # Other parts in the first window, and other rows of the same part first.
    assert {row for row in first[:60]} != {row for row in second[:60]}
    quarters = [{row for part, row in half[:60] if part == 0} for half in (first, second)]
    assert quarters[0] != quarters[1]


def test_a_window_shuffles_rows_across_its_parts() -> None:
    parts = [part for part, _ in rows_in_order(of_epochs([50, 50], 100, 1, 10))]
    assert 15 < sum(parts[:50]) < 35
    apart = [part for part, _ in rows_in_order(of_epochs([52, 52], 13, 1, 10))]
    assert all(len(set(apart[first : first + 13])) == 1 for first in range(0, 104, 13))


@pytest.mark.parametrize("first_step", [0, 1, 2, 7, 24, 25])
def test_a_restart_reads_no_window_it_does_not_need(first_step: int) -> None:
    order = of_epochs([40] * 10, 10, 0, 16)
    needed = list(order.windows(first_step))
    assert len(needed) == 40 - (first_step * 16) // 10
    assert all(window.first + window.rows > first_step * 16 for window in needed)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="there are no rows to train on"):
        Order.of([0, 0], Training(model=Model(path="m"), epochs=1))


def test_the_order_is_what_it_was() -> None:
    """Kept: another order would make other checkpoints under the same name.

    A change needs a new version of `proxy`.
    """
    order = of_epochs([3, 4, 2], 5, 7, 4, epochs=2)
    assert [part * 10 + row for part, row in rows_in_order(order)] == KEPT
    assert order.owned(next(order.windows()), 0, 2).dtype == np.int64
