"""A worker's share of a global batch: how it is cut, and losses that are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from s2l_ray.core.model.micro_batches import micro_batches
from s2l_ray.core.model.training import _finite_total
from s2l_ray.core.model.workers import Worker
from s2l_ray.core.text.encoding import Encoded
from s2l_ray.errors import UserError


def test_micro_batches_hold_useful_examples_of_similar_length_and_fill_up_with_empty_ones() -> None:
    def example(example_id: int, length: int, useful: bool = True) -> Encoded:
        learned = np.zeros(length, np.bool_)
        learned[-1] = useful
        return Encoded(example_id, np.arange(length, dtype=np.int32), learned)

    share = [
        example(0, 9),
        example(1, 3),
        example(2, 5, useful=False),
        example(3, 8),
        example(4, 3),
    ]
    cut = micro_batches(share, 2, 3)
    assert [[e.example_id for e in batch] for batch in cut] == [[1, 4], [3, 0], []]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_its_examples(
    monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    def gathered(everybody: list[Any], own: Any) -> None:
        everybody[0] = own

    monkeypatch.setattr(distributed, "all_gather_object", gathered)
    worker = Worker(0, 1, torch.device("cpu"))
    ids, learned = np.arange(2, dtype=np.int32), np.array([False, True])
    batches = [[Encoded(7, ids, learned)], [Encoded(8, ids, learned)]]
    with pytest.raises(UserError, match=r"Training step 4: .* with example_id 8\."):
        _finite_total(torch.tensor([1.0, loss]).double(), batches, 3, worker)
    assert _finite_total(torch.tensor([1.0, 2.5]).double(), batches, 3, worker) == 3.5
