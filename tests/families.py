"""Tiny models of many causal LM families, built from configs, their weights scaled until the logits
span +-50.
"""

import copy
from functools import cache
from typing import Any

import numpy as np
import torch

from s2l_ray.core.text.encoding import Encoded

VOCABULARY = 97
# of the families with sliding attention; rows are up to 40 tokens long
WINDOW = 8
SPAN = 50.0

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
SLIDING = ["sliding_attention", "full_attention"]
CAPPED = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 2.0, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Family -> what its config needs besides COMMON.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"use_parallel_residual": True, "rotary_pct": 0.25},
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4},
    "gptj": {
        "n_positions": 64,
        "n_embd": 32,
        "n_inner": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
    },
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "qwen2": {
        **GROUPED,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": SLIDING,
    },
    "qwen3": {**GROUPED, "head_dim": 8},
    "phi": GROUPED,
    "phi3": {**GROUPED, "sliding_window": WINDOW},
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {
        **GROUPED,
        **CAPPED,
        "head_dim": 8,
        "layer_types": SLIDING,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        **GROUPED,
        **CAPPED,
        "head_dim": 8,
        "layer_types": SLIDING,
        "query_pre_attn_scalar": 8,
    },
    "granite": {
        **GROUPED,
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.22,
    },
    "cohere": {**GROUPED, "logit_scale": 0.0625},
    "cohere2": {**GROUPED, "logit_scale": 0.0625, "sliding_window": WINDOW, "layer_types": SLIDING},
    "stablelm": GROUPED,
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0]},
    "olmo2": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": WINDOW},
    "nemotron": {**GROUPED, "head_dim": 8},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 32},
    "olmoe": {**GROUPED, **EXPERTS},
    "gpt_oss": {
        **GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": SLIDING,
    },
    "granitemoe": {
        **GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "logits_scaling": 8.0,
    },
}


@cache
def model(family: str, tied: bool = False) -> Any:
    """The family's model in fp32, with random weights; never change it, take a copy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **{**COMMON, **FAMILIES[family], "tie_word_embeddings": tied}
    )
    made = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            # which start at 0 and would hide their own loss
            elif "bias" in name:
                parameter.normal_(0, 0.5)
        head = made.get_output_embeddings().weight
        while span(made) < SPAN:
            head.mul_(1.001 * SPAN / span(made))
    return made


def rebuilt(family: str, attention: str | None = None, **fields: Any) -> Any:
    """The same weights in a model of its own, under another kind of attention or with other values
    of the config's fields.
    """
    from transformers import AutoModelForCausalLM

    made = model(family)
    config = copy.deepcopy(made.config)
    for name, value in fields.items():
        assert hasattr(config, name), f"{family} has no {name}"
        setattr(config, name, value)
    options = {} if attention is None else {"attn_implementation": attention}
    other = AutoModelForCausalLM.from_config(config, **options).float().eval()
    other.load_state_dict(made.state_dict())
    return other


@torch.inference_mode()
def span(made: Any) -> float:
    """How far the logits of the test rows reach to both sides: at the output layer where a soft cap
    comes after it.
    """
    emitted: list[torch.Tensor] = []
    hook = made.get_output_embeddings().register_forward_hook(
        lambda _, __, out: emitted.append(out)
    )
    final = [
        made(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits for row in examples(0)
    ]
    hook.remove()
    seen = emitted if getattr(made.config, "final_logit_softcapping", None) else final
    low, high = min(one.min().item() for one in seen), max(one.max().item() for one in seen)
    return min(-low, high)


def examples(seed: int, count: int = 12) -> list[Encoded]:
    """Rows of 2 to 40 tokens, with learned spans anywhere but at the first token."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(draw.integers(2, 41))
        learned = draw.random(length) < draw.random()
        learned[0] = False
        learned[draw.integers(1, length)] = True
        made.append(Encoded(number, draw.integers(0, VOCABULARY, length).astype(np.int32), learned))
    return made


def reference(made: Any, row: Encoded) -> float:
    """One row, no padding, transformers' own loss."""
    ids = torch.from_numpy(row.input_ids).long()[None]
    labels = ids.masked_fill(~torch.from_numpy(row.learned)[None], -100)
    with torch.inference_mode():
        return made(input_ids=ids, labels=labels).loss.item()
