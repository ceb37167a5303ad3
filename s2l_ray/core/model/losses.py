"""Losses and other statistics of a causal language model, per token and per example, with logits made only where a token is learned.

The loss of an example is the mean cross-entropy over its learned tokens, in fp32 (paper section 1; design, invariant 8).
Shapes: B examples, L padded length, M learned positions of the batch, n those of one example, C of one block, V vocabulary,
H hidden width. A position is where a token is predicted, one before the token itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Logits of one block where whole rows of them are needed, C x V; about four fp32 copies of them are alive at once: 2 GiB.
LOGITS_AT_ONCE = 2**27
# Of losses alone: rows and logits of one block, of any part of the vocabulary. On a CPU fp32 logits stay in a core's own cache; on
# other devices a block is large enough to fill them.
CPU_BLOCK, DEVICE_BLOCK = (2**10, 2**19), (2**14, 2**26)


def token_losses(
    model: nn.Module, input_ids_BL: torch.Tensor, learned_BL: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of every learned token, float32 [M], in row-major order of `learned_BL`, with a graph to train by.

    Args:
        model: a transformers causal LM, or an engine that wraps one in `.module` and forwards calls to it.
        input_ids_BL: int64, right-padded. Padding needs no mask: under causal attention nothing that counts sees it.
        learned_BL: bool; True where the token is predicted from the tokens before it. Column 0 is never learned.

    The hidden states are cut down to the M positions on their way into the output layer, so that whatever a family does after
    it (soft caps, logit scales) still runs, and logits are [M, V] in place of [B, L, V].
    """
    where = _positions(learned_BL)

    def keep_predicting(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (_flat(args[0]).index_select(0, where).unsqueeze(0), *args[1:])

    hook = _output_layer(model).register_forward_pre_hook(keep_predicting)
    try:
        logits_MV = model(input_ids=input_ids_BL, use_cache=False).logits[0]
    finally:
        hook.remove()
    return F.cross_entropy(logits_MV.float(), input_ids_BL[learned_BL], reduction="none")


def example_losses(
    model: nn.Module, input_ids_BL: torch.Tensor, learned_BL: torch.Tensor
) -> torch.Tensor:
    """Mean loss over the learned tokens of each example, float32 [B]; NaN for an example without any."""
    return example_statistics(model, input_ids_BL, learned_BL)["loss"]


@torch.no_grad()
def example_statistics(
    model: nn.Module,
    input_ids_BL: torch.Tensor,
    learned_BL: torch.Tensor,
    names: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """`loss` and the named statistics of each example from one forward pass, float32 [B] each; NaN without a learned token.

    With p the softmax of the final logits (after soft caps and scales) and y the learned token, over an example's n learned tokens:

    loss: mean of -log p_y.
    mean_probability, min_probability: mean and lowest p_y; as cheap as the loss.
    el2n: mean of ||p - onehot(y)||_2. Paul et al. 2021 ("Deep Learning on a Data Diet", section 2) define it for one label; the mean
        over tokens is that of Marion et al. 2023 ("When Less is More").
    grand: norm of the gradient of the example's loss (Paul et al. 2021, section 2), restricted to the output layer: the
        Frobenius norm over its weight [V, H], as it is used there (where it is tied to the input embedding, that use is left out),
        and over its bias where it has one. Exact, not estimated: see `_OutputGradient`.
    """
    counts_B = learned_BL.sum(1)
    if {"el2n", "grand"}.isdisjoint(names):
        made = _of_losses(_losses(model, input_ids_BL, learned_BL), counts_B)
    else:
        made = _of_errors(model, input_ids_BL, learned_BL, counts_B, "grand" in names)
    return {name: made[name] for name in ("loss", *names)}


def _of_losses(losses_M: torch.Tensor, counts_B: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "loss": _means(losses_M, counts_B),
        "mean_probability": _means((-losses_M).exp(), counts_B),
        "min_probability": _lowest(-losses_M, counts_B).exp(),
    }


def _of_errors(
    model: nn.Module,
    input_ids_BL: torch.Tensor,
    learned_BL: torch.Tensor,
    counts_B: torch.Tensor,
    with_gradient: bool,
) -> dict[str, torch.Tensor]:
    """All statistics but, unless asked for, GraNd; the logits are made in blocks of LOGITS_AT_ONCE."""
    layer, targets_M = _output_layer(model), input_ids_BL[learned_BL]
    hidden_MH, _ = _hidden_states(model, input_ids_BL, _positions(learned_BL))
    gradient = _OutputGradient(layer, counts_B) if with_gradient else None
    losses_M, el2n_M = (torch.empty(len(targets_M), device=targets_M.device) for _ in range(2))
    for pieces in _blocks(counts_B.tolist(), max(1, LOGITS_AT_ONCE // layer.weight.shape[0])):
        block = slice(pieces[0][1], pieces[-1][2])
        logits_CV, at_layer_1CV = _logits(
            model, hidden_MH[block], input_ids_BL[:1, :1], with_gradient
        )
        losses_M[block], errors_CV = _errors(logits_CV.detach(), targets_M[block])
        el2n_M[block] = torch.linalg.vector_norm(errors_CV, dim=1)
        if gradient is not None:
            errors_CV = _through(logits_CV, at_layer_1CV, errors_CV)
            for example, first, stop in pieces:
                place = slice(first - block.start, stop - block.start)
                gradient.add(example, errors_CV[place], hidden_MH[first:stop])
    made = {**_of_losses(losses_M, counts_B), "el2n": _means(el2n_M, counts_B)}
    return made if gradient is None else {**made, "grand": gradient.norms()}


# ------------------------------------------------------------------------------------------ the model around its output layer


def _output_layer(model: nn.Module) -> Any:
    causal_lm: Any = getattr(model, "module", model)
    return causal_lm.get_output_embeddings()


def _positions(learned_BL: torch.Tensor) -> torch.Tensor:
    """Where learned tokens are predicted, as places in the flattened [B * L]: int64 [M]."""
    predicts_BL = torch.zeros_like(learned_BL)
    predicts_BL[:, :-1] = learned_BL[:, 1:]
    return predicts_BL.flatten().nonzero().squeeze(1)


def _flat(hidden_BLH: torch.Tensor) -> torch.Tensor:
    return hidden_BLH.reshape(-1, hidden_BLH.shape[-1])


def _hidden_states(
    model: nn.Module, input_ids_BL: torch.Tensor, where_M: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """What goes into the output layer at the given positions, [M, H], and whether what it emits are the final logits.

    The layer itself runs on one position only. Its output is final where the family returns that very tensor, unchanged.
    """
    kept: list[torch.Tensor] = []
    emitted: list[tuple[torch.Tensor, int]] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        kept.append(_flat(args[0]).index_select(0, where_M))
        return (args[0][:1, :1], *args[1:])

    def watch(_: nn.Module, __: Any, logits_11V: torch.Tensor) -> None:
        emitted.append((logits_11V, logits_11V._version))

    layer = _output_layer(model)
    hooks = [layer.register_forward_pre_hook(keep), layer.register_forward_hook(watch)]
    try:
        logits_11V = model(input_ids=input_ids_BL, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    came, version = emitted[0]
    return kept[0], logits_11V is came and logits_11V._version == version


def _logits(
    model: nn.Module, hidden_CH: torch.Tensor, token_11: torch.Tensor, differentiable: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final logits [C, V] of hidden states, and what the output layer itself emitted [1, C, V].

    The family's own forward pass runs on one token, whose hidden state is exchanged on the way into the output layer: so all that
    a family does after it takes place, whatever that is. With `differentiable` the final logits have a graph that begins at the
    second tensor; none of the body is in it.
    """
    emitted: list[torch.Tensor] = []

    def exchange(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (hidden_CH.unsqueeze(0), *args[1:])

    def begin_graph(_: nn.Module, __: Any, logits_1CV: torch.Tensor) -> torch.Tensor:
        emitted.append(logits_1CV.detach().requires_grad_(differentiable))
        torch.set_grad_enabled(differentiable)  # from here on; the block around the call ends it
        return emitted[0]

    layer = _output_layer(model)
    hooks = [layer.register_forward_pre_hook(exchange), layer.register_forward_hook(begin_graph)]
    try:
        with torch.no_grad():
            logits_CV = model(input_ids=token_11, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    with torch.set_grad_enabled(differentiable):
        return logits_CV[0], emitted[0]


# -------------------------------------------------------------------------------------------------------- from logits to numbers


def _losses(model: nn.Module, input_ids_BL: torch.Tensor, learned_BL: torch.Tensor) -> torch.Tensor:
    """What `token_losses` gives, without a graph, and without all logits at once."""
    layer, targets_M = _output_layer(model), input_ids_BL[learned_BL]
    hidden_MH, final = _hidden_states(model, input_ids_BL, _positions(learned_BL))
    if final and type(layer) is nn.Linear:
        losses_M = _linear_losses(layer, hidden_MH, targets_M)
    else:
        losses_M = torch.full((len(targets_M),), torch.nan, device=targets_M.device)
    left = (~losses_M.isfinite()).nonzero().squeeze(1)
    at_once = max(1, LOGITS_AT_ONCE // layer.weight.shape[0])
    for first in range(0, len(left), at_once):
        block = left[first : first + at_once]
        logits_CV, _ = _logits(model, hidden_MH[block], input_ids_BL[:1, :1], differentiable=False)
        losses_M[block] = F.cross_entropy(logits_CV.float(), targets_M[block], reduction="none")
    return losses_M


def _linear_losses(
    layer: nn.Linear, hidden_MH: torch.Tensor, targets_M: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy [M] under the logits of a linear layer, which are made in blocks and added up while they are in the cache.

    Writing all logits, converting them to fp32 and reading them thrice for the softmax costs as much as making them. Not finite
    where logits lie too far apart: see `_block_losses`.
    """
    rows, at_once = CPU_BLOCK if hidden_MH.device.type == "cpu" else DEVICE_BLOCK
    pieces = zip(hidden_MH.split(rows), targets_M.split(rows), strict=True)
    losses = [
        _block_losses(layer, *piece, max(1, at_once // max(1, len(piece[0])))) for piece in pieces
    ]
    return torch.cat(losses)


def _block_losses(
    layer: nn.Linear, hidden_CH: torch.Tensor, targets_C: torch.Tensor, width: int
) -> torch.Tensor:
    """Of some rows, `width` tokens of the vocabulary at a time.

    With m the highest logit of the first `width` tokens and s the sum of exp(logit - m) over all, the loss of a target with logit y
    is (m - y) + log s. Were m the highest of all, every block would have to be read once more to find it. So s, at least 1,
    overflows where a logit is about 88 above m.
    """
    order_C = targets_C.argsort()
    starts = range(0, layer.out_features, width)
    bounds = torch.searchsorted(
        targets_C[order_C], torch.tensor([*starts, layer.out_features]).to(targets_C)
    )
    sums_C, right_C = (torch.zeros(len(hidden_CH), device=hidden_CH.device) for _ in range(2))
    high_C1: torch.Tensor | None = None
    for start, rows in zip(starts, order_C.split(bounds.diff().tolist()), strict=True):
        part = slice(start, start + width)
        bias = None if layer.bias is None else layer.bias[part]
        logits_CW = F.linear(hidden_CH, layer.weight[part], bias).float()
        if len(rows):
            right_C[rows] = logits_CW[rows, targets_C[rows] - start]
        if high_C1 is None:
            high_C1 = logits_CW.amax(1, keepdim=True)
        sums_C += logits_CW.sub_(high_C1).exp_().sum(1)
    assert high_C1 is not None, "an output layer has tokens"
    return (high_C1.squeeze(1) - right_C) + sums_C.log()


def _blocks(counts: list[int], at_once: int) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces (example, first, stop) of the M tokens, in groups of at most `at_once`; only an example larger than that is cut."""
    group: list[tuple[int, int, int]] = []
    first = 0
    for example, count in enumerate(counts):
        for start in range(first, first + count, at_once):
            stop = min(start + at_once, first + count)
            if group and stop - group[0][1] > at_once:
                yield group
                group = []
            group.append((example, start, stop))
        first += count
    if group:
        yield group


def _errors(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the targets [C], and the errors p - onehot [C, V], in fp32.

    Errors add up to 0, so that of the target is taken from the others: p - 1 would lose its digits where p is nearly 1.
    """
    log_probabilities_CV = logits_CV.float().log_softmax(-1)
    places_C1 = targets_C.unsqueeze(1)
    losses_C = -log_probabilities_CV.gather(1, places_C1).squeeze(1)
    errors_CV = log_probabilities_CV.exp_().scatter_(1, places_C1, 0.0)
    return losses_C, errors_CV.scatter_(1, places_C1, -errors_CV.sum(1, keepdim=True))


def _through(
    logits_CV: torch.Tensor, at_layer_1CV: torch.Tensor, errors_CV: torch.Tensor
) -> torch.Tensor:
    """Errors at the final logits taken back through soft caps and scales to the output of the output layer, fp32 [C, V]."""
    (errors_1CV,) = torch.autograd.grad(logits_CV, at_layer_1CV, errors_CV.to(logits_CV.dtype))
    return errors_1CV[0].float()


class _OutputGradient:
    """Norms of the gradient of each example's loss for the output layer's weight and bias, without a backward pass.

    With e_t [V] the error of token t at the layer's output and h_t [H] its input (a 1 appended where there is a bias), the
    gradient is G = 1/n sum_t e_t h_t^T, so ||G||^2 = 1/n^2 sum_t,s <e_t, e_s><h_t, h_s>: two Gram matrices of [n, n]. G itself is added up
    only for an example with n > H, where it is less work, or that came in several blocks; G has the size of the layer.
    """

    def __init__(self, layer: Any, counts_B: torch.Tensor) -> None:
        self.counts, self.width = counts_B.tolist(), layer.weight.shape[1]
        self.has_bias = getattr(layer, "bias", None) is not None
        self.squares_B = torch.full(
            (len(self.counts),), torch.nan, dtype=torch.float64, device=counts_B.device
        )
        self.unfinished: torch.Tensor | None = None
        self.missing = 0

    def add(self, example: int, errors_nV: torch.Tensor, hidden_nH: torch.Tensor) -> None:
        """Take in a piece of an example; pieces come in order, each example's one after the other."""
        hidden_nH = hidden_nH.float()
        if self.has_bias:
            hidden_nH = torch.cat([hidden_nH, hidden_nH.new_ones(len(hidden_nH), 1)], dim=1)
        count = self.counts[example]
        if len(errors_nV) == count <= self.width:
            products_nn = (errors_nV @ errors_nV.T) * (hidden_nH @ hidden_nH.T)
            self.squares_B[example] = products_nn.sum(dtype=torch.float64)
            return
        if self.unfinished is None:
            self.unfinished, self.missing = errors_nV.T @ hidden_nH, count
        else:
            self.unfinished.addmm_(errors_nV.T, hidden_nH)
        self.missing -= len(errors_nV)
        if self.missing == 0:
            self.squares_B[example] = self.unfinished.square().sum(dtype=torch.float64)
            self.unfinished = None

    def norms(self) -> torch.Tensor:
        """float32 [B]; NaN for examples that nothing came of."""
        counts_B = torch.tensor(self.counts, dtype=torch.float64, device=self.squares_B.device)
        # sums of products of both signs may end a rounding error below 0 where the gradient vanishes
        return (self.squares_B.clamp(min=0).sqrt() / counts_B).float()


def _owners(counts_B: torch.Tensor) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts_B), device=counts_B.device), counts_B)


def _means(values_M: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Mean of each example's tokens, added up in fp64: float32 [B]."""
    sums_B = torch.zeros(len(counts_B), dtype=torch.float64, device=counts_B.device)
    return (sums_B.index_add_(0, _owners(counts_B), values_M.double()) / counts_B).float()


def _lowest(values_M: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Smallest of each example's tokens: float32 [B]."""
    nothing_B = torch.full((len(counts_B),), torch.nan, device=counts_B.device)
    return nothing_B.scatter_reduce(0, _owners(counts_B), values_M, "amin", include_self=False)
