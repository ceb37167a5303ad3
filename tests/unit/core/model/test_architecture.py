"""Models that are refused before any work, and what is known of a config without weights."""

import copy
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from s2l_ray.config import Model
from s2l_ray.core.model import decoding
from s2l_ray.core.model.architecture import (
    build,
    check_architecture,
    check_positions,
    load_config,
    most_positions,
)
from s2l_ray.core.model.decoding import decode, heeds_padding
from s2l_ray.core.model.loading import text_name
from s2l_ray.core.model.lookahead import check_causal
from s2l_ray.errors import UserError
from tests import families, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
XLNET = {"model_type": "xlnet", "vocab_size": 97, "d_model": 32, "n_layer": 2, "n_head": 4}
XLNET |= {"d_inner": 64}


@pytest.mark.parametrize(
    "config",
    [{"model_type": "bert", **SIZES}, {"model_type": "roberta", **SIZES}, XLNET],
    ids=lambda config: config["model_type"],
)
def test_a_model_that_looks_ahead_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"trying model\.config of type .* It looks ahead"):
        check_architecture(Model(config=config))


@pytest.mark.parametrize("family", [*families.FAMILIES, "bert", "rwkv"])
def test_no_causal_family_is_taken_to_look_ahead(family: str) -> None:
    if family in families.FAMILIES:
        made = copy.deepcopy(families.model(family))
    else:
        own = {"bert": {**SIZES, "is_decoder": True}, "rwkv": RWKV}[family]
        made = build(load_config(Model(config={"model_type": family, **own}))).eval()
    check_causal(made, "cpu", family)
    if family not in ("bert", "rwkv"):
        check_causal(made.bfloat16(), "cpu", family)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden_sise": 32}, "no field 'hidden_sise'. Did you mean hidden_size?"),
        ({"n_layer": 2}, "there is no field 'n_layer'"),
        ({"hidden_act": "swishh"}, "hidden_act = 'swishh' is not known to transformers"),
        ({"num_hidden_layers": 0}, "expected num_hidden_layers of at least 1, got 0"),
        ({"num_hidden_layers": -1}, "expected num_hidden_layers of at least 1, got -1"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads to be a multiple of num_key_value_heads, got 4 and 3",
        ),
        ({"hidden_size": "many"}, "expected int, got str"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_with_the_field(
    changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as told:
        check_architecture(Model(config={**tiny.LLAMA, **changed}))
    assert words in str(told.value)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT_NEOX])
def test_a_config_that_makes_a_model_is_taken(config: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    check_architecture(Model(config=config))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=f"{family} is an encoder-decoder"):
        load_config(Model(config={"model_type": family}))


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("gemma3", "gemma3_text"),
        ("gemma4", "gemma4_text"),
        ("qwen3_5", "qwen3_5_text"),
        ("mistral3", "mistral"),
    ],
)
def test_of_a_model_of_text_and_images_the_text_part_is_taken(family: str, text: str) -> None:
    assert load_config(Model(config={"model_type": family})).model_type == text
    assert text_name("model.language_model.layers.0.mlp.up_proj.weight") == (
        "model.layers.0.mlp.up_proj.weight"
    )
    assert text_name("language_model.model.norm.weight") == "model.norm.weight"
    assert text_name("language_model.lm_head.weight") == "lm_head.weight"
    assert text_name("model.norm.weight") == "model.norm.weight"


