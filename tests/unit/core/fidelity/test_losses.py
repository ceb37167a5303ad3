"""The losses that a check measures: settings, checkpoints, and the reference."""

from typing import Any

import numpy as np
import pytest
import torch

from s2l_ray.core.fidelity import losses
from s2l_ray.core.fidelity.losses import Checkpoint, Setting
from s2l_ray.core.model.scoring import Weights
from tests.families import examples, model, reference

CPU = torch.device("cpu")


def checkpoint(family: str, rows: list[Any], label: str = "step 1") -> Checkpoint:
    class Pads:
        pad = 0

    made = model(family)
    weights = Weights(made.config, made.state_dict(), family)
    return Checkpoint(label, [0, 1], Pads(), rows, lambda: weights)  # type: ignore[arg-type]


def test_settings_span_dtypes_batches_and_attention() -> None:
    rows = examples(0)
    longest = max(len(row.input_ids) for row in rows)
    made = losses.settings([checkpoint("llama", rows)], 1000, eager_too=True)
    padded = min(1000, len(rows) * longest)
    sizes = [1, max(longest, padded // 4), padded]
    assert [(s.tokens, s.attention) for s in made if s.dtype == "fp32"] == [
        *((t, None) for t in sizes),
        (padded, "eager"),
    ]
    assert [s.dtype for s in made] == ["fp32"] * 4 + ["bf16"] * 4
    assert losses.job_setting(made, "bf16") == Setting("bf16", padded)
    narrow = losses.settings([checkpoint("llama", rows)], 50, eager_too=False)
    assert sorted({s.tokens for s in narrow}) == [1, longest, 50]


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "mixtral"])
def test_every_setting_is_measured_against_the_plain_forward(family: str) -> None:
    rows = examples(1)
    seen = [checkpoint(family, rows, "step 0"), checkpoint(family, rows, "step 9")]
    in_settings = losses.settings(seen, 300, eager_too=True)
    passes: list[int] = []
    expected, found = losses.measure(seen, in_settings, CPU, lambda: passes.append(1))
    assert len(passes) == (1 + len(in_settings)) * 2
    assert list(found) == in_settings
    plain = [reference(model(family), row) for row in rows]
    np.testing.assert_allclose(expected, np.stack([plain, plain], axis=1), rtol=1e-6, atol=1e-5)
    for setting, values in found.items():
        shift = np.abs(values - expected).max()
        assert shift < 2e-5 if setting.dtype == "fp32" else shift > 1e-3, setting


def test_a_model_whose_padding_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions counted from the end, as with left padding: right alone, wrong in a batch."""
    import copy

    made = copy.deepcopy(model("gpt2"))
    plain = type(made).forward

    def shifted(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        filled = (input_ids != 0).sum(1, keepdim=True)
        positions = (torch.arange(input_ids.shape[1])[None] - (input_ids.shape[1] - filled)).clamp(
            min=0
        )
        return plain(self, input_ids=input_ids, position_ids=positions, **rest)

    rows = examples(1)
    for row in rows:
        row.input_ids[row.input_ids == 0] = 1
    monkeypatch.setattr(type(made), "forward", shifted)
    seen = [checkpoint("gpt2", rows)]
    in_settings = losses.settings(seen, 10_000, eager_too=False)
    expected, found = losses.measure(seen, in_settings, CPU)
    shifts = {
        s: float(np.abs(values - expected).max())
        for s, values in found.items()
        if s.dtype == "fp32"
    }
    assert [shift < 2e-5 for shift in shifts.values()] == [True, False, False]


def test_checkpoints_are_taken_evenly_with_the_first_and_the_last() -> None:
    assert losses._evenly(13, None) == list(range(13))
    assert losses._evenly(4, 9) == [0, 1, 2, 3]
    assert losses._evenly(13, 4) == [0, 4, 8, 12]
    assert losses._evenly(13, 2) == [0, 12]
    assert losses._evenly(13, 1) == [12]
