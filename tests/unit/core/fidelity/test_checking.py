"""What `python -m s2l_ray.check` computes: drawn rows, settings, shifts and clusters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2l_ray.check import _evenly
from s2l_ray.config import Clusters, Examples
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file
from s2l_ray.core.fidelity import checking
from s2l_ray.core.fidelity.checking import Checkpoint, Setting
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.model.scoring import Weights
from s2l_ray.core.storage.info import ClustersInfo
from tests import tiny
from tests.committed import info_with, manifest
from tests.families import examples, model, reference

CPU = torch.device("cpu")


def parts(folder: Path, files: int, rows_per_part: int) -> Any:
    for number in range(files):
        tiny.write_jsonl(folder / f"{number:02}.jsonl", tiny.rows(10, seed=number))
    found = find_files([str(folder)], None)
    return part_ranges(found, [index_file(file, rows_per_part) for file in found])


def test_rows_are_drawn_by_the_hash_of_their_ids(tmp_path: Path) -> None:
    ranges = parts(tmp_path, 3, 4)
    drawn = checking.draw(ranges, Examples(files=[]), 7, seed=5).table
    everyone = np.concatenate([(number << 40) + np.arange(10) for number in range(3)])
    expected = sorted(everyone[np.argsort(keyed_hash(5, everyone))[:7]].tolist())
    assert drawn["example_id"].to_pylist() == expected
    assert drawn.column_names == ["example_id", "source", "messages", "tools"]
    assert checking.draw(ranges, Examples(files=[]), 100, seed=5).table.num_rows == 30
    other = checking.draw(ranges, Examples(files=[]), 7, seed=6).table["example_id"].to_pylist()
    assert other != expected


def test_few_parts_of_many_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = parts(tmp_path, 20, 10)
    read: list[int] = []
    original = checking.read_part
    monkeypatch.setattr(
        checking, "read_part", lambda part, *rest: read.append(part.index) or original(part, *rest)
    )
    drawn = checking.draw(ranges, Examples(files=[]), 30, seed=0).table
    assert len(read) == len(set(read)) == checking.PARTS_READ
    assert len({example_id >> 40 for example_id in drawn["example_id"].to_pylist()}) > 8


def test_rejected_rows_are_counted(tmp_path: Path) -> None:
    good = [json.dumps(row) for row in tiny.rows(6)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, "[1]", "[2]"]) + "\n")
    files = find_files([str(tmp_path)], None)
    ranges = part_ranges(files, [index_file(file, 64) for file in files])
    drawn = checking.draw(ranges, Examples(files=[], on_bad_row="reject"), 20, seed=0)
    assert drawn.table.num_rows == 6
    assert list(drawn.rejects.values()) == [2]


def checkpoint(family: str, rows: list[Any], label: str = "step 1") -> Checkpoint:
    class Pads:
        pad = 0

    made = model(family)
    weights = Weights(made.config, made.state_dict(), family)
    return Checkpoint(label, Pads(), rows, lambda: weights)  # type: ignore[arg-type]


def test_settings_span_dtypes_batches_and_attention() -> None:
    rows = examples(0)
    longest = max(len(row.input_ids) for row in rows)
    made = checking.settings([checkpoint("llama", rows)], 1000, eager_too=True)
    padded = min(1000, len(rows) * longest)
    sizes = [1, max(longest, padded // 4), padded]
    assert [(s.tokens, s.attention) for s in made if s.dtype == "fp32"] == [
        *((t, None) for t in sizes),
        (padded, "eager"),
    ]
    assert [s.dtype for s in made] == ["fp32"] * 4 + ["bf16"] * 4
    assert checking.job_setting(made, "bf16") == Setting("bf16", padded)
    narrow = checking.settings([checkpoint("llama", rows)], 50, eager_too=False)
    assert sorted({s.tokens for s in narrow}) == [1, longest, 50]


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "mixtral"])
def test_every_setting_is_measured_against_the_plain_forward(family: str) -> None:
    rows = examples(1)
    seen = [checkpoint(family, rows, "step 0"), checkpoint(family, rows, "step 9")]
    in_settings = checking.settings(seen, 300, eager_too=True)
    passes: list[int] = []
    expected, found = checking.measure(seen, in_settings, CPU, lambda: passes.append(1))
    assert len(passes) == (1 + len(in_settings)) * 2
    assert list(found) == in_settings
    plain = [reference(model(family), row) for row in rows]
    np.testing.assert_allclose(expected, np.stack([plain, plain], axis=1), rtol=1e-6, atol=1e-5)
    for setting, losses in found.items():
        shift = np.abs(losses - expected).max()
        assert shift < 2e-5 if setting.dtype == "fp32" else shift > 1e-3, setting


def test_a_model_whose_padding_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions counted from the end, as with left padding: right alone, wrong in a batch."""
    import copy

    made = copy.deepcopy(model("gpt2"))
    plain = type(made).forward

    def shifted(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        filled = (input_ids != 0).sum(1, keepdim=True)
        positions = (torch.arange(input_ids.shape[1])[None] - (input_ids.shape[1] - filled)).clamp(
            min=0
        )
        return plain(self, input_ids=input_ids, position_ids=positions, **rest)

    rows = examples(1)
    for row in rows:
        row.input_ids[row.input_ids == 0] = 1
    monkeypatch.setattr(type(made), "forward", shifted)
    seen = [checkpoint("gpt2", rows)]
    in_settings = checking.settings(seen, 10_000, eager_too=False)
    expected, found = checking.measure(seen, in_settings, CPU)
    shifts = {
        s: float(np.abs(losses - expected).max())
        for s, losses in found.items()
        if s.dtype == "fp32"
    }
    assert [shift < 2e-5 for shift in shifts.values()] == [True, False, False]


def test_a_shift_names_its_place_and_the_rows_that_move() -> None:
    losses = np.array([[1.0, 2.0], [0.001, 3.0], [5.0, 6.0]], np.float32)
    other = losses.copy()
    other[1, 0] += 0.02
    other[2, 1] -= 0.5
    found = checking.shift(losses, other, np.array([0, 1, 2]), np.array([0, 2, 2]))
    assert (found.row, found.column, found.moved) == (2, 1, 1)
    assert found.absolute == pytest.approx(0.5)
    assert found.relative == pytest.approx(2.0, rel=1e-5), "small losses count as 0.01"


def test_rows_go_to_the_nearest_centroid_that_serves_their_source() -> None:
    section, steps = Clusters(k=2), [[0, 0], [0, 5], [0, 9]]
    centroids = [[1, 1], [4, 4], [1.1, 1.1]]
    infos = [
        info_with(ClustersInfo, centroids=centroids, cluster_sources=sources)
        for sources in (["a", "a", "b"], [None] * 3)
    ]
    own, shared = (manifest("clusters", info=info) for info in infos)
    grouping = checking.committed_grouping(own, steps, section)
    losses = np.array([[9, 1, 1.1], [9, 1, 1.1], [0, 5, 5], [0, 5, 5]], np.float32)
    assert grouping.labels(losses, ["a", "b", "a", "b"]).tolist() == [0, 2, 1, 2]
    assert checking.committed_grouping(shared, steps, section).labels(
        losses, ["a", "b", "a", "b"]
    ).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("rows", "distinct", "k", "expected"),
    [(40, 40, 5, 5), (40, 40, 100, 10), (40, 3, 100, 3), (2, 2, 100, 1)],
)
def test_without_committed_clusters_the_rows_make_their_own(
    rows: int, distinct: int, k: int, expected: int
) -> None:
    draw = np.random.default_rng(0)
    losses = draw.normal(3, 1, (distinct, 3))[np.arange(rows) % distinct].astype(np.float32)
    for steps, complete in (([[0, 0], [0, 5], [0, 9]], True), ([[0, 0], [0, 7], [0, 9]], False)):
        section = Clusters(
            k=k, features="differences" if complete else "raw", steps=None if complete else [5, 9]
        )
        grouping = checking.fresh_grouping(losses, np.arange(rows), steps, section, complete)
        assert f"{len(grouping.centroids)} clusters of these rows alone" == grouping.origin
        assert len(grouping.centroids) == expected
        assert (
            np.bincount(grouping.labels(losses, ["s"] * rows), minlength=len(grouping.centroids))
            > 0
        ).all()


def test_checkpoints_are_taken_evenly_with_the_first_and_the_last() -> None:
    assert _evenly(13, None) == list(range(13))
    assert _evenly(4, 9) == [0, 1, 2, 3]
    assert _evenly(13, 4) == [0, 4, 8, 12]
    assert _evenly(13, 2) == [0, 12]
    assert _evenly(13, 1) == [12]
