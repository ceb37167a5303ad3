"""Cross-entropy of the learned tokens of a batch, in fp32, with logits made only where they are.

Shapes: B examples, L padded length, M learned tokens of the batch, C of one block, V vocabulary, W
tokens of the vocabulary in one block, H hidden width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from s2l_ray.core.model.output_layer import (
    LOGITS_AT_ONCE,
    hidden_states,
    logits_of,
    output_layer,
    positions_at_once,
    predicting_positions,
    training_logits,
)

# (C, C x W) of a block of logits of which only the loss is needed. On a CPU fp32 logits stay in a
# core's own cache; on other devices a block is large enough to fill them.
CPU_BLOCK, DEVICE_BLOCK = (2**10, 2**19), (2**14, 2**26)


def token_losses(
    model: nn.Module,
    input_ids_BL: torch.Tensor,
    learned_BL: torch.Tensor,
    position_ids_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of every learned token, float32 [M], with a graph to train by.

    Args:
        model: a transformers causal LM, or an engine that wraps one in `.module` and forwards calls
            to it.
        input_ids_BL: int64, right-padded. Padding needs no mask: under causal attention no learned
            token attends to it.
        learned_BL: bool; True where the token is predicted from the tokens before it. Column 0 is
            never learned.
        position_ids_BL: int64; of examples that are packed, where each begins at position 0.

    Returns:
        Losses in row-major order of `learned_BL`.
    """
    where_M, targets_M = predicting_positions(learned_BL), input_ids_BL[learned_BL]
    logits_MV = training_logits(model, input_ids_BL, where_M, position_ids_BL)
    at_once = max(1, LOGITS_AT_ONCE // logits_MV.shape[1])
    if len(targets_M) <= at_once:
        return _cross_entropy(logits_MV, targets_M)
    # In fp32 they are four times as many bytes as in bf16, three times over: so for some at a time,
    # and in the backward pass again.
    pieces = zip(logits_MV.split(at_once), targets_M.split(at_once), strict=True)
    losses = [checkpoint(_cross_entropy, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(losses)


def _cross_entropy(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_CV.float(), targets_C, reduction="none")


def token_losses_in_blocks(
    model: nn.Module, input_ids_BL: torch.Tensor, learned_BL: torch.Tensor
) -> torch.Tensor:
    """The numbers of `token_losses` without a graph, and without all logits at once."""
    layer, targets_M = output_layer(model), input_ids_BL[learned_BL]
    hidden_MH, final = hidden_states(model, input_ids_BL, predicting_positions(learned_BL))
    if final and type(layer) is nn.Linear:
        losses_M = _linear_losses(layer, hidden_MH, targets_M)
    else:
        losses_M = torch.full((len(targets_M),), torch.nan, device=targets_M.device)
    left = (~losses_M.isfinite()).nonzero().squeeze(1)
    at_once = positions_at_once(layer)
    for first in range(0, len(left), at_once):
        block = left[first : first + at_once]
        logits_CV, _ = logits_of(
            model, hidden_MH[block], input_ids_BL[:1, :1], differentiable=False
        )
        losses_M[block] = F.cross_entropy(logits_CV.float(), targets_M[block], reduction="none")
    return losses_M


def _linear_losses(
    layer: nn.Linear, hidden_MH: torch.Tensor, targets_M: torch.Tensor
) -> torch.Tensor:
    """Loss [M] under the logits of a linear layer, summed block by block while they are in a cache.

    Writing all logits, converting them to fp32 and reading them three times for the softmax costs
    as much as making them. Not finite where logits lie too far apart: see `_block_losses`.
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
    """Loss [C] of some positions, `width` tokens of the vocabulary at a time.

    With m the highest logit of the first `width` tokens and s the sum of exp(logit - m) over all,
    the loss of a target with logit y is (m - y) + log s. Finding the highest logit of all would
    take a further pass over every block. So s, at least 1, overflows where a logit is about 88
    above m.
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
