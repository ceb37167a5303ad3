"""Mistakes of the published S2L code, each with a test that it is not made here.

Those that concern clusters (9, 10, 12) are in test_reference_bugs_clusters.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2l_ray import config, pipeline
from s2l_ray.config import Model, Training
from s2l_ray.contract.work import Outcome
from s2l_ray.core.hashing import SUBSET, keyed_hash
from s2l_ray.core.model.architecture import build, load_config
from s2l_ray.core.model.checkpoint import checkpoint_folder
from s2l_ray.core.model.loading import load_encoder
from s2l_ray.core.model.order import Order
from s2l_ray.core.model.schedule import checkpoint_steps
from s2l_ray.core.model.scoring import files_of, load_checkpoint
from s2l_ray.core.selection.draw import draw
from s2l_ray.core.selection.keys import GroupSizes, Keys, Points
from s2l_ray.core.selection.quotas import quotas
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from tests import tiny
from tests.committed import commit

SECTION = Training(model=Model(config=tiny.LLAMA), tokenizer="bytes", epochs=1)
CHECKPOINT = checkpoint_folder(5)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Artifact, dict[str, torch.Tensor]]:
    """A committed proxy of one checkpoint, and its weights as training left them."""
    torch.manual_seed(3)
    model = build(load_config(SECTION.model))
    artifact = Artifact(Store(str(tmp_path)), "proxy", "p")
    model.save_pretrained(tmp_path / "saved")
    files = [
        artifact.write_named(f"{CHECKPOINT}/{path.name}", path.read_bytes())
        for path in sorted((tmp_path / "saved").iterdir())
    ]
    commit(artifact, Outcome(files=files))
    return artifact, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_bug_7_rows_of_special_tokens_are_overwritten_when_losses_are_collected(
    trained: tuple[Artifact, dict[str, torch.Tensor]],
) -> None:
    """A checkpoint is scored with the embeddings it was trained with, the end token included."""
    artifact, weights = trained
    files = files_of(artifact.manifest())
    load_encoder(SECTION)
    loaded = load_checkpoint(artifact, CHECKPOINT, files, "fp32", torch.device("cpu"))
    assert loaded.get_input_embeddings().weight.shape[0] == tiny.LLAMA["vocab_size"]
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_bug_8_the_draw_inside_clusters_is_not_seeded() -> None:
    """The same seed draws the same rows, whatever was drawn before; another seed draws others."""

    def drawn(seed: int) -> list[int]:
        ids = np.arange(5000, dtype=np.int64)
        groups = ids % 7
        points = Points(groups, np.zeros(len(ids), np.uint64), keyed_hash(SUBSET, seed, ids))
        keys = Keys.of(points, np.zeros(len(ids), np.int32), 7)
        sizes = GroupSizes().of(keys)
        found = draw(lambda query: query.of(keys), sizes, quotas(sizes, 500))
        return ids[found.chosen(points)].tolist()

    first = drawn(1)
    np.random.random(3)
    assert drawn(1) == first
    assert len(set(first) & set(drawn(2))) < 250


def test_bug_11_a_missing_checkpoint_silently_shortens_the_trajectory(
    trained: tuple[Artifact, dict[str, torch.Tensor]],
) -> None:
    """Every checkpoint in the proxy's manifest is loaded, or the run stops with its name."""
    artifact, _ = trained
    files = files_of(artifact.manifest())
    name = f"{CHECKPOINT}/model.safetensors"
    (Path(artifact.uri) / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: the manifest lists it, but it is missing"):
        load_checkpoint(artifact, CHECKPOINT, files, "fp32", torch.device("cpu"))
    with pytest.raises(UserError, match="the manifest lists no"):
        load_checkpoint(artifact, checkpoint_folder(6), files, "fp32", torch.device("cpu"))


def test_bug_13_the_trajectory_depends_on_the_number_of_gpus() -> None:
    """The published code keeps all, half or a quarter of training on 4, 2 or 1 GPUs. Here T points
    span all of it: the global batch, and so the steps, are the config's, and workers only share a
    batch."""
    order = Order((*[16_384] * 15, 16_279), 131_072, 0, global_batch=128, positions=3 * 262_039)
    steps = checkpoint_steps(order.steps, 12)
    assert len(steps) == 12
    assert steps[0] == round(order.steps / 12)
    assert steps[-1] == order.steps
    for step in (0, steps[0], order.steps - 1):
        for workers in (1, 2, 4, 8):
            share = [order.share_of(step, rank, workers) for rank in range(workers)]
            assert sum(share) == min(128, order.positions - step * 128)


@pytest.mark.parametrize("section", ["proxy", "trajectories"])
def test_bug_14_losses_are_collected_in_whatever_dtype_a_library_defaults_to(
    tmp_path: Path, section: str, trained: tuple[Artifact, dict[str, torch.Tensor]]
) -> None:
    """The config's dtypes of training and scoring name the artifact and load the model."""
    tree: dict[str, Any] = tiny.job(tmp_path)
    names = {
        pipeline.plan(config.load(None, [f"--{section}.dtype={dtype}"], tree), "trajectories")
        .of("s2l")[section]
        .artifact.fingerprint
        for dtype in ("bf16", "fp32")
    }
    assert len(names) == 2
    artifact, _ = trained
    files = files_of(artifact.manifest())
    for dtype, wanted in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        loaded = load_checkpoint(artifact, CHECKPOINT, files, dtype, torch.device("cpu"))
        assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
