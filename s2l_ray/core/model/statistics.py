"""The loss and further statistics of each example of a batch, from one forward pass.

The loss of an example is the mean cross-entropy over its learned tokens, in fp32, as S2L takes
it (Yang et al. 2024). Shapes: B examples, L padded length, M learned tokens of the batch, n those
of one example, C of one block, V vocabulary, H hidden width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from s2l_ray.core.model.losses import token_losses_in_blocks
from s2l_ray.core.model.output_layer import (
    hidden_states,
    logits_of,
    output_layer,
    positions_at_once,
    predicting_positions,
)


@torch.no_grad()
def example_statistics(
    model: nn.Module,
    input_ids_BL: torch.Tensor,
    learned_BL: torch.Tensor,
    names: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """`loss` and the named statistics, float32 [B]; NaN for an example without a learned token.

    Let p be the softmax of the final logits (after soft caps and scales) and y the learned token.
    Over the n learned tokens of an example,

    loss: mean of -log p_y.
    mean_probability, min_probability: mean and lowest p_y; as cheap as the loss.
    el2n: mean of ||p - onehot(y)||_2. Paul et al. 2021 ("Deep Learning on a Data Diet", section 2)
        define it for one label; the mean over tokens is that of Marion et al. 2023 ("When Less is
        More").
    grand: norm of the gradient of the example's loss (Paul et al. 2021, section 2) for the output
        layer alone: for its weight [V, H] as it is used there (where the weight is tied to the
        input embedding, its use there is left out), and for its bias where it has one. Exact, not
        estimated: see `OutputGradient`.
    """
    counts_B = learned_BL.sum(1)
    if {"el2n", "grand"}.isdisjoint(names):
        losses_M = token_losses_in_blocks(model, input_ids_BL, learned_BL)
        made = _from_losses(losses_M, counts_B)
    else:
        made = _from_errors(model, input_ids_BL, learned_BL, counts_B, "grand" in names)
    return {name: made[name] for name in ("loss", *names)}


def _from_losses(losses_M: torch.Tensor, counts_B: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "loss": _means(losses_M, counts_B),
        "mean_probability": _means((-losses_M).exp(), counts_B),
        "min_probability": _lowest(-losses_M, counts_B).exp(),
    }


def _from_errors(
    model: nn.Module,
    input_ids_BL: torch.Tensor,
    learned_BL: torch.Tensor,
    counts_B: torch.Tensor,
    with_gradient: bool,
) -> dict[str, torch.Tensor]:
    """All statistics (GraNd only if asked for), which takes whole rows of logits, in blocks."""
    layer, targets_M = output_layer(model), input_ids_BL[learned_BL]
    hidden_MH, _ = hidden_states(model, input_ids_BL, predicting_positions(learned_BL))
    gradient = OutputGradient(layer, counts_B) if with_gradient else None
    losses_M, el2n_M = (torch.empty(len(targets_M), device=targets_M.device) for _ in range(2))
    for pieces in _blocks(counts_B.tolist(), positions_at_once(layer)):
        block = slice(pieces[0][1], pieces[-1][2])
        logits_CV, at_layer_1CV = logits_of(
            model, hidden_MH[block], input_ids_BL[:1, :1], with_gradient
        )
        losses_M[block], errors_CV = _errors(logits_CV.detach(), targets_M[block])
        el2n_M[block] = torch.linalg.vector_norm(errors_CV, dim=1)
        if gradient is not None:
            errors_CV = _at_layer(logits_CV, at_layer_1CV, errors_CV)
            for example, first, stop in pieces:
                place = slice(first - block.start, stop - block.start)
                gradient.add(example, errors_CV[place], hidden_MH[first:stop])
    made = {**_from_losses(losses_M, counts_B), "el2n": _means(el2n_M, counts_B)}
    return made if gradient is None else {**made, "grand": gradient.norms()}


def _blocks(counts: list[int], at_once: int) -> Iterator[list[tuple[int, int, int]]]:
    """The M tokens in blocks of at most `at_once`, as pieces (example, first, stop).

    Only an example larger than a block is cut.
    """
    block: list[tuple[int, int, int]] = []
    first = 0
    for example, count in enumerate(counts):
        for start in range(first, first + count, at_once):
            stop = min(start + at_once, first + count)
            if block and stop - block[0][1] > at_once:
                yield block
                block = []
            block.append((example, start, stop))
        first += count
    if block:
        yield block


def _errors(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the targets [C], and the errors p - onehot(y) [C, V], in fp32.

    The errors of a token add up to 0, so that of its target is minus the sum of the others:
    p_y - 1 would lose its digits where p_y is nearly 1.
    """
    log_probabilities_CV = logits_CV.float().log_softmax(-1)
    places_C1 = targets_C.unsqueeze(1)
    losses_C = -log_probabilities_CV.gather(1, places_C1).squeeze(1)
    errors_CV = log_probabilities_CV.exp_().scatter_(1, places_C1, 0.0)
    return losses_C, errors_CV.scatter_(1, places_C1, -errors_CV.sum(1, keepdim=True))


def _at_layer(
    logits_CV: torch.Tensor, at_layer_1CV: torch.Tensor, errors_CV: torch.Tensor
) -> torch.Tensor:
    """Errors at the final logits, through soft caps and scales back to the output of the layer.

    Float32 [C, V].
    """
    (errors_1CV,) = torch.autograd.grad(logits_CV, at_layer_1CV, errors_CV.to(logits_CV.dtype))
    return errors_1CV[0].float()


class OutputGradient:
    """Norms of the gradient of each example's loss for the output layer, without a backward pass.

    With e_t [V] the error of token t at the layer's output and h_t [H] its input (a 1 appended
    where the layer has a bias), the gradient is G = 1/n sum_t e_t h_t^T, so

        ||G||^2 = 1/n^2 sum_t,s <e_t, e_s> <h_t, h_s>,

    which takes two Gram matrices [n, n]. G itself, as large as the layer, is added up only for an
    example with n > H, where it is less work, or with tokens in several blocks.
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
        """Add a piece of an example; all pieces of one come before those of the next."""
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
        """||G|| of each example, float32 [B]; NaN for an example without a learned token."""
        counts_B = torch.tensor(self.counts, dtype=torch.float64, device=self.squares_B.device)
        # Where the gradient vanishes, rounding may leave the sum of products below 0.
        return (self.squares_B.clamp(min=0).sqrt() / counts_B).float()


def _owners(counts_B: torch.Tensor) -> torch.Tensor:
    """The example of each token: int64 [M]."""
    return torch.repeat_interleave(torch.arange(len(counts_B), device=counts_B.device), counts_B)


def _means(values_M: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Mean of each example's tokens, added up in fp64: float32 [B]."""
    sums_B = torch.zeros(len(counts_B), dtype=torch.float64, device=counts_B.device)
    return (sums_B.index_add_(0, _owners(counts_B), values_M.double()) / counts_B).float()


def _lowest(values_M: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Smallest of each example's tokens: float32 [B]."""
    nothing_B = torch.full((len(counts_B),), torch.nan, device=counts_B.device)
    return nothing_B.scatter_reduce(0, _owners(counts_B), values_M, "amin", include_self=False)
