"""Kept hashes beyond the job of test_kept.py: prompts, windows, features, draws.

Who changes one gives the stage a new version.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.config import Clusters, Columns
from s2l_ray.core.data import exports
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file, read_part
from s2l_ray.core.hashing import SUBSET, keyed_hash
from s2l_ray.core.kmeans.features import features
from s2l_ray.core.kmeans.lloyd import KMeans
from s2l_ray.core.kmeans.process_rows import HeldRows
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.kmeans.sources import fit_source
from s2l_ray.core.model import scoring
from s2l_ray.core.model.order import Order
from s2l_ray.core.query import ask_here
from s2l_ray.core.selection.draw import draw
from s2l_ray.core.selection.keys import GroupSizes, Keys, Points, ordered_bits
from s2l_ray.core.selection.quotas import quotas
from s2l_ray.core.storage.schemas import EXAMPLES_FIXED, trajectories_schema
from s2l_ray.core.text.batching import token_batches
from s2l_ray.core.text.byte_tokenizer import byte_tokenizer
from s2l_ray.core.text.encoding import Encoder
from s2l_ray.stages import STAGES
from tests import tiny

# (stage, version) -> hash of what it made when that version was released. Add lines; change none.
KEPT = {
    ("examples", 1): "6a8e0928f6dfcc085dccea392c778342ed36a1d51d62f082627fb63cbb061dbf",
    ("examples", 2): "adad929de5ba033e093235668cbaa1690d7d2054d99c0563d1d62cf57ab5d322",
    ("proxy", 1): "d14cadf8b62cddcbef8aa61f2747b240f6d0de0634c8a0a4ff300339d91cf7ea",
    ("target", 1): "d14cadf8b62cddcbef8aa61f2747b240f6d0de0634c8a0a4ff300339d91cf7ea",
    ("proxy", 2): "d14cadf8b62cddcbef8aa61f2747b240f6d0de0634c8a0a4ff300339d91cf7ea",
    ("target", 2): "d14cadf8b62cddcbef8aa61f2747b240f6d0de0634c8a0a4ff300339d91cf7ea",
    ("trajectories", 2): "a95c19278b4cf10bc3245a4789f4884e8c86afb3ae44a0f8d9719354c2ccad2a",
    ("clusters", 1): "19d6e55c881469e7451614054011557d6730ddfd9bed61d553d2745d8a73c1e6",
    ("clusters", 2): "2fed1c98b2d6ab7c82248c4fb1248df4588af1a497933273327207e8219e77aa",
    ("subset", 1): "018440c0f9e9afbd87f852b7deff88548ba6b45afe664df25b323c3dd4a63e28",
    ("subset", 2): "217ca58f5c5ccc65efad0ef8b586094445acab3cfd8e1a9e2b19fc1a6d5635e4",
    ("proxy", 3): "8ade0735c75780861a0280588643ea371fa612c52a54390378f42b94a6664cfd",
    ("target", 3): "8ade0735c75780861a0280588643ea371fa612c52a54390378f42b94a6664cfd",
    ("trajectories", 3): "a95c19278b4cf10bc3245a4789f4884e8c86afb3ae44a0f8d9719354c2ccad2a",
    ("clusters", 3): "074776e2271a1d5409b322f3e9f394ed52886c13b51eb4c3fc6aab0d67c2ee6c",
    ("subset", 3): "0bc825dbb932b86fcccd3744adc41dd8c7926876ad320ebfa1c2bc939a053002",
    ("examples", 3): "24e436d686e6ba06ec48bd31cf7f02af68490faeac68fcd4ad086b7e1b4f7175",
    ("proxy", 4): "8ade0735c75780861a0280588643ea371fa612c52a54390378f42b94a6664cfd",
    ("target", 4): "8ade0735c75780861a0280588643ea371fa612c52a54390378f42b94a6664cfd",
    ("trajectories", 4): "a95c19278b4cf10bc3245a4789f4884e8c86afb3ae44a0f8d9719354c2ccad2a",
    ("clusters", 4): "074776e2271a1d5409b322f3e9f394ed52886c13b51eb4c3fc6aab0d67c2ee6c",
    ("subset", 4): "0bc825dbb932b86fcccd3744adc41dd8c7926876ad320ebfa1c2bc939a053002",
}


def rows(folder: Path) -> Any:
    files = find_files([str(tiny.write_jsonl(folder / "a.jsonl", tiny.rows(40)))], None)
    (part,) = part_ranges(files, [index_file(file, 64) for file in files])
    return read_part(part, Columns()).table


def examples(folder: Path) -> Any:
    return rows(folder).to_pylist()


def training(folder: Path) -> Any:
    """What the loop is fed: the order of the data, and the tokens with what is learned of them."""
    order = Order((40, 7, 64), window=50, seed=3, global_batch=16, positions=200)
    windows = [(w.epoch, w.number, w.first, order.rows_of(w).tolist()) for w in order.windows()]
    encoded = Encoder(byte_tokenizer(), "alpaca", 200).examples(rows(folder))
    return [windows, [(e.example_id, e.input_ids.tolist(), e.learned.tolist()) for e in encoded]]


def trajectories(folder: Path) -> Any:
    """Columns, batches and what is scored without its prompt; losses differ a bit between CPUs."""
    encoded = Encoder(byte_tokenizer(), "alpaca", 200).examples(rows(folder))
    alone = [
        (e.input_ids.tolist(), e.learned.tolist()) for e in scoring.answers(encoded, None, 256)
    ]
    schema = trajectories_schema(
        3, ["mean_probability", "min_probability", "el2n", "grand", "answer_loss"]
    )
    batches = token_batches([len(e.input_ids) for e in encoded], 500)
    return [[(field.name, str(field.type)) for field in schema], batches, alone]


def clusters(folder: Path) -> Any:
    """On small whole numbers, where sums are exact: all rows, and differences within sources."""
    losses = np.random.Generator(np.random.PCG64(5)).integers(0, 6, (300, 4)).astype(np.float32)
    shard = Shard([(np.arange(300), losses)])
    found = KMeans(k=6, seed=1, max_rounds=3, tolerance=0.0).fit(ask_here(shard))
    section = Clusters(
        k=3, within="source", features="differences", points_per_centroid=8, max_rounds=3
    )
    rows = features(losses, [[0, 0], [0, 5], [0, 10], [0, 15]], section)
    held = HeldRows([(np.arange(300), rows, np.arange(300) % 2)])
    within = [fit_source(ask_here(held), source, section).centroids for source in (0, 1)]
    return [shard.labels(0, found.centroids)[0].tolist(), held.labels(0, within)[0].tolist()]


def subset(folder: Path) -> Any:
    """What is drawn by hash and by a score, and how a conversation is written for trainers."""
    ids = np.arange(500, dtype=np.int64) << 3
    groups = np.arange(500) ** 2 % 7
    scores = np.arange(500) % 11 - 5.0
    drawn = []
    for score, take in ((np.zeros(500), "smallest"), (scores, "smallest"), (scores, "middle")):
        points = Points(groups, ordered_bits(score), keyed_hash(SUBSET, 11, ids))
        keys = Keys.of(points, np.zeros(500, np.int32), 7)
        sizes = GroupSizes().of(keys)
        found = draw(lambda query, keys=keys: query.of(keys), sizes, quotas(sizes, 123), take)
        drawn.append(ids[found.chosen(points)].tolist())
    turns = [
        {"role": "user", "content": "a", "input": "b", "extra": None},
        {"role": "assistant", "content": "", "input": None, "extra": '{"tool_calls":[]}'},
    ]
    row = {"example_id": 7, "source": "s", "messages": turns, "tools": "[1]"}
    chat = exports.chat_lines(pa.Table.from_pylist([row], EXAMPLES_FIXED)).decode()
    return [drawn, chat, {name: text.decode() for name, text in exports.stanzas([]).items()}]


@pytest.mark.parametrize(
    ("stage", "make"),
    [
        ("examples", examples),
        ("proxy", training),
        ("target", training),
        ("trajectories", trajectories),
        ("clusters", clusters),
        ("subset", subset),
    ],
)
def test_what_a_stage_makes_changes_only_with_its_version(
    stage: str, make: Callable[[Path], Any], tmp_path: Path
) -> None:
    version = next(s.version for s in STAGES if s.name == stage)
    made = hashlib.sha256(json.dumps(make(tmp_path)).encode()).hexdigest()
    assert KEPT.get((stage, version)) == made, (
        f"{stage} makes something else than version {version} did: raise its version in STAGES"
    )
