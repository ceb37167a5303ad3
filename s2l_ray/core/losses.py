"""Per-token and per-example losses of a causal language model, with logits made only where a token is learned.

The loss of an example is the mean cross-entropy over its learned tokens, in fp32 (paper section 1; design, invariant 8).
Shapes: B examples, L padded length, M learned positions of the batch, V vocabulary, H hidden width.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def token_losses(model: nn.Module, input_ids_BL: torch.Tensor, learned_BL: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every learned token, float32 [M], in row-major order of `learned_BL`.

    Args:
        model: a transformers causal LM, or an engine that wraps one in `.module` and forwards calls to it.
        input_ids_BL: int64, right-padded. Padding needs no mask: under causal attention nothing that counts sees it.
        learned_BL: bool; True where the token is predicted from the tokens before it. Column 0 is never learned.

    The hidden states are cut down to the M positions on their way into the output layer, so that whatever a family does after
    it (soft caps, logit scales) still runs, and logits are [M, V] in place of [B, L, V].
    """
    causal_lm: Any = getattr(model, "module", model)
    predicts_BL = torch.zeros_like(learned_BL)
    predicts_BL[:, :-1] = learned_BL[:, 1:]
    where = predicts_BL.flatten().nonzero().squeeze(1)

    def keep_predicting(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BLH = args[0]
        return (hidden_BLH.reshape(-1, hidden_BLH.shape[-1]).index_select(0, where).unsqueeze(0), *args[1:])

    hook = causal_lm.get_output_embeddings().register_forward_pre_hook(keep_predicting)
    try:
        logits_MV = model(input_ids=input_ids_BL, use_cache=False).logits[0]
    finally:
        hook.remove()
    return F.cross_entropy(logits_MV.float(), input_ids_BL[learned_BL], reduction="none")


@torch.inference_mode()
def example_losses(model: nn.Module, input_ids_BL: torch.Tensor, learned_BL: torch.Tensor) -> torch.Tensor:
    """Mean loss over the learned tokens of each example, float32 [B]; NaN for an example without any."""
    losses_M = token_losses(model, input_ids_BL, learned_BL).double()
    counts_B = learned_BL.sum(1)
    owner_M = torch.repeat_interleave(torch.arange(len(counts_B), device=counts_B.device), counts_B)
    sums_B = torch.zeros(len(counts_B), dtype=torch.float64, device=counts_B.device).index_add_(
        0, owner_M, losses_M
    )
    return (sums_B / counts_B).float()
