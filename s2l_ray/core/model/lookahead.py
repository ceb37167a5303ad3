"""Whether a model predicts a token from the tokens before it alone, in its own row alone."""

from typing import Any

import torch

from s2l_ray.core.model.output_layer import output_layer
from s2l_ray.errors import UserError

# Tokens of the trial; those of its second half are exchanged.
LENGTH = 16
# Largest move of earlier logits, as a share of the largest move of later ones. In fp32 rounding
# moved them by 2e-7 at most, and small random models that look ahead by 1e-3. bf16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}

# Largest difference between logits of a row alone and packed, as a share of the largest logit.
PACKING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}


def check_causal(model: Any, device: Any, what: str) -> None:
    """Refuse a model whose earlier logits move when later tokens are exchanged.

    Args:
        model: a causal LM, or an engine that wraps one; all workers of an engine call it together.
        what: what to call the model in the message.

    Raises:
        UserError: it looks ahead, so its losses are not those of predicting the next token.
    """
    weight = output_layer(model).weight
    draw = torch.Generator().manual_seed(0)
    vocabulary = getattr(weight, "ds_shape", weight.shape)[0]
    one, other = torch.randint(0, vocabulary, (2, 1, LENGTH), generator=draw).to(device)
    half = LENGTH // 2
    other[:, :half] = one[:, :half]
    logits = []
    with torch.no_grad():
        for ids_1L in (one, other):
            # The same dropout both times, where there is any.
            torch.manual_seed(0)
            logits.append(model(input_ids=ids_1L, use_cache=False).logits[0].float())
    moved_L = (logits[0] - logits[1]).abs().amax(1)
    before, after = moved_L[:half].max().item(), moved_L[half:].max().item()
    if before > TOLERANCE.get(weight.dtype, TOLERANCE[torch.bfloat16]) * after:
        raise UserError(
            f"trying {what}: other tokens in the second half of a text moved the logits of the "
            f"first half by {before:.2g} (of {after:.2g} in the second), where a causal language "
            "model moves none. It looks ahead at what it is to predict, so its losses mean "
            "nothing. Choose a causal model, or set is_decoder: true in the config of a family "
            "such as bert."
        )


def check_packing(model: Any, device: Any, what: str) -> None:
    """Refuse a model that sees a row before another when both are packed.

    Args:
        model: a causal LM, or an engine that wraps one; all workers of an engine call it together.
        what: what to call the model in the message.

    Raises:
        UserError: its family has no positions by which it could tell rows apart.
    """
    weight = output_layer(model).weight
    draw = torch.Generator().manual_seed(0)
    vocabulary = getattr(weight, "ds_shape", weight.shape)[0]
    ids_1L = torch.randint(0, vocabulary, (1, LENGTH), generator=draw).to(device)
    half = LENGTH // 2
    restarting = torch.arange(half, device=device).repeat(2)[None]
    with torch.no_grad():
        alone = model(input_ids=ids_1L[:, half:], use_cache=False).logits[0].float()
        try:
            both = model(input_ids=ids_1L, position_ids=restarting, use_cache=False).logits[0]
        except TypeError:
            moved, scale = float("inf"), 0.0
        else:
            moved = (both[half:].float() - alone).abs().max().item()
            scale = alone.abs().max().item()
    if moved > PACKING_TOLERANCE.get(weight.dtype, PACKING_TOLERANCE[torch.bfloat16]) * scale:
        raise UserError(
            f"trying {what}: a row behind another one has other logits (by {moved:.2g} of "
            f"{scale:.2g}) than alone, so the rows of a pack would see each other. Set packing of "
            "this stage's scaling to false."
        )
