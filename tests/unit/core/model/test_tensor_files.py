"""How tensors are split into files over the workers."""

from hypothesis import given
from hypothesis import strategies as st

from s2l_ray.core.model.tensor_files import split_tensors


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 60))
def test_files_hold_every_tensor_once_in_order_and_within_the_limit(
    sizes: list[int], workers: int, limit: int
) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    files = split_tensors(named, workers, limit)
    assert [name for file in files for name in file.names] == list(named)
    ranks = [file.rank for file in files]
    assert ranks == sorted(ranks)
    assert set(ranks) <= set(range(workers))
    for file in files:
        assert len(file.names) == 1 or sum(named[name] for name in file.names) <= limit
    for rank in range(workers):
        share = sum(named[name] for file in files if file.rank == rank for name in file.names)
        assert share < sum(sizes) / workers + max(sizes)
