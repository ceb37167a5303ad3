"""Stored trajectories against a plain transformers forward of the stored checkpoints, one row at a
time.
"""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from s2l_ray.core.hashing import SCORED, keyed_hash
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.text.encoding import NO_LEARNED_TOKEN
from s2l_ray.stages.trajectories.make import NOT_SAMPLED
from tests.integration.conftest import TOO_LONG, Finished, Runs

# the byte tokenizer's end token
END = 256
STATISTICS = ("answer_loss", "grand", "el2n", "min_probability", "mean_probability")


@pytest.fixture(scope="module")
def variants(finished: Finished, runs: Runs) -> dict[str, Artifact]:
    """The shared job's trajectories under other settings of the stage.

    Everything before it is reused.
    """
    job = yaml.safe_load(finished.job.read_text())
    job["run"]["name"] = "scoring"
    job["variants"] = {
        "plain": {},
        "narrow": {"trajectories.tokens_per_batch": 90},
        "sample": {"trajectories.sample": 0.4, "trajectories.seed": 5},
        "statistics": {"trajectories.statistics": list(STATISTICS)},
    }
    path = finished.folder / "scoring.yaml"
    path.write_text(yaml.safe_dump(job))
    ended = runs(path, "--until=trajectories")
    assert ended.status == 0, ended.err
    record = json.loads((finished.folder / "storage" / "runs" / "scoring" / "run.json").read_text())
    store = finished.artifact("trajectories").store
    prints = {
        name: stages["trajectories"]["fingerprint"] for name, stages in record["variants"].items()
    }
    assert len(set(prints.values())) == 4
    assert prints["plain"] == finished.artifact("trajectories").fingerprint
    return {name: Artifact(store, "trajectories", value) for name, value in prints.items()}


def whole(artifact: Artifact) -> pa.Table:
    return pa.concat_tables([artifact.read_part(part) for part in artifact.manifest().parts])


def losses(table: pa.Table, column: str = "losses") -> np.ndarray:
    """float [N, 1 + T], NaN where there is no trajectory."""
    steps = table[column].type.list_size
    return np.array([row or [np.nan] * steps for row in table[column].to_pylist()])


@pytest.fixture(scope="module")
def expected(finished: Finished) -> dict[str, np.ndarray]:
    """Loss and statistics of every row at step 0 and every checkpoint, from plain formulas: float
    [N, 1 + T] each.
    """
    from transformers import AutoModelForCausalLM

    proxy = finished.artifact("proxy")
    rows = [
        json.loads(line)
        for name in sorted(os.listdir(finished.folder / "raw"))
        for line in (finished.folder / "raw" / name).read_text().splitlines()
    ]
    columns: dict[str, list[list[float]]] = {name: [] for name in ("losses", *STATISTICS)}
    for folder in proxy.manifest().info["members"][0]["folders"]:
        model = AutoModelForCausalLM.from_pretrained(Path(proxy.uri) / folder, dtype=torch.float32)
        made = [row_statistics(model, row, max_length=40) for row in rows]
        for name, column in columns.items():
            column.append([row.get(name, np.nan) for row in made])
    return {name: np.array(column).T for name, column in columns.items()}


def row_statistics(
    model: torch.nn.Module, row: dict[str, str], max_length: int
) -> dict[str, float]:
    prompt = list(f"{row['instruction']}\n".encode())
    ids = [*prompt, *row["output"].encode(), END][:max_length]
    answer = ids[len(prompt) :]
    if not answer:
        return {}
    with torch.no_grad():
        probabilities = after(model, prompt, answer).softmax(-1)
        alone = after(model, [END], answer).softmax(-1)
    targets = torch.tensor(answer)[:, None]
    right = probabilities.gather(1, targets)
    model.zero_grad()
    torch.nn.functional.cross_entropy(after(model, prompt, answer), targets[:, 0]).backward()
    return {
        "losses": -right.log().mean().item(),
        "mean_probability": right.mean().item(),
        "min_probability": right.min().item(),
        "el2n": probabilities.scatter(1, targets, right - 1).norm(dim=1).mean().item(),
        "grand": model.get_output_embeddings().weight.grad.norm().item(),
        "answer_loss": -alone.gather(1, targets).log().mean().item(),
    }


