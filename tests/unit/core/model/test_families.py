"""Losses and statistics of every family against its own unbatched loss and plain autograd.

Logits span +-50, rows are longer than the sliding windows, and batches are ragged. Losses are
compared to 1e-5 and, for large ones, one part in 10^6: fp32 numbers near 50 lie 4e-6 apart, those
near 100 8e-6.
"""

import copy
import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from s2l_ray.core.model.architecture import build
from s2l_ray.core.model.engine import parameter_groups
from s2l_ray.core.model.statistics import example_statistics
from s2l_ray.core.text.batching import pad, token_batches
from s2l_ray.core.text.encoding import Encoded
from tests.families import COMMON, FAMILIES, SPAN, WINDOW, examples, model, rebuilt, reference, span

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = {"rtol": 1e-6, "atol": 1e-5}
STATISTICS = ("mean_probability", "min_probability", "el2n", "grand")

# What a family does besides a plain decoder, and the value of its config field that undoes it.
REMOVED = [
    ("gemma2", "final_logit_softcapping", None),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma2", "sliding_window", 4096),
    ("gemma3_text", "final_logit_softcapping", None),
    ("gemma3_text", "sliding_window", 4096),
    ("granite", "logits_scaling", 1.0),
    ("granite", "embedding_multiplier", 1.0),
    ("granite", "attention_multiplier", 1.0),
    ("granite", "residual_multiplier", 1.0),
    ("granitemoe", "logits_scaling", 1.0),
    ("cohere", "logit_scale", 1.0),
    ("cohere2", "logit_scale", 1.0),
    ("cohere2", "sliding_window", 4096),
    ("mistral", "sliding_window", None),
    ("phi3", "sliding_window", None),
    ("qwen2", "sliding_window", 4096),
    ("starcoder2", "sliding_window", None),
    ("gpt_oss", "sliding_window", 4096),
    ("smollm3", "no_rope_layers", [1, 1]),
    ("mixtral", "num_experts_per_tok", 1),
    ("qwen2_moe", "num_experts_per_tok", 1),
    ("olmoe", "num_experts_per_tok", 1),
]


def batched(made: Any, rows: list[Encoded], tokens_per_batch: int, pad_id: int = 0) -> torch.Tensor:
    losses = torch.empty(len(rows))
    for batch in token_batches([len(row.input_ids) for row in rows], tokens_per_batch):
        ids_BL, learned_BL = tensors([rows[number] for number in batch], pad_id)
        losses[batch] = example_statistics(made, ids_BL, learned_BL)["loss"]
    return losses


def tensors(rows: list[Encoded], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BL, learned_BL = pad(rows, pad_id)
    return torch.from_numpy(ids_BL), torch.from_numpy(learned_BL)


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_the_familys_own_unbatched_loss(family: str, tied: bool) -> None:
    made, rows = model(family, tied), examples(0)
    assert span(made) >= SPAN
    assert max(len(row.input_ids) for row in rows) > 3 * WINDOW
    assert (made.get_output_embeddings().weight is made.get_input_embeddings().weight) == tied
    expected = torch.tensor([reference(made, row) for row in rows])
    assert expected.max() > 25, "large losses were to be among them"
    for tokens_per_batch, pad_id in ((1, 0), (90, 96), (10_000, 0), (10_000, 3)):
        torch.testing.assert_close(batched(made, rows, tokens_per_batch, pad_id), expected, **CLOSE)


@pytest.mark.parametrize(("family", "field", "value"), REMOVED)
def test_the_comparison_sees_when_a_cap_a_scale_or_a_mask_is_missing(
    family: str, field: str, value: Any
) -> None:
    rows = examples(0)
    expected = torch.tensor([reference(model(family), row) for row in rows])
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        torch.testing.assert_close(
            batched(rebuilt(family, **{field: value}), rows, 10_000), expected, **CLOSE
        )
    same = rebuilt(family, **{field: getattr(model(family).config, field)})
    torch.testing.assert_close(batched(same, rows, 10_000), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_needs_no_mask_either(family: str) -> None:
    made, rows = rebuilt(family, "eager"), examples(2)
    assert made.config._attn_implementation == "eager"
    expected = torch.tensor([reference(made, row) for row in rows])
    torch.testing.assert_close(batched(made, rows, 200), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_a_batch_shifts_losses_by_rounding_only(family: str) -> None:
    """Logits near 50 are 0.25 apart in bf16, and these models' weights are that sensitive."""
    made, rows = copy.deepcopy(model(family)), examples(4)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.25)
    made = made.bfloat16()
    expected = torch.tensor([reference(made, row) for row in rows])
    losses = batched(made, rows, 10_000)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_vocabulary_padded_beyond_the_tokenizer_counts_as_the_model_counts_it(
    family: str,
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], "vocab_size": 128})
    made, rows = AutoModelForCausalLM.from_config(config).float().eval(), examples(5)
    expected = torch.tensor([reference(made, row) for row in rows])
    torch.testing.assert_close(batched(made, rows, 10_000), expected, **CLOSE)


