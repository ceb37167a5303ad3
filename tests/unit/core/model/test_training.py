"""How a worker's share of a global batch is cut into micro-batches."""

import numpy as np

from s2l_ray.core.model.training import _micro_batches
from s2l_ray.core.text.encoding import Encoded


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
    cut = _micro_batches(share, 2, 3)
    assert [[e.example_id for e in batch] for batch in cut] == [[1, 4], [3, 0], []]
