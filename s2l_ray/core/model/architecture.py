"""Causal language models by their config: reading it, building them, counting their parameters."""

import copy
import dataclasses
import re
from typing import Any

from s2l_ray.config import Model, expressions
from s2l_ray.core.model.places import at_hand, pretrained
from s2l_ray.errors import UserError

# Fields that transformers reads though its config classes do not list them.
OTHER_FIELDS = {
    "model_type", "torch_dtype", "attn_implementation", "_attn_implementation", "_name_or_path",
    "rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor",
    "is_decoder", "output_attentions", "use_mems",
}  # fmt: skip
# Parameters of a model that is tried on the CPU before any work.
SMALL = 200_000_000
# Names of tensors that hold a row for every position.
POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)(\.weight)?$")
# The deepest models that are public have fewer than two hundred.
MOST_LAYERS = 2_000


def load_config(model: Model) -> Any:
    """The transformers config of a model; the text part where it is of text and images.

    Raises:
        UserError: it cannot be found, is not one that transformers knows, or has an encoder.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if model.config is not None:
            config = AutoConfig.for_model(**model.config)
        else:
            name, options = pretrained(model)
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except RecursionError:
        raise UserError(
            f"reading the config of {name_of(model)}: it is nested deeper than any config. Correct "
            "the section's model."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        # What a strict config refuses stands in the cause.
        why = str(error.__cause__ or error).rstrip(".")
        raise UserError(
            f"reading the config of {name_of(model)}: {why}. Correct the section's model."
        ) from None
    if config.is_encoder_decoder:
        raise UserError(
            f"reading the config of {name_of(model)}: {config.model_type} is an encoder-decoder, "
            "and a causal language model (a decoder alone) was expected. Choose another model."
        )
    _refuse_giants(config, name_of(model))
    return config.get_text_config(decoder=True)


def name_of(model: Model) -> str:
    """What to call a model in a message."""
    return model.path or model.hub or f"model.config of type {(model.config or {})['model_type']}"


def _refuse_giants(config: Any, what: str) -> None:
    """Refuse a config of more layers than can be built in bounded time and memory."""
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            _refuse_giants(value, what)
        elif "layers" in name and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(
                f"reading the config of {what}: expected at most {MOST_LAYERS:,} layers, got "
                f"{name} = {value:,}. Correct the section's model."
            )


def build(
    config: Any, dtype: str = "fp32", attention: str | None = None, dropout: bool = True
) -> Any:
    """A causal LM of that config with weights drawn from torch's current generator.

    Args:
        attention: one of transformers' implementations, such as eager or sdpa; default: the one
            that it chooses itself.
        dropout: with False, all that the config says of dropout is 0.

    Raises:
        UserError: the family or this machine has no such implementation of attention.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if not dropout:
        _without_dropout(config)
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, **options
        )
    except (ImportError, ValueError) as error:
        if attention is None:
            raise
        raise UserError(
            f"building a {config.model_type} with attention: {attention}: {error} Install what is "
            "missing on every machine, or leave out `attention`, for the implementation that "
            "transformers chooses."
        ) from None


def _without_dropout(config: Any) -> None:
    """Set to 0 what a config and those inside it draw by at training: dropout, drop path, jitter.

    Families name it as they like: dropout, attn_pdrop, layerdrop, router_jitter_noise.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            _without_dropout(value)
        elif type(value) in (int, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, type(value)(0))


def check_architecture(model: Model) -> None:
    """Build a model without weights and refuse what cannot be computed.

    One of at most SMALL parameters is also made with random weights and tried on a few tokens.

    Raises:
        UserError: naming the field of the config and what to do.
    """
    import torch

    from s2l_ray.core.model.lookahead import check_causal

    what, config = name_of(model), load_config(model)
    _check_fields(model, config)
    doing = f"building the model of {what}"
    try:
        with torch.device("meta"):
            built = build(config)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        value = error.args[0] if error.args else None
        at_fault = [name for name, own in vars(config).items() if own == value]
        if isinstance(error, KeyError) and at_fault:
            raise UserError(
                f"{doing}: {at_fault[0]} = {value!r} is not known to transformers. Correct it."
            ) from None
        raise UserError(
            f"{doing}: its fields do not fit together ({type(error).__name__}: {error}). Correct "
            "the config."
        ) from None
    if sum(tensor.numel() for tensor in built.parameters()) <= SMALL:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                check_causal(build(config).eval(), "cpu", what)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise UserError(
                    f"trying the model of {what} on 16 tokens: {type(error).__name__}: {error}. "
                    "Correct the config, such as its numbers of heads and its sizes."
                ) from None


def _check_fields(model: Model, config: Any) -> None:
    """Refuse fields that the family does not have, and sizes that make no model."""
    given = model.config or {}
    known = {field.name for field in dataclasses.fields(config)} | OTHER_FIELDS
    known |= set(type(config).attribute_map)
    if config.model_type == given.get("model_type"):
        for name in given:
            if name not in known:
                words = expressions.unknown("field", name, sorted(known - OTHER_FIELDS))
                raise UserError(f"reading model.config of type {config.model_type}: {words}.")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise UserError(
                f"reading the config of {name_of(model)}: expected {name} of at least 1, got "
                f"{value}. Correct it."
            )
    heads, groups = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        raise UserError(
            f"reading the config of {name_of(model)}: expected num_attention_heads to be a "
            f"multiple of num_key_value_heads, got {heads} and {groups}. Correct one of them."
        )


def most_positions(built: Any) -> int | None:
    """How many tokens fit into a model's table of positions; None where it has no table."""
    tensors = [*built.named_parameters(), *built.named_buffers()]
    has_table = any(tensor.ndim == 2 and POSITION_TABLE.search(name) for name, tensor in tensors)
    return getattr(built.config, "max_position_embeddings", None) if has_table else None


def check_positions(model: Model, tokens: int, field: str) -> None:
    """Refuse texts that are longer than a model's table of positions.

    Args:
        tokens: of the longest text.
        field: what of the config says so.

    Raises:
        UserError: the table is shorter.
    """
    import torch

    with torch.device("meta"):
        most = most_positions(build(load_config(model)))
    if most is not None and tokens > most:
        raise UserError(
            f"planning with {name_of(model)}: {field} = {tokens} tokens, but its table of "
            f"positions has {most}. Lower {field}, or choose a model for longer texts."
        )


def parameters(model: Model) -> int | None:
    """Number of parameters without making any.

    None where neither the config nor `model.parameters` is at hand.
    """
    import torch

    if model.parameters is not None:
        return model.parameters
    if not at_hand(model):
        return None
    with torch.device("meta"):
        built = build(load_config(model))
    return sum(tensor.numel() for tensor in built.parameters())


def output_shape(model: Model) -> tuple[int, int]:
    """V and H of the output layer; zeros where the config is not at hand."""
    if not at_hand(model):
        return 0, 0
    config = load_config(model)
    return config.vocab_size, config.hidden_size
