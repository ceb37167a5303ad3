"""Statistics of examples against numpy in fp64, on chosen logits.

Tokens are certain, near impossible or tied; rows are long or empty.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2l_ray.core.model import losses, output_layer
from s2l_ray.core.model.statistics import example_statistics
from s2l_ray.core.text.batching import pad
from s2l_ray.core.text.encoding import Encoded
from tests.families import FAMILIES, examples, model

NAMES = ("mean_probability", "min_probability", "el2n", "grand")
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


class Table(torch.nn.Module):
    """A language model whose hidden state is a lookup of the last token.

    Its outputs can be computed by hand.
    """

    def __init__(
        self, hidden_VH: np.ndarray, weight_VH: np.ndarray, bias_V: np.ndarray | None, after: Any
    ) -> None:
        super().__init__()
        self.hidden = torch.nn.Embedding.from_pretrained(
            torch.tensor(hidden_VH, dtype=torch.float32)
        )
        self.layer = torch.nn.Linear(
            weight_VH.shape[1], weight_VH.shape[0], bias=bias_V is not None
        )
        self.layer.weight = torch.nn.Parameter(torch.tensor(weight_VH, dtype=torch.float32))
        if bias_V is not None:
            self.layer.bias = torch.nn.Parameter(torch.tensor(bias_V, dtype=torch.float32))
        self.after = after
        self.shapes: list[tuple[int, ...]] = []

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.layer

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = self.layer(self.hidden(input_ids))
        self.shapes.append((input_ids.numel(), *logits.shape))
        return SimpleNamespace(logits=self.after(logits))


# What may come after the output layer: the function, and its derivative as numpy knows it.
AFTER: dict[
    str,
    tuple[
        Callable[[Any], Any], Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]
    ],
] = {
    "nothing": (lambda z: z, lambda z: z, np.ones_like),
    "scale": (lambda z: z / 8, lambda z: z / 8, lambda z: np.full_like(z, 1 / 8)),
    "cap": (
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: 30 * np.tanh(z / 30),
        lambda z: 1 - np.tanh(z / 30) ** 2,
    ),
}


def table(
    seed: int, width: int, bias: bool, after: str, size: int = 23
) -> tuple[Table, dict[str, np.ndarray]]:
    """Half of the tokens are followed with near certainty by the next one; logits span +-50."""
    draw = np.random.default_rng(seed)
    hidden, weight = draw.normal(size=(size, width)), draw.normal(size=(size, width))
    for token in range(0, size - 1, 2):
        hidden[token] = 1.5 * weight[token + 1]
    shift = draw.normal(size=size) if bias else None
    weight *= 50 / np.abs(hidden @ weight.T).max()
    numbers = {
        name: value.astype(np.float32).astype(np.float64)
        for name, value in {
            "hidden": hidden,
            "weight": weight,
            "bias": np.zeros(size) if shift is None else shift,
        }.items()
    }
    return Table(hidden, weight, shift, AFTER[after][0]), numbers


def rows(seed: int, lengths: list[int], size: int = 23) -> list[Encoded]:
    """Tokens in order with some jumps, so that certain tokens are among the learned ones."""
    draw = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = (draw.integers(0, size) + np.cumsum(draw.choice([1, 1, 1, 5], length))) % size
        learned = draw.random(length) < 0.7
        learned[0], learned[-1] = False, True
        made.append(Encoded(number, ids.astype(np.int32), learned))
    return made


def by_hand(
    numbers: dict[str, np.ndarray], bias: bool, after: str, row: Encoded
) -> dict[str, float]:
    where = np.flatnonzero(row.learned)
    hidden = numbers["hidden"][row.input_ids[where - 1]]
    emitted = hidden @ numbers["weight"].T + numbers["bias"]
    logits = AFTER[after][1](emitted)
    above = logits - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(above) / np.exp(above).sum(axis=1, keepdims=True)
    places = np.arange(len(where)), row.input_ids[where]
    negative_log = np.log(np.exp(above).sum(axis=1)) - above[places]
    errors = probabilities.copy()
    errors[places] -= 1
    back = errors * AFTER[after][2](emitted)
    gradient = np.einsum("nv,nh->vh", back, hidden) / len(where)
    of_bias = back.mean(axis=0) if bias else np.zeros(1)
    return {
        "loss": negative_log.mean(),
        "mean_probability": probabilities[places].mean(),
        "min_probability": probabilities[places].min(),
        "el2n": np.sqrt((errors**2).sum(axis=1)).mean(),
        "grand": np.sqrt((gradient**2).sum() + (of_bias**2).sum()),
    }


def tensors(batch: list[Encoded], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BL, learned_BL = pad(batch, pad_id)
    return torch.from_numpy(ids_BL), torch.from_numpy(learned_BL)


def check(found: dict[str, torch.Tensor], expected: list[dict[str, float]]) -> None:
    for name, values in found.items():
        wanted = [one[name] for one in expected]
        np.testing.assert_allclose(values.numpy(), wanted, **CLOSE, err_msg=name)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("width", [4, 64], ids=["longer than wide", "wider than long"])
@pytest.mark.parametrize("at_once", [1, 5, 12, 10_000])
def test_statistics_equal_numpy(
    monkeypatch: pytest.MonkeyPatch, after: str, bias: bool, width: int, at_once: int
) -> None:
    monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", at_once * 23)
    made, numbers = table(3, width, bias, after)
    batch = rows(4, [2, 40, 3, 17, 12, 31, 2])
    expected = [by_hand(numbers, bias, after, row) for row in batch]
    if after == "nothing":
        assert (
            min(one["el2n"] for one in expected) < 1.1 < 1.3 < max(one["el2n"] for one in expected)
        )
    check(example_statistics(made, *tensors(batch), NAMES), expected)
    _, *blocks = made.shapes
    assert max(shape[2] for shape in blocks) <= at_once
    assert sum(shape[2] for shape in blocks) == sum(row.learned.sum() for row in batch)


def test_certain_tokens_keep_their_digits() -> None:
    """p - 1 is 0 in fp32 where p is nearer to 1 than 6e-8; the error itself is not."""
    weight = np.diag([24.0, 24.0, 24.0])
    made = Table(np.eye(3), weight, None, AFTER["nothing"][0])
    numbers = {"hidden": np.eye(3), "weight": weight, "bias": np.zeros(3)}
    row = Encoded(0, np.array([1, 1, 1], np.int32), np.array([False, True, True]))
    expected = by_hand(numbers, False, "nothing", row)
    # numpy's own p - 1 is rounded to 1e-16, a millionth of what is left
    assert 1e-12 < expected["grand"] < 1e-9
    found = example_statistics(made, *tensors([row]), NAMES)
    for name in ("el2n", "grand"):
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-4, err_msg=name)


def test_hopeless_tokens_have_finite_statistics() -> None:
    weight = np.diag([200.0, 200.0, 200.0])
    made = Table(np.eye(3), weight, None, AFTER["nothing"][0])
    row = Encoded(0, np.array([1, 2, 0], np.int32), np.array([False, True, True]))
    found = {
        name: values.item()
        for name, values in example_statistics(made, *tensors([row]), NAMES).items()
    }
    assert found["loss"] == 200.0
    assert found["mean_probability"] == found["min_probability"] == 0.0
    assert found["el2n"] == pytest.approx(2**0.5)
    # two tokens, errors and hidden states orthogonal: sqrt(2 * 2) / 2
    assert found["grand"] == pytest.approx(1.0)


def test_errors_that_cancel_give_no_gradient() -> None:
    """Two tokens with opposite hidden states and equal errors: the mean of their gradients is 0."""
    hidden = np.array([[1.0, 2.0], [-1.0, -2.0], [0.5, 0.1]])
    made = Table(hidden, np.zeros((3, 2)), None, AFTER["nothing"][0])
    row = Encoded(0, np.array([0, 2, 1, 2], np.int32), np.array([False, True, False, True]))
    alone = Encoded(1, np.array([0, 2], np.int32), np.array([False, True]))
    grand = example_statistics(made, *tensors([row, alone]), ("grand",))["grand"]
    assert grand[0] == pytest.approx(0, abs=1e-6)
    assert grand[1] == pytest.approx((5 * 6 / 9) ** 0.5)


def test_rows_without_a_learned_token_have_no_statistics() -> None:
    made, _ = table(5, 8, True, "cap")
    batch = rows(6, [5, 9, 4])
    batch[1].learned[:] = False
    found = example_statistics(made, *tensors(batch), NAMES)
    kept = example_statistics(made, *tensors([batch[0], batch[2]]), NAMES)
    for name, values in found.items():
        assert values.isnan().tolist() == [False, True, False], name
        torch.testing.assert_close(values[[0, 2]], kept[name])
    nobody = example_statistics(made, *tensors([batch[1]]), NAMES)
    assert all(values.isnan().all() for values in nobody.values())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("block", [(1, 1), (4, 20), (7, 7 * 22), (100, 10_000)])
def test_losses_do_not_depend_on_how_the_vocabulary_is_cut(
    monkeypatch: pytest.MonkeyPatch, bias: bool, block: tuple[int, int]
) -> None:
    monkeypatch.setattr(losses, "CPU_BLOCK", block)
    made, numbers = table(8, 16, bias, "nothing")
    batch = rows(9, [30, 2, 12])
    check(
        example_statistics(made, *tensors(batch), NAMES[:2]),
        [by_hand(numbers, bias, "nothing", row) for row in batch],
    )
    assert {positions for *_, positions, _ in made.shapes} == {1}, (
        "no logits were to be made by the layer itself"
    )


def test_tokens_that_are_forbidden_by_the_layer_add_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # whole blocks are forbidden, the first among them
    monkeypatch.setattr(losses, "CPU_BLOCK", (4, 16))
    made, _ = table(8, 16, True, "nothing")
    with torch.no_grad():
        made.layer.bias[:10] = -torch.inf
        # and all others are far below 0
        made.layer.bias[10:] -= 200
    batch = [Encoded(0, np.arange(9, 23, dtype=np.int32), np.arange(14) > 0)]
    ids = torch.arange(9, 23)
    with torch.no_grad():
        logits = made(ids[None], use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits.double(), ids[1:]).float()
    torch.testing.assert_close(example_statistics(made, *tensors(batch))["loss"], expected[None])


@pytest.mark.parametrize("above", [80.0, 95.0, 3e4])
def test_logits_far_above_those_of_the_first_tokens_count(
    monkeypatch: pytest.MonkeyPatch, above: float
) -> None:
    monkeypatch.setattr(losses, "CPU_BLOCK", (4, 16))
    made, _ = table(8, 16, True, "nothing")
    with torch.no_grad():
        made.layer.bias[15] = above
    batch = rows(9, [30, 2, 12])
    found = example_statistics(made, *tensors(batch))["loss"]
    for row, loss in zip(batch, found, strict=True):
        ids, where = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.learned)
        with torch.no_grad():
            logits = made(ids[None], use_cache=False).logits[0, :-1].double()
        expected = torch.nn.functional.cross_entropy(logits[where[1:]], ids[where])
        torch.testing.assert_close(loss, expected.float())


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z.mul_(0.5),
        lambda z: z.index_fill_(-1, torch.arange(3), -60.0),
        lambda z: z[..., :23] / 2,
    ],
)
def test_what_a_family_does_to_its_logits_counts_even_in_place(after: Callable[[Any], Any]) -> None:
    made, _ = table(5, 8, True, "nothing")
    made.after = after
    batch = rows(6, [9, 20])
    for row, loss in zip(batch, example_statistics(made, *tensors(batch))["loss"], strict=True):
        ids, where = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.learned)
        with torch.no_grad():
            logits = made(ids[None], use_cache=False).logits[0, :-1]
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits[where[1:]], ids[where])
        )


def test_a_model_that_overflows_gives_nan_and_no_number() -> None:
    made, _ = table(5, 8, True, "nothing")
    with torch.no_grad():
        made.hidden.weight[3] = torch.inf
    batch = [Encoded(0, np.array([3, 4], np.int32), np.array([False, True])), *rows(6, [9])]
    batch[1].input_ids[batch[1].input_ids == 3] = 4
    for name, values in example_statistics(made, *tensors(batch), NAMES).items():
        assert values.isnan().tolist() == [True, False], name


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(["gpt_neox", "gemma2", "mixtral"]),
    seed=st.integers(0, 1000),
    order=st.permutations(range(6)),
    cut=st.integers(1, 5),
    pad_id=st.integers(0, 96),
)
def test_neighbours_order_and_padding_do_not_matter(
    family: str, seed: int, order: list[int], cut: int, pad_id: int
) -> None:
    made, batch = model(family), examples(seed, 6)
    whole = example_statistics(made, *tensors(batch), NAMES)
    for piece in (order[:cut], order[cut:]):
        found = example_statistics(
            made, *tensors([batch[number] for number in piece], pad_id), NAMES
        )
        for name, values in found.items():
            torch.testing.assert_close(values, whole[name][piece], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("el2n",), ("grand",), ("min_probability", "mean_probability")])
def test_losses_do_not_depend_on_what_else_is_asked_for(names: tuple[str, ...]) -> None:
    made, batch = model("gemma2"), examples(3)
    found = example_statistics(made, *tensors(batch), names)
    assert list(found) == ["loss", *names]
    torch.testing.assert_close(
        found["loss"], example_statistics(made, *tensors(batch))["loss"], rtol=1e-6, atol=1e-5
    )


def test_nothing_is_left_behind_and_no_graph_of_the_body_is_kept() -> None:
    made, batch = model("gemma2"), examples(3, 4)
    grads: list[bool] = []
    body = made.model.layers[0].register_forward_hook(
        lambda *_: grads.append(torch.is_grad_enabled())
    )
    before = torch.is_grad_enabled()
    values = example_statistics(made, *tensors(batch), NAMES)
    body.remove()
    assert grads
    assert not any(grads)
    assert torch.is_grad_enabled() == before
    assert not any(one.requires_grad for one in values.values())
    assert all(parameter.grad is None for parameter in made.parameters())
    layer = made.get_output_embeddings()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_statistics_stay_near(family: str) -> None:
    import copy

    made, batch = copy.deepcopy(model(family)), examples(8)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.25)
    exact = example_statistics(made, *tensors(batch), NAMES)
    found = example_statistics(made.bfloat16(), *tensors(batch), NAMES)
    for name, values in found.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(
            values, exact[name], rtol=0.05, atol=0.05, msg=lambda text, name=name: name + text
        )
