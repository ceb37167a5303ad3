"""Properties of losses, on a few families: batches, neighbours, gradients, shapes, precision."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.model.losses import token_losses
from s2l_ray.core.model.statistics import example_statistics
from s2l_ray.core.text.batching import pad, token_batches
from s2l_ray.core.text.encoding import Encoded
from tests.families import examples, model, reference

pytestmark = pytest.mark.usefixtures("one_thread")

# test_families.py has all of them
FEW = ("gpt_neox", "llama", "gemma2")
# fp32 numbers near 50 lie 4e-6 apart
CLOSE = {"rtol": 1e-6, "atol": 1e-5}


def batched(made: Any, rows: list[Encoded], pad_id: int = 0) -> torch.Tensor:
    ids_BL, learned_BL = pad(rows, pad_id)
    tensors = torch.from_numpy(ids_BL), torch.from_numpy(learned_BL)
    return example_statistics(made, *tensors)["loss"]


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_losses_equal_an_unbatched_forward(family: str, tokens_per_batch: int) -> None:
    made, rows = model(family), examples(0)
    expected = [reference(made, row) for row in rows]
    assert max(expected) > 10, "large losses were to be among them"
    for batch in token_batches([len(row.input_ids) for row in rows], tokens_per_batch):
        losses = batched(made, [rows[number] for number in batch])
        assert losses.dtype == torch.float32
        torch.testing.assert_close(
            losses, torch.tensor([expected[number] for number in batch]), **CLOSE
        )


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["gpt_neox", "llama"]),
    seed=st.integers(0, 1000),
    order=st.permutations(range(6)),
    cut=st.integers(1, 5),
    pad_id=st.integers(0, 96),
)
def test_neighbours_order_and_padding_do_not_matter(
    family: str, seed: int, order: list[int], cut: int, pad_id: int
) -> None:
    made, rows = model(family), examples(seed, 6)
    whole = batched(made, rows)
    pieces = [order[:cut], order[cut:]]
    for piece in pieces:
        losses = batched(made, [rows[number] for number in piece], pad_id)
        torch.testing.assert_close(losses, whole[piece], **CLOSE)


@pytest.mark.parametrize("family", FEW)
def test_token_losses_come_in_row_major_order(family: str) -> None:
    made, rows = model(family), examples(3, 5)
    ids_BL, learned_BL = (torch.from_numpy(array) for array in pad(rows, 0))
    with torch.inference_mode():
        losses_M = token_losses(made, ids_BL, learned_BL)
        logits_BLV = made(input_ids=ids_BL).logits.double()
    log_probabilities_BLV = logits_BLV.log_softmax(-1)
    expected = [
        -log_probabilities_BLV[b, t - 1, ids_BL[b, t]].item()
        for b, t in learned_BL.nonzero().tolist()
    ]
    assert losses_M.dtype == torch.float32
    torch.testing.assert_close(losses_M.double(), torch.tensor(expected).double(), **CLOSE)


@pytest.mark.parametrize("family", FEW)
def test_gradients_equal_those_of_the_plain_loss(family: str) -> None:
    made, rows = copy.deepcopy(model(family)).double(), examples(5, 4)
    with torch.no_grad():
        # away from saturation, so that no gradient vanishes
        made.get_output_embeddings().weight.mul_(0.05)
    ids_BL, learned_BL = (torch.from_numpy(array) for array in pad(rows, 0))
    labels_BL = ids_BL.masked_fill(~learned_BL, -100)

    made(input_ids=ids_BL, labels=labels_BL).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in made.named_parameters()}
    made.zero_grad()
    token_losses(made, ids_BL, learned_BL).mean().backward()

    assert max(gradient.abs().max().item() for gradient in plain.values()) > 1e-3
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-7, msg=name)


def test_logits_are_made_only_where_a_token_is_learned() -> None:
    made, rows = model("llama"), examples(6, 4)
    ids_BL, learned_BL = (torch.from_numpy(array) for array in pad(rows, 0))
    shapes = []
    hook = made.get_output_embeddings().register_forward_hook(
        lambda _, args, out: shapes.append(tuple(out.shape))
    )
    token_losses(made, ids_BL, learned_BL)
    hook.remove()
    assert shapes == [(1, int(learned_BL.sum()), 97)]
    assert made(input_ids=ids_BL).logits.shape == (*ids_BL.shape, 97), "no hook was left behind"


def test_a_wrapped_model_is_called_through_its_wrapper() -> None:
    made, rows = model("llama"), examples(7, 3)

    class Engine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.calls = made, 0

        def forward(self, **inputs: Any) -> Any:
            self.calls += 1
            return self.module(**inputs)

    engine = Engine()
    torch.testing.assert_close(batched(engine, rows), batched(made, rows), rtol=0, atol=0)
    assert engine.calls == 1


def test_a_row_without_a_learned_token_has_no_loss() -> None:
    made, rows = model("gpt_neox"), examples(8, 3)
    rows[1].learned[:] = False
    losses = batched(made, rows)
    assert torch.isnan(losses).tolist() == [False, True, False]
    torch.testing.assert_close(losses[[0, 2]], batched(made, [rows[0], rows[2]]), **CLOSE)
    assert torch.isnan(batched(made, [rows[1]])).tolist() == [True]


def test_half_precision_weights_still_give_fp32_losses() -> None:
    made, rows = copy.deepcopy(model("llama")).bfloat16(), examples(9, 4)
    losses = batched(made, rows)
    assert losses.dtype == torch.float32
    expected = torch.tensor([reference(made, row) for row in rows])
    torch.testing.assert_close(losses, expected, rtol=0.03, atol=0.3)
    ids_BL, learned_BL = (torch.from_numpy(array) for array in pad(rows, 0))
    losses_M = token_losses(made, ids_BL, learned_BL)
    assert losses_M.dtype == torch.float32
    assert (losses_M.bfloat16().float() != losses_M).any(), (
        "the cross-entropy was to be taken in fp32"
    )
