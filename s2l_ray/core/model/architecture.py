"""Causal language models by their config: reading it, building them, counting their parameters."""

import copy
from typing import Any

from s2l_ray.config import Model
from s2l_ray.core.model.places import pretrained
from s2l_ray.errors import UserError


def load_config(model: Model) -> Any:
    """The transformers config of a model.

    Raises:
        UserError: it cannot be found or is not one that transformers knows.
    """
    from transformers import AutoConfig

    try:
        if model.config is not None:
            return AutoConfig.for_model(**model.config)
        name, options = pretrained(model)
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = model.path or model.hub or f"model.config {model.config}"
        raise UserError(
            f"reading the config of {what}: {error}. Correct the section's model."
        ) from None


def build(
    config: Any, dtype: str = "fp32", attention: str | None = None, dropout: bool = True
) -> Any:
    """A causal LM of that config with weights drawn from torch's current generator.

    Args:
        attention: one of transformers' implementations, such as eager or sdpa; default: the one
            that it chooses itself.
        dropout: with False, all that the config says of dropout is 0.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if not dropout:
        _without_dropout(config)
    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, **options
    )


def _without_dropout(config: Any) -> None:
    """Set to 0 what a config and those inside it draw by at training: dropout, drop path, jitter.

    Families name it as they like: dropout, attn_pdrop, layerdrop, router_jitter_noise.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            _without_dropout(value)
        elif type(value) in (int, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, type(value)(0))


def parameters(model: Model) -> int | None:
    """Number of parameters without making any.

    None where neither the config nor `model.parameters` is at hand.
    """
    import torch

    if model.parameters is not None:
        return model.parameters
    if model.hub is not None:
        return None
    with torch.device("meta"):
        built = build(load_config(model))
    return sum(tensor.numel() for tensor in built.parameters())


def output_shape(model: Model) -> tuple[int, int]:
    """V and H of the output layer; zeros for Hub names, whose config is not at hand."""
    if model.hub is not None:
        return 0, 0
    config = load_config(model)
    return config.vocab_size, config.hidden_size