# --------------------------------------------------------------------------------------- statistics


def plain(made: Any, row: Encoded) -> dict[str, float]:
    """One row in fp64 by plain formulas; GraNd by autograd.

    A tied output layer is first replaced by one of its own.
    """
    made = copy.deepcopy(made).double()
    if hasattr(made.config, "num_experts_per_tok"):
        # the default has no fp64
        made.set_experts_implementation("eager")
    layer = made.get_output_embeddings()
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    ids = torch.from_numpy(row.input_ids).long()
    where = torch.from_numpy(row.learned).nonzero().squeeze(1)
    logits = made(input_ids=ids[None]).logits[0][where - 1]
    F.cross_entropy(logits, ids[where]).backward()
    probabilities = logits.detach().softmax(-1)
    right = probabilities[torch.arange(len(where)), ids[where]]
    errors = probabilities - F.one_hot(ids[where], probabilities.shape[1])
    gradients = [parameter.grad.flatten() for parameter in layer.parameters()]
    assert len(gradients) == 1 + (layer.bias is not None)
    return {
        "loss": F.cross_entropy(logits, ids[where]).item(),
        "mean_probability": right.mean().item(),
        "min_probability": right.min().item(),
        "el2n": errors.norm(dim=1).mean().item(),
        "grand": torch.cat(gradients).norm().item(),
    }


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_plain_formulas(family: str, tied: bool) -> None:
    made, rows = model(family, tied), examples(7)
    expected = [plain(made, row) for row in rows]
    found = example_statistics(made, *tensors(rows, 5), STATISTICS)
    assert list(found) == ["loss", *STATISTICS]
    for name, values in found.items():
        assert values.dtype == torch.float32
        wanted = torch.tensor([one[name] for one in expected])
        torch.testing.assert_close(
            values, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )
    grands = [one["grand"] for one in expected]
    assert max(grands) > 1.1 * min(grands), "the gradients were to differ"


def _with_dropout(family: str) -> Any:
    """The family's config with all that drops or jitters at a half."""
    config = copy.deepcopy(model(family).config)
    for inner in (config, *(v for v in vars(config).values() if hasattr(v, "model_type"))):
        for name, value in list(vars(inner).items()):
            if type(value) is float and re.search("dropout|pdrop|layerdrop|jitter", name):
                setattr(inner, name, 0.5)
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_training_draws_nothing(family: str) -> None:
    ids = torch.arange(1, 30)[None]
    for dropout in (False, True):
        torch.manual_seed(0)
        made = build(_with_dropout(family), dropout=dropout).train()
        # Where layers are dropped, two passes may by chance drop the same ones.
        first, *others = (made(input_ids=ids).logits for _ in range(12))
        # mpt reads no field of dropout but a whole number.
        drops = family != "mpt" and any("drop" in name for name in vars(made.config))
        equal = all(torch.equal(first, other) for other in others)
        assert equal == (not dropout or not drops), family


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_decay_are_those_of_the_trainer_of_transformers(family: str) -> None:
    from transformers import Trainer

    made = model(family)
    wanted = set(Trainer.get_decay_parameter_names(None, made))  # type: ignore[arg-type]
    names = {parameter: name for name, parameter in made.named_parameters()}
    decayed, kept = parameter_groups(made, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[parameter] for parameter in decayed["params"]} <= wanted
    left = {names[parameter] for parameter in kept["params"]} & wanted
    assert {dict(made.named_parameters())[name].ndim for name in left} <= {1}
