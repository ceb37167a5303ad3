"""A subset as the stage writes it, read by the libraries it is written for."""

import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import yaml

from s2l_ray.config import Config
from s2l_ray.contract.work import Work
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.schemas import MESSAGES
from s2l_ray.core.storage.store import Store
from s2l_ray.core.text.byte_tokenizer import byte_tokenizer
from s2l_ray.edge import reduction
from s2l_ray.errors import UserError
from s2l_ray.stages.subset import make as subset
from s2l_ray.stages.subset import search
from tests import synthetic
from tests.committed import commit

ROWS, STEPS, BUDGET = 700, 4, 231
CALL = [{"function": {"arguments": {"city": "Graz"}, "name": "weather"}, "type": "function"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def turn(role: str, content: str, input: str | None = None, **extra: Any) -> dict[str, Any]:
    text = json.dumps(extra, sort_keys=True, separators=(",", ":")) if extra else None
    return {"role": role, "content": content, "input": input, "extra": text, "masked": False}


def conversation(number: int) -> list[dict[str, Any]]:
    kinds = [
        [turn("user", f"Ü{number}", "more ✓"), turn("assistant", "yes\n")],
        [
            turn("system", "be kind"),
            turn("user", "a"),
            turn("assistant", "b"),
            turn("user", "c"),
            turn("assistant", "d"),
        ],
        [
            turn("user", "hot?"),
            turn("assistant", "", tool_calls=CALL),
            turn("tool", "31", name="weather"),
            turn("assistant", "Yes."),
        ],
        [turn("user", "plain", ""), turn("assistant", "text")],
    ]
    return kinds[number % 4]


def conversations(stage: str, table: pa.Table) -> pa.Table:
    if stage != "examples":
        return table
    ids = table["example_id"].to_pylist()
    tools = [json.dumps(TOOLS) if number % 4 == 2 else None for number in ids]
    table = table.set_column(
        2, "messages", pa.array([conversation(number) for number in ids], MESSAGES)
    )
    return table.set_column(3, "tools", pa.array(tools, pa.string()))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    folder = str(tmp_path_factory.mktemp("exports"))
    synthetic.build(folder, ROWS, 128, STEPS, ["x", "y / z"], clusters=6, change=conversations)
    return folder


def choose(storage: str, name: str, **fields: Any) -> Manifest:
    config = Config.model_validate(
        {
            "run": {"storage": storage},
            "examples": {"files": ["none"]},
            "proxy": {
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": "bytes",
                "epochs": 1,
            },
            "trajectories": {"statistics": synthetic.STATISTICS},
            "subset": {"budget": BUDGET, "rows_per_file": 100, "seed": 1, **fields},
        }
    )
    inputs = {
        stage: Artifact(Store(storage), stage, synthetic.NAME)
        for stage in ("examples", "trajectories", "clusters")
    }
    manifests = {stage: artifact.manifest() for stage, artifact in inputs.items()}
    artifact = Artifact(Store(storage), "subset", name)
    return commit(artifact, subset.make(Work(config, artifact, inputs, manifests, "run")))


@pytest.fixture(scope="module")
def medoid(storage: str) -> Manifest:
    return choose(storage, "medoid", rule="medoid")


@pytest.fixture(scope="module")
def folder(storage: str, medoid: Manifest) -> Path:
    return Path(storage) / "subset" / "medoid"


def read(storage: str, manifest: Manifest, role: str) -> pa.Table:
    artifact = Artifact(Store(storage), "subset", manifest.fingerprint)
    return pa.concat_tables([artifact.read_part(part, role=role) for part in manifest.parts])


# ---------------------------------------------------------------------------------- what is written


def test_all_roles_hold_the_same_rows(storage: str, medoid: Manifest, folder: Path) -> None:
    data = read(storage, medoid, "data")
    ids = data["example_id"].to_pylist()
    assert len(ids) == len(set(ids)) == BUDGET
    assert ids == sorted(ids)
    assert data.column_names == [
        "example_id",
        "source",
        "cluster",
        "score",
        "instruction",
        "output",
        "grade",
    ]
    assert data["grade"].to_pylist() == [float(number) for number in ids]
    assert data["score"].null_count == 0
    messages = read(storage, medoid, "messages")
    assert messages["example_id"].to_pylist() == ids
    expected = [conversation(number) for number in ids]
    assert messages["messages"].to_pylist() == expected
    index = read(storage, medoid, "index")
    assert index.column_names == ["example_id", "file", "row", "source", "cluster"]
    assert set(index["file"].to_pylist()) == {"rows.jsonl"}
    assert index["row"].to_pylist() == ids
    assert index["cluster"] == data["cluster"]
    lines = [
        line
        for path in sorted(folder.glob("jsonl/*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [json.loads(line) for line in lines] == data.to_pylist()


def test_chat_lines_hold_what_trainers_read(folder: Path, medoid: Manifest) -> None:
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("chat/*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == BUDGET
    kinds = {row["example_id"] % 4: row for row in rows}
    assert kinds[0]["messages"] == [
        {"role": "user", "content": f"Ü{kinds[0]['example_id']}\nmore ✓"},
        {"role": "assistant", "content": "yes\n"},
    ]
    assert kinds[2]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": CALL}
    assert kinds[2]["messages"][2] == {"role": "tool", "content": "31", "name": "weather"}
    assert json.loads(kinds[2]["tools"]) == TOOLS
    assert kinds[3]["messages"][0] == {"role": "user", "content": "plain"}
    assert all("tools" not in kinds[kind] for kind in (0, 1, 3))


def test_what_the_report_and_people_read_adds_up(storage: str, medoid: Manifest) -> None:
    info = medoid.info
    assert info["quotas"] == info["clusters"]
    assert sum(info["quotas"]) == info["budget"] == BUDGET
    assert (
        info["sizes"]
        == Artifact(Store(storage), "clusters", synthetic.NAME).manifest().info["sizes"]
    )
    assert sum(after for _, after in info["sources"].values()) == BUDGET
    own = choose(storage, "own", rule={"group": "source", "score": "distance"})
    assert own.info["rule"] == "source: distance (smallest first)"
    assert len(own.info["quotas"]) == 2
    assert len(own.info["clusters"]) == 6
    assert sum(own.info["clusters"]) == BUDGET


def test_the_same_bytes_for_any_cut_into_tasks(
    storage: str, medoid: Manifest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "ROWS_PER_TASK", 1)
    # What the six tasks answer is merged in three levels.
    monkeypatch.setattr(reduction, "FAN_IN", 2)
    again = choose(storage, "again", rule="medoid")
    assert [part.files for part in again.parts] == [part.files for part in medoid.parts]
    assert again.info == medoid.info
    with pytest.raises(UserError, match=r"choosing the subset: the score .* is NaN"):
        choose(storage, "nan", rule={"group": "cluster", "score": "log(distance - 1000)"})


def test_facility_location_covers_the_trajectories_better_than_chance(storage: str) -> None:
    manifest = choose(storage, "covering", rule="facility_location", budget=40)
    ids = read(storage, manifest, "data")["example_id"].to_pylist()
    assert len(ids) == 40
    assert manifest.info["quotas"] == [40]
    artifact = Artifact(Store(storage), "trajectories", synthetic.NAME)
    table = pa.concat_tables([artifact.read_part(part) for part in artifact.manifest().parts])
    losses = np.array(table["losses"].to_pylist())[:, 1:]

    apart = np.linalg.norm(losses[:, None] - losses[None], axis=2)
    greedy: list[int] = []
    nearest = np.full(ROWS, apart.max())
    for _ in ids:
        greedy.append(int(np.minimum(nearest, apart).sum(axis=1).argmin()))
        nearest = np.minimum(nearest, apart[greedy[-1]])
    uncovered = apart[ids].min(axis=0).sum()
    numbers = np.random.default_rng(0)
    by_chance = [
        apart[numbers.choice(ROWS, 40, replace=False)].min(axis=0).sum() for _ in range(20)
    ]
    assert uncovered < min(by_chance)
    # six small blocks, merged, come close to greedy on all rows
    assert uncovered < 1.25 * nearest.sum()


# -------------------------------------------------------------------------------- read by libraries


def test_the_chosen_rows_are_read_by_pandas_polars_duckdb_and_datasets(
    storage: str, medoid: Manifest, folder: Path, tmp_path: Path
) -> None:
    import datasets

    ids = read(storage, medoid, "data")["example_id"].to_pylist()
    assert pd.read_parquet(folder / "data")["example_id"].tolist() == ids
    assert pl.read_parquet(folder / "data")["example_id"].to_list() == ids
    query = f"select example_id from read_parquet('{folder}/data/*.parquet') order by all"
    assert [row[0] for row in duckdb.sql(query).fetchall()] == ids
    for role in ("data", "jsonl", "index"):
        loaded = datasets.load_dataset(str(folder / role), split="train", cache_dir=str(tmp_path))
        assert loaded["example_id"][:] == ids


def test_trajectories_are_an_open_table(storage: str, tmp_path: Path) -> None:
    import datasets

    data = f"{storage}/trajectories/{synthetic.NAME}/data"
    artifact = Artifact(Store(storage), "trajectories", synthetic.NAME)
    table = pa.concat_tables([artifact.read_part(part) for part in artifact.manifest().parts])
    losses = np.array(table["losses"].to_pylist(), np.float32)
    frame = pd.read_parquet(data)
    np.testing.assert_array_equal(np.stack(frame["losses"].to_numpy()), losses)
    np.testing.assert_array_equal(pl.read_parquet(data)["losses"].to_numpy(), losses)
    query = (
        f"select example_id, losses[{STEPS}] - losses[1] "
        f"from read_parquet('{data}/*.parquet') order by all"
    )
    found = duckdb.sql(query).fetchnumpy()
    np.testing.assert_array_equal(list(found.values())[1], losses[:, -1] - losses[:, 0])
    loaded = datasets.load_dataset(data, split="train", cache_dir=str(tmp_path))
    np.testing.assert_array_equal(np.array(loaded.with_format("numpy")["losses"][:]), losses)


def test_trl_reads_its_config_and_tokenises_every_row(
    folder: Path, medoid: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    # as good as where it was made
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "copy"))
    parser = trl.TrlParser((trl.DatasetMixtureConfig,))
    (mixture,) = parser.parse_args_and_config(["--config", "trl.yaml"])
    data = trl.get_dataset(mixture)["train"]
    assert len(data) == BUDGET
    assert all(trl.data_utils.is_conversational(row) for row in data)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}|{% endfor %}"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    options = trl.SFTConfig(str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False)
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(config), options, train_dataset=data, processing_class=tokenizer
    )
    texts = [tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    assert len(texts) == BUDGET
    assert (
        "<user>plain|<assistant>text|"
        in texts[[number % 4 for number in data["example_id"]].index(3)]
    )


def test_llama_factory_finds_its_files_by_the_entry(
    folder: Path, storage: str, medoid: Manifest, tmp_path: Path
) -> None:
    import datasets

    (entry,) = json.loads((folder / "dataset_info.json").read_text()).values()
    # its loader takes every file of the folder, all of one kind, then each row's columns and each
    # turn's tags
    files = sorted(str(path) for path in (folder / entry["file_name"]).iterdir())
    assert {Path(file).suffix for file in files} == {".jsonl"}
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path))
    assert set(entry["columns"].values()) <= set(loaded.column_names)
    # some rows call tools
    assert entry["formatting"] == "openai"
    tags = entry["tags"]
    roles = {turn[tags["role_tag"]] for row in loaded for turn in row[entry["columns"]["messages"]]}
    assert roles == {tags[f"{role}_tag"] for role in ("user", "assistant", "system", "observation")}
    assert all(
        isinstance(turn[tags["content_tag"]], str) for row in loaded for turn in row["messages"]
    )


def test_axolotl_finds_its_files_by_the_stanza(
    folder: Path, medoid: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (stanza,) = yaml.safe_load((folder / "axolotl.yaml").read_text())["datasets"]
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "copy"))
    assert Path(stanza["path"]).is_dir()
    loaded = datasets.load_dataset(
        stanza["ds_type"],
        data_files=stanza["data_files"],
        split=stanza["split"],
        cache_dir=str(tmp_path),
    )
    assert len(loaded) == BUDGET
    assert stanza["type"] == "chat_template"
    assert stanza["field_messages"] in loaded.column_names
