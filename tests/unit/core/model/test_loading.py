"""Models and tokenizers from saved folders: identity, reading of weights, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from s2l_ray.config import Model, Training
from s2l_ray.core.model import architecture, loading, places
from s2l_ray.core.text.byte_tokenizer import byte_tokenizer
from s2l_ray.errors import UserError
from tests.tiny import LLAMA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with the weights in several shards, and a tokenizer."""
    torch.manual_seed(1)
    raw = dict(LLAMA)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw.pop("model_type"), **raw))
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def training(folder: Path) -> Training:
    return Training(model=Model(path=str(folder)), epochs=1, prompt="plain")


def test_every_tensor_of_a_folder_is_read(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    read = loading.tensor_reader(Model(path=str(folder)))
    assert read is not None
    for name, tensor in saved.items():
        torch.testing.assert_close(read(name), tensor, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"no tensor 'model\.missing'"):
        read("model.missing")


def test_a_model_filled_from_a_folder_equals_the_saved_one(folder: Path) -> None:
    built = architecture.build(architecture.load_config(Model(path=str(folder))))
    weights = loading.read_weights(
        lambda name: (folder / name).read_bytes(), [p.name for p in folder.iterdir()], "it"
    )
    loading.load_weights(built, weights, "it")
    saved = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(built(ids).logits, saved(ids).logits, rtol=0, atol=0)


def test_the_tokenizer_comes_with_the_model(folder: Path) -> None:
    encoder = loading.load_encoder(training(folder))
    assert encoder.tokenizer("ab")["input_ids"] == [97, 98]


def test_identity_follows_content_and_not_place(folder: Path, tmp_path: Path) -> None:
    before = places.identity(Model(path=str(folder)), None)
    moved = folder.rename(tmp_path / "elsewhere")
    assert places.identity(Model(path=str(moved)), None) == before
    (moved / "README.md").write_text("prose")
    assert places.identity(Model(path=str(moved)), None) == before
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert places.identity(Model(path=str(moved)), None) != before


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"no config\.json"):
        places.identity(Model(path=str(tmp_path)), None)


def test_a_missing_shard_is_named(folder: Path) -> None:
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        loading.tensor_reader(Model(path=str(folder)))


def test_the_weights_of_a_whole_folder_pass_the_check(folder: Path) -> None:
    loading.check_weights(Model(path=str(folder)))


def damage_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))
    return r"expected with shape \(.*65.*\) and came with \(.*64.*\)"


def damage_depth(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    return r"model\.layers\.2\..* is not there"


def damage_header(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * 100)
    return f"{file.name}: .*restore it"


def damage_length(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-7])
    return f"{file.name}: .*restore it"


@pytest.mark.parametrize("damage", [damage_shape, damage_depth, damage_header, damage_length])
def test_weights_that_do_not_fit_their_config_are_refused_from_the_headers(
    folder: Path, damage: Callable[[Path], str]
) -> None:
    said = damage(folder)
    with pytest.raises(UserError, match=said):
        loading.check_weights(Model(path=str(folder)))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="Only safetensors are"):
        loading.tensor_reader(Model(path=str(tmp_path)))


def test_a_vocabulary_larger_than_the_model_is_refused(folder: Path) -> None:
    section = Training(
        model=Model(config={**LLAMA, "vocab_size": 200}), tokenizer="bytes", epochs=1
    )
    with pytest.raises(UserError, match="258 tokens, but the model only 200"):
        loading.load_encoder(section)


def test_a_given_template_is_read_and_one_that_is_not_text_is_named(
    folder: Path, tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    section = {
        "model": Model(path=str(folder)),
        "epochs": 1,
        "prompt": "chat",
        "learn": "last",
        "truncation": "left",
    }
    with pytest.raises(UserError, match="no chat template"):
        loading.load_encoder(Training(**section))
    for content, said in ((None, "mine.jinja: "), (b"\xff", "mine.jinja: .*utf-8")):
        if content is not None:
            template.write_bytes(content)
        with pytest.raises(UserError, match=said + ".*correct `template`"):
            loading.load_encoder(Training(**section, template=str(template)))
    template.write_text("{{ messages[0].content }}é", encoding="utf-8")
    encoder = loading.load_encoder(Training(**section, template=str(template)))
    assert (encoder.renderer.learn, encoder.truncation) == ("last", "left")
    assert (
        loading.template_text(Training(**section, template=str(template)))
        == "{{ messages[0].content }}é"
    )


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    wider = architecture.build(
        architecture.load_config(Model(config={**LLAMA, "num_hidden_layers": 3}))
    )
    weights = loading.read_weights(
        lambda name: (folder / name).read_bytes(), [p.name for p in folder.iterdir()], "it"
    )
    with pytest.raises(UserError, match="tensors are missing"):
        loading.load_weights(wider, weights, "it")


@pytest.mark.parametrize(
    "model", [{"path": "/nowhere"}, {"config": {"model_type": "no_such_family"}}]
)
def test_a_model_that_is_not_there_is_named(model: dict) -> None:
    with pytest.raises(UserError, match=r"nowhere|no_such_family"):
        architecture.load_config(Model(**model))


def test_parameters_are_counted_without_making_them() -> None:
    built = architecture.build(architecture.load_config(Model(config=LLAMA)))
    assert architecture.parameters(Model(config=LLAMA)) == sum(
        p.numel() for p in built.parameters()
    )
    assert architecture.parameters(Model(hub="org/name", parameters=7)) == 7
    assert architecture.parameters(Model(hub="org/name")) is None


def test_a_config_that_no_model_has_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 2,000 layers, got num_hidden_layers = 100,000"):
        architecture.parameters(Model(config={**LLAMA, "num_hidden_layers": 100_000}))
    (tmp_path / "config.json").write_text('{"a": ' * 200_000 + "1" + "}" * 200_000)
    with pytest.raises(UserError, match="nested deeper than any config"):
        architecture.load_config(Model(path=str(tmp_path)))
