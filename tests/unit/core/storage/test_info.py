"""The infos of manifests: what is stored is read back, and what is none is refused by name."""

import json
from dataclasses import replace

import pytest

from s2l_ray.core.storage.info import ClustersInfo, Moved, TrajectoriesInfo, info_of, stored
from s2l_ray.errors import UserError
from tests.committed import info_with, manifest

MOVED = Moved(
    base_sizes=[1, 2], before=[2, 2], changed=1, shifts=[0.5, 0.0], new_rows=3, new_sources=["new"]
)


@pytest.mark.parametrize("moved", [None, MOVED])
def test_an_info_is_read_as_it_was_stored(moved: Moved | None) -> None:
    info = info_with(
        ClustersInfo, k=2, centroids=[[1.5, 2.0], [0.1, 3.0]], sizes=[3, 4], moved=moved
    )
    text = json.dumps(stored(info), allow_nan=False)
    assert info_of(manifest("clusters", info=json.loads(text)), ClustersInfo) == info


def test_clusters_stored_without_a_base_are_read() -> None:
    info = stored(info_with(ClustersInfo, k=2))
    del info["moved"]
    assert info_of(manifest("clusters", info=info), ClustersInfo).moved is None


def test_what_is_no_info_is_refused_with_its_field() -> None:
    made = manifest("trajectories", info=info_with(TrajectoriesInfo, scored=3))
    for wrong, said in (
        ({**made.info, "scored": "many"}, r"scored: .* got 'many'"),
        ({name: made.info[name] for name in made.info if name != "steps"}, "steps: "),
        ({**made.info, "surprise": 1}, "surprise: "),
    ):
        with pytest.raises(UserError, match=rf"manifest of trajectories f: .*{said}.*run again"):
            info_of(replace(made, info=wrong), TrajectoriesInfo)


def test_a_stage_without_facts_stores_none() -> None:
    assert stored(None) == {}
