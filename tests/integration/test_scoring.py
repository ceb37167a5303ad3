"""Stored trajectories against a plain transformers forward of the stored checkpoints, one row at a time."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from s2l_ray.core.encoding import NO_LEARNED_TOKEN
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.store import Artifact
from s2l_ray.stages.trajectories import NOT_SAMPLED
from tests.integration.conftest import TOO_LONG, Finished, Runs

END = 256  # the byte tokenizer's end token


@pytest.fixture(scope="module")
def variants(finished: Finished, runs: Runs) -> dict[str, Artifact]:
    """The shared job's trajectories under other settings of the stage; everything before it is reused."""
    job = yaml.safe_load(finished.job.read_text())
    job["run"]["name"] = "scoring"
    job["variants"] = {
        "plain": {},
        "narrow": {"trajectories.tokens_per_batch": 90},
        "sample": {"trajectories.sample": 0.4, "trajectories.seed": 5},
        "initial": {"trajectories.use_initial": True},
    }
    path = finished.folder / "scoring.yaml"
    path.write_text(yaml.safe_dump(job))
    ended = runs(path, "--until=trajectories")
    assert ended.status == 0, ended.err
    record = json.loads((finished.folder / "storage" / "runs" / "scoring" / "run.json").read_text())
    store = finished.artifact("trajectories").store
    prints = {name: stages["trajectories"]["fingerprint"] for name, stages in record["variants"].items()}
    assert len(set(prints.values())) == 4
    assert prints["plain"] == finished.artifact("trajectories").fingerprint
    return {name: Artifact(store, "trajectories", value) for name, value in prints.items()}


def whole(artifact: Artifact) -> pa.Table:
    return pa.concat_tables([artifact.read_part(part) for part in artifact.manifest().parts])


def losses(table: pa.Table) -> np.ndarray:
    """float [N, T], NaN where there is no trajectory."""
    steps = table["losses"].type.list_size
    return np.array([row or [np.nan] * steps for row in table["losses"].to_pylist()])


@pytest.fixture(scope="module")
def expected(finished: Finished) -> np.ndarray:
    """Mean cross-entropy over the answer's tokens and the end token, at step 0 and every checkpoint: float [N, 1 + T]."""
    from transformers import AutoModelForCausalLM

    proxy = finished.artifact("proxy")
    rows = [
        json.loads(line)
        for name in sorted(os.listdir(finished.folder / "raw"))
        for line in (finished.folder / "raw" / name).read_text().splitlines()
    ]
    columns = []
    for folder in proxy.manifest().info["members"][0]["folders"]:
        model = AutoModelForCausalLM.from_pretrained(Path(proxy.uri) / folder, dtype=torch.float32)
        columns.append([row_loss(model, row, max_length=40) for row in rows])
    return np.array(columns).T


@torch.inference_mode()
def row_loss(model: torch.nn.Module, row: dict[str, str], max_length: int) -> float:
    prompt = f"{row['instruction']}\n".encode()
    ids = torch.tensor([*prompt, *row["output"].encode(), END][:max_length])
    if len(ids) <= len(prompt):
        return float("nan")
    log_probabilities = model(ids[None]).logits[0].double().log_softmax(-1)
    where = torch.arange(len(prompt) - 1, len(ids) - 1)
    return -log_probabilities[where, ids[where + 1]].mean().item()


def test_losses_equal_an_unbatched_forward(finished: Finished, expected: np.ndarray) -> None:
    table = whole(finished.artifact("trajectories"))
    np.testing.assert_allclose(losses(table), expected[:, 1:], atol=1e-5, rtol=0)
    initial = [row[0] if row else np.nan for row in table["initial_losses"].to_pylist()]
    np.testing.assert_allclose(initial, expected[:, 0], atol=1e-5, rtol=0)
    assert np.nanmean(expected[:, -1]) < np.nanmean(expected[:, 0]) - 0.5, (
        "the proxy must have learned something"
    )


def test_other_batches_give_the_same_losses(variants: dict[str, Artifact]) -> None:
    plain, narrow = losses(whole(variants["plain"])), losses(whole(variants["narrow"]))
    np.testing.assert_allclose(narrow, plain, atol=1e-5, rtol=0)


def test_the_trajectory_may_begin_before_training(
    variants: dict[str, Artifact], expected: np.ndarray
) -> None:
    np.testing.assert_allclose(losses(whole(variants["initial"])), expected, atol=1e-5, rtol=0)
    assert variants["initial"].manifest().info["steps"][0] == [0, 0]


def test_rows_too_long_are_null_counted_and_told(finished: Finished) -> None:
    table, info = whole(finished.artifact("trajectories")), finished.manifest("trajectories").info
    left_out = table.slice(table.num_rows - TOO_LONG)
    assert left_out["reason"].to_pylist() == [NO_LEARNED_TOKEN] * TOO_LONG
    for column in ("losses", "initial_losses", "num_tokens"):
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
    drawn = keyed_hash(5, plain["example_id"].to_numpy()) < 0.4 * 2.0**64
    assert 0.3 < drawn.mean() < 0.5
    kept, left_out = losses(sample)[drawn], sample.filter(pa.array(~drawn))
    np.testing.assert_allclose(kept, losses(plain)[drawn], atol=1e-5, rtol=0)
    assert set(left_out["reason"].to_pylist()) == {NOT_SAMPLED}
    assert left_out["losses"].null_count == left_out.num_rows
    info = variants["sample"].manifest().info
    assert info["scored"] == np.isfinite(kept[:, 0]).sum()
    assert sum(info["left_out"].values()) + info["scored"] == sample.num_rows
