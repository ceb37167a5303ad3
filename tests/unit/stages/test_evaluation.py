"""Held-out sums of parts to means by source and over sources."""

from types import SimpleNamespace
from typing import Any

import pytest

from s2l_ray.stages.evaluation import make


@pytest.mark.parametrize("max_new_tokens", [0, 8])
def test_the_mean_over_sources_weighs_each_source_equally(
    monkeypatch: pytest.MonkeyPatch, max_new_tokens: int
) -> None:
    # Of each source: rows, sum of losses, rows that match exactly.
    sums: list[dict[str, list[float]]] = [
        {"many": [2.0, 2.0, 2.0], "one": [1.0, 4.0, 0.0]},
        {"many": [2.0, 6.0, 1.0]},
    ]
    parts = [SimpleNamespace(stats={"sums": own}) for own in sums]
    monkeypatch.setattr(make, "parts_by_actors", lambda *_: parts)
    work: Any = SimpleNamespace(
        manifests={"target": SimpleNamespace(files=[])},
        info=lambda *_: SimpleNamespace(model="model"),
        ranges=[],
        config=SimpleNamespace(evaluation=SimpleNamespace(max_new_tokens=max_new_tokens)),
    )
    info: Any = make.make(work).info
    assert {name: own.rows for name, own in info.by_source.items()} == {"many": 4, "one": 1}
    assert {name: own.loss for name, own in info.by_source.items()} == {"many": 2.0, "one": 4.0}
    assert info.macro.loss == 3.0
    matches = {name: own.exact_match for name, own in info.by_source.items()}
    if max_new_tokens:
        assert matches == {"many": 0.75, "one": 0.0}
        assert info.macro.exact_match == 0.375
    else:
        assert matches == {"many": None, "one": None}
        assert info.macro.exact_match is None