@pytest.mark.parametrize(
    ("family", "fields", "most"),
    [
        ("gpt2", {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}, 64),
        ("opt", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}, 64),
        ("gptj", {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}, 64),
        ("llama", SIZES, None),
    ],
)
def test_texts_beyond_a_table_of_positions_are_refused(
    family: str, fields: dict[str, Any], most: int | None
) -> None:
    fields = {name: value for name, value in fields.items() if name != "intermediate_size"}
    model = Model(config={"model_type": family, **fields})
    made = build(load_config(model)).eval()
    assert most_positions(made) == most
    check_positions(model, 64, "proxy.max_length")
    if most is None:
        check_positions(model, 65, "proxy.max_length")
        return
    made(input_ids=torch.ones(1, most, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        made(input_ids=torch.ones(1, most + 1, dtype=torch.long))
    with pytest.raises(UserError, match=r"proxy\.max_length = 65 tokens, but .* has 64\. Lower"):
        check_positions(model, 65, "proxy.max_length")


RWKV = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}


def test_padding_that_a_family_ignores_is_noticed() -> None:
    ignoring = build(load_config(Model(config={"model_type": "rwkv", **RWKV}))).eval()
    assert not heeds_padding(ignoring, 0, "cpu")
    for family in ("llama", "gpt2", "bloom"):
        assert heeds_padding(families.model(family), 0, "cpu")


class _Tokens:
    """As much of an encoder as decoding uses: given prompts, and answers as numbers of tokens."""

    pad, stops = 0, [96]

    def __init__(self, prompts: list[list[int]]) -> None:
        self.made, self.tokenizer = prompts, self

    def prompts(self, rows: Any, asking: str = "") -> list[list[int]]:
        return [self.made[row] for row in rows["example_id"].to_pylist()]

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


@pytest.mark.parametrize("family", ["rwkv", "llama"])
def test_answers_do_not_depend_on_the_prompts_beside_them(family: str) -> None:
    torch.manual_seed(1)
    own = RWKV if family == "rwkv" else SIZES
    made = build(load_config(Model(config={"model_type": family, **own}))).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5, 4, 3, 2, 1], [5], [4, 4, 4]]
    rows = pa.table({"example_id": range(4)})
    together = decode(made, _Tokens(prompts), rows, 4, 1000, "cpu")  # type: ignore[arg-type]
    for number, prompt in enumerate(prompts):
        one: Any = _Tokens([prompt])
        alone = decode(made, one, rows.slice(0, 1), 4, 1000, "cpu")
        assert [together[number]] == alone


def test_a_prompt_that_leaves_no_place_for_the_answer_names_the_row() -> None:
    encoder: Any = _Tokens([[1] * 10, [1] * 61])
    rows = pa.table({"example_id": [0, 1]})
    with pytest.raises(UserError, match=r"example_id 1: its prompt of 61 tokens .* 64 positions"):
        decode(families.model("gpt2"), encoder, rows, 4, 1000, "cpu")


class _SmallGpu:
    """A model that answers with the first token, of at most so many prompts at once."""

    def __init__(self, most: int) -> None:
        self.most, self.batches = most, list[int]()

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(100, 1))

    def generate(self, input_ids: torch.Tensor, **options: Any) -> Any:
        if options.get("output_logits"):
            return SimpleNamespace(logits=[torch.arange(100.0)[None]])
        self.batches.append(len(input_ids))
        if len(input_ids) > self.most:
            raise torch.cuda.OutOfMemoryError("no memory")
        new = input_ids[:, -1:].expand(-1, options["max_new_tokens"])
        return torch.cat([input_ids, new], 1)


def test_batches_are_halved_where_the_gpu_does_not_hold_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "most_positions", lambda _: None)
    prompts = [[1, 1, number] for number in (96, 2, 3, 4, 5, 6, 7, 8)]
    encoder: Any = _Tokens(prompts)
    rows = pa.table({"example_id": range(8)})
    model = _SmallGpu(most=2)
    answers = decode(model, encoder, rows, 2, 40, "cpu")
    assert model.batches == [8, 4, 2, 2, 2, 2]
    assert [made.text for made in answers] == ["", *(f"{n} {n}" for n in (2, 3, 4, 5, 6, 7, 8))]
    # The first one ends by itself.
    assert [made.cut for made in answers] == [False, *[True] * 7]
    with pytest.raises(UserError, match=r"example_id 0: its 5 tokens .* GPU's memory"):
        decode(_SmallGpu(most=0), encoder, rows, 2, 40, "cpu")
