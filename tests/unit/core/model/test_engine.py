"""What the engine is told of how to train changes no loss; a training of one worker each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from s2l_ray.core.model import engine
from s2l_ray.core.model.workers import Worker
from s2l_ray.errors import UserError
from tests import one_worker


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    yield from one_worker.group()


@pytest.fixture(scope="module")
def expected(alone: Worker) -> list[float]:
    return one_worker.losses(one_worker.setup(), alone)


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3", "zero3_offload"])
def test_every_preset_has_the_same_losses(
    alone: Worker, expected: list[float], deepspeed: str
) -> None:
    found = one_worker.losses(one_worker.setup(deepspeed=deepspeed), alone)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_missing_compiler_is_told_before_any_weight_is_read(
    alone: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    settings = engine._settings(one_worker.setup(deepspeed="zero3_offload"), alone, 1)
    with pytest.raises(
        UserError, match=r"(?s)compiling DeepSpeed's AdamW .*needs a C\+\+ compiler"
    ):
        engine._build_operators(settings)
