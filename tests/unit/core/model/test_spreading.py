"""Models over several GPUs: which layer lies where, beside the same model in one place."""

import copy
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from accelerate import dispatch_model

from s2l_ray.core.model.decoding import decode
from s2l_ray.core.model.losses import token_losses_in_blocks
from s2l_ray.core.model.spreading import check_room, layout
from s2l_ray.errors import UserError
from tests import families

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ["llama", "gpt_neox", "gpt2", "qwen2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gpus", [2, 3])
def test_every_parameter_has_one_place_and_layers_follow_each_other(family: str, gpus: int) -> None:
    model = families.model(family)
    places = layout(model, gpus)
    for name, _ in model.named_parameters():
        assert len([own for own in places if name.startswith(f"{own}.")]) == 1, name
    layers = [place for name, place in places.items() if name.rpartition(".")[2].isdigit()]
    assert layers == sorted(layers)
    # Losses are taken where the output layer is.
    assert {place for name, place in places.items() if not name[-1].isdigit()} == {0}


def test_shares_are_about_equal() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(10, 10, bias=False) for _ in range(9)])
    model.head = torch.nn.Linear(10, 10, bias=False)
    assert list(layout(model, 2).values()) == [0, *[0] * 4, *[1] * 5]
    assert list(layout(model, 5).values()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_answers_are_those_of_the_model_in_one_place(family: str) -> None:
    # There is one device here: what is tried is that accelerate's hooks and ours get on.
    ids = torch.arange(1, 25).reshape(2, 12)
    learned = torch.arange(12).expand(2, 12) > 4
    encoder: Any = SimpleNamespace(
        pad=0,
        stops=[0],
        prompts=lambda rows, asking: [[5, 6, 7], [9, 8]],
        tokenizer=SimpleNamespace(decode=lambda new, **_: str(new)),
    )
    rows = pa.table({"example_id": [0, 1]})
    found = []
    for spread in (False, True):
        model = copy.deepcopy(families.model(family))
        if spread:
            places = dict.fromkeys(layout(model, 2), "cpu")
            model = dispatch_model(model, places, force_hooks=True)
        with torch.no_grad():
            losses = token_losses_in_blocks(model, ids, learned)
        found.append((losses.tolist(), decode(model, encoder, rows, 4, 100, "cpu")))
    assert found[0] == found[1]


def test_a_model_that_does_not_fit_is_refused() -> None:
    model = families.model("llama")
    places = layout(model, 2)
    check_room(model, places, [1 << 30, 1 << 30])
    with pytest.raises(UserError, match=r"GPU 1 of 2 would hold .* Raise scaling.evaluation.gpus"):
        check_room(model, places, [1 << 30, 0])
