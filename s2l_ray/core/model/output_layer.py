"""The output layer of a causal language model: what goes into it, and the logits that come of that.

Logits [B, L, V] are never made for all positions. Hooks on the layer keep the hidden states of some
positions, or put others in their place, while the family's own forward pass runs. So whatever a
family does to logits after the layer (soft caps, scales) takes place, and no family needs code of
own. Shapes: B examples, L padded length, M positions of the batch, C of one block, V vocabulary,
H hidden width. A position is where a token is predicted: one before the token itself.
"""

from typing import Any

import torch
from torch import nn

# Logits C x V of one block. About four fp32 copies of them are alive at once, 2 GiB together.
LOGITS_AT_ONCE = 2**27


def output_layer(model: nn.Module) -> Any:
    """The layer that makes logits, of a model or of an engine with the model in `.module`."""
    causal_lm: Any = getattr(model, "module", model)
    return causal_lm.get_output_embeddings()


def positions_at_once(layer: Any) -> int:
    """C, of a block of logits whose rows are whole."""
    return max(1, LOGITS_AT_ONCE // layer.weight.shape[0])


def predicting_positions(learned_BL: torch.Tensor) -> torch.Tensor:
    """Where learned tokens are predicted, as places in the flattened [B * L]: int64 [M]."""
    predicts_BL = torch.zeros_like(learned_BL)
    predicts_BL[:, :-1] = learned_BL[:, 1:]
    return predicts_BL.flatten().nonzero().squeeze(1)


def training_logits(
    model: nn.Module,
    input_ids_BL: torch.Tensor,
    where_M: torch.Tensor,
    position_ids_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final logits [M, V] at the given positions, with a graph to train by.

    Args:
        position_ids_BL: of packed examples; default: from 0 on in every row.
    """
    packed = {} if position_ids_BL is None else {"position_ids": position_ids_BL}

    def keep_positions(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (_flat(args[0]).index_select(0, where_M).unsqueeze(0), *args[1:])

    hook = output_layer(model).register_forward_pre_hook(keep_positions)
    try:
        outputs = model(input_ids=input_ids_BL, use_cache=False, **packed)
    finally:
        hook.remove()
    logits_MV: torch.Tensor = outputs.logits[0]
    return logits_MV


def hidden_states(
    model: nn.Module, input_ids_BL: torch.Tensor, where_M: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """The input of the output layer at the given positions, and whether its output is final.

    The layer itself runs on one position only. Its output is final where the family returns that
    very tensor, unchanged.

    Returns:
        Hidden states [M, H], and True where the layer's output are the final logits.
    """
    kept: list[torch.Tensor] = []
    emitted: list[tuple[torch.Tensor, int]] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        kept.append(_flat(args[0]).index_select(0, where_M))
        return (args[0][:1, :1], *args[1:])

    def watch(_: nn.Module, __: Any, logits_11V: torch.Tensor) -> None:
        emitted.append((logits_11V, logits_11V._version))

    layer = output_layer(model)
    hooks = [layer.register_forward_pre_hook(keep), layer.register_forward_hook(watch)]
    try:
        logits_11V = model(input_ids=input_ids_BL, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    at_layer_11V, version = emitted[0]
    return kept[0], logits_11V is at_layer_11V and logits_11V._version == version


def logits_of(
    model: nn.Module, hidden_CH: torch.Tensor, token_11: torch.Tensor, differentiable: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final logits of hidden states, and the output of the output layer itself.

    The family's own forward pass runs on one token, whose hidden state is exchanged on its way into
    the output layer.

    Args:
        token_11: any token, [1, 1].
        differentiable: the final logits have a graph that begins at the layer's output; the body of
            the model is not in it.

    Returns:
        Final logits [C, V], and the layer's output [1, C, V].
    """
    emitted: list[torch.Tensor] = []

    def exchange(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (hidden_CH.unsqueeze(0), *args[1:])

    def begin_graph(_: nn.Module, __: Any, logits_1CV: torch.Tensor) -> torch.Tensor:
        emitted.append(logits_1CV.detach().requires_grad_(differentiable))
        # From here on; the `no_grad` around the call ends it.
        torch.set_grad_enabled(differentiable)
        return emitted[0]

    layer = output_layer(model)
    hooks = [layer.register_forward_pre_hook(exchange), layer.register_forward_hook(begin_graph)]
    try:
        with torch.no_grad():
            logits_1CV = model(input_ids=token_11, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    with torch.set_grad_enabled(differentiable):
        return logits_1CV[0], emitted[0]


def _flat(hidden_BLH: torch.Tensor) -> torch.Tensor:
    return hidden_BLH.reshape(-1, hidden_BLH.shape[-1])