def after(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits that predict the answer's tokens, float64 [n, V]."""
    logits = model(torch.tensor([prompt + answer])).logits[0].double()
    return logits[len(prompt) - 1 : -1]


def test_losses_equal_an_unbatched_forward(
    finished: Finished, expected: dict[str, np.ndarray]
) -> None:
    table = whole(finished.artifact("trajectories"))
    np.testing.assert_allclose(losses(table), expected["losses"], atol=1e-5, rtol=0)
    mean = np.nanmean(expected["losses"], axis=0)
    assert mean[-1] < mean[0] - 0.5, "the proxy must have learned something"
    info = finished.manifest("trajectories").info
    assert info["steps"] == [
        [0, step] for step in finished.manifest("proxy").info["members"][0]["steps"]
    ]
    assert info["steps"][0] == [0, 0]
    assert info["statistics"] == []


def test_other_batches_give_the_same_losses(variants: dict[str, Artifact]) -> None:
    plain, narrow = losses(whole(variants["plain"])), losses(whole(variants["narrow"]))
    np.testing.assert_allclose(narrow, plain, atol=1e-5, rtol=0)


def test_statistics_equal_plain_formulas(
    variants: dict[str, Artifact], expected: dict[str, np.ndarray]
) -> None:
    table = whole(variants["statistics"])
    assert table.column_names == [
        "example_id",
        "source",
        "num_tokens",
        "losses",
        *STATISTICS,
        "reason",
    ]
    assert variants["statistics"].manifest().info["statistics"] == list(STATISTICS)
    for name in ("losses", *STATISTICS):
        np.testing.assert_allclose(
            losses(table, name), expected[name], atol=1e-5, rtol=1e-5, err_msg=name
        )
        assert table[name].null_count == TOO_LONG


def test_rows_too_long_are_null_counted_and_told(finished: Finished) -> None:
    table, info = whole(finished.artifact("trajectories")), finished.manifest("trajectories").info
    left_out = table.slice(table.num_rows - TOO_LONG)
    assert left_out["reason"].to_pylist() == [NO_LEARNED_TOKEN] * TOO_LONG
    for column in ("losses", "num_tokens"):
        assert left_out[column].null_count == TOO_LONG
        assert table[column].null_count == TOO_LONG
    assert table["reason"].null_count == table.num_rows - TOO_LONG
    assert info["left_out"] == {NO_LEARNED_TOKEN: TOO_LONG}
    assert info["scored"] == sum(info["sources"].values()) == table.num_rows - TOO_LONG
    clusters = whole(finished.artifact("clusters"))
    assert clusters["cluster"].null_count == TOO_LONG
    assert sum(finished.manifest("clusters").info["sizes"]) == info["scored"]


def test_a_sample_is_drawn_by_hash_and_the_rest_is_told(variants: dict[str, Artifact]) -> None:
    plain, sample = whole(variants["plain"]), whole(variants["sample"])
    assert sample["example_id"].equals(plain["example_id"])
    drawn = keyed_hash(SCORED, 5, plain["example_id"].to_numpy()) < 0.4 * 2.0**64
    assert 0.3 < drawn.mean() < 0.5
    kept, left_out = losses(sample)[drawn], sample.filter(pa.array(~drawn))
    np.testing.assert_allclose(kept, losses(plain)[drawn], atol=1e-5, rtol=0)
    assert set(left_out["reason"].to_pylist()) == {NOT_SAMPLED}
    assert left_out["losses"].null_count == left_out.num_rows
    info = variants["sample"].manifest().info
    assert info["scored"] == np.isfinite(kept[:, 0]).sum()
    assert sum(info["left_out"].values()) + info["scored"] == sample.num_rows
