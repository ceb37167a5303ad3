"""`clusters` on real shard actors: within sources, on a sample, from another artifact's centroids,
and through any death.

The trajectories are made here and committed as the stage before would: no model, no examples.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from s2l_ray.config import Clusters, Config, ShardWorkers
from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.hashing import KMEANS_SAMPLE, keyed_hash
from s2l_ray.core.kmeans.features import feature_steps, features
from s2l_ray.core.kmeans.lloyd import KMeans
from s2l_ray.core.kmeans.process_rows import InView
from s2l_ray.core.kmeans.queries import LloydStep, SmallestHashes
from s2l_ray.core.kmeans.shard import Shard
from s2l_ray.core.query import Query, ask_here
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import TrajectoriesInfo
from s2l_ray.core.storage.manifest import Manifest
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.schemas import vector_column
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError
from s2l_ray.stages.clusters import make as clusters
from s2l_ray.stages.clusters import shards as shards_module
from s2l_ray.stages.clusters.shards import ShardActors
from s2l_ray.stages.clusters.stage import CLUSTERS
from tests import tiny
from tests.committed import commit, info_with

pytestmark = pytest.mark.usefixtures("local_ray")


K, FEW = 6, 4
STEPS = [[0, step] for step in (0, 5, 10, 15, 20)]
PART_ROWS = (700, 256, 1, 512, 300, 19, 400, 512, 333, 7)
# of which an earlier run knew; the source "new" comes only after them
OLD_PARTS = 7
SECTION = {"k": K, "tolerance": 0.0, "max_rounds": 8, "seed": 3}


@dataclass
class Data:
    """The storage, the trajectories' manifest, and all their rows: ids [N], sources [N], losses [N,
    S], scored [N].
    """

    folder: Path
    manifest: Manifest
    ids: np.ndarray
    sources: np.ndarray
    losses: np.ndarray
    scored: np.ndarray

    def config(self, **section: Any) -> Config:
        return Config.model_validate(
            {
                "run": {"storage": str(self.folder)},
                "examples": {"files": ["rows.jsonl"]},
                "proxy": {"model": {"config": tiny.LLAMA}, "tokenizer": "bytes", "epochs": 1},
                "clusters": {**SECTION, **section},
            }
        )

    def artifact(self, stage: str, name: str) -> Artifact:
        return Artifact(Store(str(self.folder)), stage, name)

    def upto(self, parts: int) -> Manifest:
        """The trajectories as they were before the later parts came."""
        rows = sum(PART_ROWS[:parts])
        counts = Counter(self.sources[:rows][self.scored[:rows]].tolist())
        info = {**self.manifest.info, "sources": dict(counts), "scored": sum(counts.values())}
        return replace(self.manifest, parts=self.manifest.parts[:parts], info=info)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Sources with different shapes of trajectories.

    "few" has FEW distinct ones, and "new" begins in the later parts.
    """
    folder, draw = tmp_path_factory.mktemp("clusters"), np.random.default_rng(7)
    artifact = Artifact(Store(str(folder)), "trajectories", "t")
    parts, columns = [], []
    for number, rows in enumerate(PART_ROWS):
        late = [0.2] if number >= OLD_PARTS else []
        names = ["b/copy", "a upper", "few", "new"][: 3 + len(late)]
        weights = np.array([0.5, 0.3, 0.2, *late])
        sources = draw.choice(names, rows, p=weights / weights.sum())
        level = np.where(sources == "b/copy", 4.0, 2.0) + draw.normal(0, 0.5, rows)
        speed = draw.choice([0.0, 0.02, 0.1], rows)
        losses = level[:, None] * np.exp(-speed[:, None] * [step for _, step in STEPS])
        losses = np.abs(losses + draw.normal(0, 0.05, losses.shape))
        losses[sources == "few"] = draw.integers(1, FEW + 1, (sources == "few").sum())[:, None]
        scored = draw.random(rows) < (0.0 if rows == 1 else 0.9)
        ids = (number // 3 << 40) + np.arange(rows) + 1000 * number
        columns.append((ids, sources, losses.astype(np.float32), scored))
        table = pa.table(
            {
                "example_id": pa.array(ids),
                "source": pa.array(sources.tolist()),
                "num_tokens": pa.array(np.full(rows, 9, np.int32), mask=~scored),
                "losses": vector_column(scored, losses),
                "reason": pa.array(np.where(scored, None, "too long").tolist(), pa.string()),
            }
        )
        files = {"data": (".parquet", parquet_bytes(table))}
        parts.append(artifact.write_part(number, rows, files, "node", "run", {}))
    ids, sources, losses, scored = (np.concatenate(column) for column in zip(*columns, strict=True))
    counts = Counter(sources[scored].tolist())
    info = info_with(
        TrajectoriesInfo, scored=sum(counts.values()), sources=dict(counts), steps=STEPS
    )
    return Data(folder, commit(artifact, Outcome(parts, info=info)), ids, sources, losses, scored)


def make(
    data: Data,
    name: str,
    config: Config,
    *,
    shards: int = 2,
    shard_memory: int | None = None,
    trajectories: Manifest | None = None,
    base: Manifest | None = None,
) -> Manifest:
    """Clusters under a name of their own."""
    workers = ShardWorkers(workers=shards, memory=shard_memory)
    scaling = config.scaling.model_copy(update={"clusters": workers})
    config = config.model_copy(update={"scaling": scaling})
    inputs = {"trajectories": data.artifact("trajectories", "t")}
    manifests = {"trajectories": data.manifest if trajectories is None else trajectories}
    if base is not None:
        inputs["base"], manifests["base"] = data.artifact("clusters", base.fingerprint), base
    artifact = data.artifact("clusters", name)
    work = Work(config, artifact, inputs, manifests, "run", request=CLUSTERS.request(config))
    return commit(artifact, clusters.make(work), section=config.clusters.model_dump(mode="json"))


def contents(data: Data, manifest: Manifest) -> list[bytes]:
    artifact = data.artifact("clusters", manifest.fingerprint)
    return [artifact.read_file(part.files["data"]) for part in manifest.parts]


def labels_of(data: Data, manifest: Manifest) -> np.ndarray:
    """Cluster of every row, -1 where it has none."""
    artifact = data.artifact("clusters", manifest.fingerprint)
    table = pa.concat_tables([artifact.read_part(part) for part in manifest.parts])
    assert table["example_id"].to_pylist() == data.ids[: table.num_rows].tolist()
    return table["cluster"].fill_null(-1).to_numpy()


def assert_same(data: Data, one: Manifest, other: Manifest) -> None:
    assert contents(data, other) == contents(data, one)
    assert other.info == one.info


WITHIN = {"within": "source", "features": "centred", "points_per_centroid": 20}


@pytest.fixture(scope="module")
def within(data: Data) -> Manifest:
    """Within sources, on centred trajectories and a sample, by one shard, never disturbed."""
    return make(data, "within", data.config(**WITHIN), shards=1)


# ----------------------------------------------------------------------------------- within sources


def test_every_source_has_its_own_consecutive_clusters(data: Data, within: Manifest) -> None:
    owners = within.info["cluster_sources"]
    assert owners == ["a upper"] * K + ["b/copy"] * K + ["few"] + ["new"] * K
    assert within.info["k"] == len(within.info["sizes"]) == len(within.info["spread"]) == 3 * K + 1
    labels = labels_of(data, within)
    assert ((labels >= 0) == data.scored).all()
    assert {(s, owners[n]) for s, n in zip(data.sources, labels, strict=True) if n >= 0} == {
        (s, s) for s in owners
    }
    assert np.bincount(labels[labels >= 0]).tolist() == within.info["sizes"]


def test_a_source_gets_no_more_clusters_than_it_has_distinct_rows(
    data: Data, within: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    # its trajectories are constant: centred, all rows are alike
    assert within.info["fewer"] == {"few": 1}
    raw = make(data, "raw", data.config(within="source"))
    assert raw.info["fewer"] == {"few": FEW}
    assert raw.info["cluster_sources"].count("few") == FEW
    assert f"1 source(s) have fewer distinct trajectories than clusters.k = {K}" in caplog.text
    assert f"few ({FEW})" in caplog.text
    few = labels_of(data, raw)[(data.sources == "few") & data.scored]
    levels = data.losses[(data.sources == "few") & data.scored][:, 0]
    assert len({(a, b) for a, b in zip(few, levels, strict=True)}) == FEW


def test_a_source_is_clustered_as_if_it_were_alone(data: Data, within: Manifest) -> None:
    section = Clusters.model_validate({**SECTION, **WITHIN})
    first = 0
    for source in ("a upper", "b/copy", "few", "new"):
        mine = (data.sources == source) & data.scored
        ids, rows = data.ids[mine], features(data.losses[mine], STEPS, section)
        sample = np.argsort(keyed_hash(KMEANS_SAMPLE, 3, ids))[: K * 20]
        sample.sort()
        settings = KMeans(k=K, seed=3, max_rounds=8, tolerance=0.0, allow_fewer_clusters=True)
        alone = settings.fit(ask_here(Shard([(ids[sample], rows[sample])])))
        count = len(alone.centroids)
        found = np.array(within.info["centroids"][first : first + count], np.float32)
        np.testing.assert_allclose(found, alone.centroids, atol=1e-6)
        squares = ((rows[:, None].astype(np.float64) - found) ** 2).sum(axis=2)
        expected = np.bincount(squares.argmin(axis=1), minlength=count)
        # of all rows, not of the sample
        assert within.info["sizes"][first : first + count] == expected.tolist()
        first += count
    assert first == within.info["k"]


def test_the_objective_is_that_of_all_rows(data: Data, within: Manifest) -> None:
    section = Clusters.model_validate({**SECTION, **WITHIN})
    rows = features(data.losses, STEPS, section)[data.scored].astype(np.float64)
    labels = labels_of(data, within)[data.scored]
    objective = ((rows - np.array(within.info["centroids"])[labels]) ** 2).sum()
    assert within.info["objective"] == pytest.approx(objective, rel=1e-6)
    # the history is of the samples
    assert within.info["objectives"][-1] < 0.5 * objective


def test_any_number_of_shards_and_any_order_of_parts_give_the_same_bytes(
    data: Data, within: Manifest
) -> None:
    assert_same(data, within, make(data, "three", data.config(**WITHIN), shards=3))
    order = np.random.default_rng(0).permutation(len(PART_ROWS))
    shuffled = replace(data.manifest, parts=[data.manifest.parts[number] for number in order])
    assert_same(data, within, make(data, "shuffled", data.config(**WITHIN), trajectories=shuffled))


def test_shards_that_stream_their_parts_give_the_same_bytes(
    data: Data, within: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(
        data, within, make(data, "streamed", data.config(**WITHIN), shards=3, shard_memory=1)
    )
    watch(monkeypatch, 9, lambda shards: ray.kill(shards.actors[1], no_restart=False))
    assert_same(
        data, within, make(data, "streamed-killed", data.config(**WITHIN), shards=2, shard_memory=1)
    )


# ------------------------------------------------------------------------------------------- deaths


class Interrupted(Exception):
    """Stands for the death of the driver."""


def watch(
    monkeypatch: pytest.MonkeyPatch, at: int, act: Any
) -> list[tuple[int, type[Query[Any, Any]]]]:
    """(source, kind) of all queries, in order; `act(shards)` happens before LloydStep `at`."""
    queries: list[tuple[int, type[Query[Any, Any]]]] = []
    ask = ShardActors.ask

    def watched(self: ShardActors, query: InView[Any]) -> Any:
        queries.append((query.view.source, type(query.query)))
        if isinstance(query.query, LloydStep) and sum(q is LloydStep for _, q in queries) == at:
            act(self)
        return ask(self, query)

    monkeypatch.setattr(ShardActors, "ask", watched)
    return queries


def test_a_dead_run_goes_on_with_the_source_it_was_at(
    data: Data, within: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as first:
        watch(first, 12, die)
        with pytest.raises(Interrupted):
            make(data, "dead", data.config(**WITHIN))
    place = data.artifact("clusters", "dead")
    sources = ["a upper", "b/copy"]
    names = [clusters.state_name(source) for source in sources]
    assert sorted(f"rounds/{name}" for name in place.list("rounds")) == sorted(names)
    states = {s: json.loads(place.read(name)) for s, name in zip(sources, names, strict=True)}
    # at rest
    assert states["a upper"]["history"][-1]["shift"] == 0
    done = len(states["b/copy"]["history"])
    assert 0 < done < 8
    calls = watch(monkeypatch, -1, None)
    assert_same(data, within, make(data, "dead", data.config(**WITHIN), shards=3))
    steps = Counter(source for source, kind in calls if kind is LloydStep)
    # that assigns all rows
    assert steps[0] == 1
    assert 2 <= steps[1] <= 8 - done + 1
    assert {source for source, kind in calls if kind is SmallestHashes} == {2, 3}


def test_a_shard_that_dies_between_rounds_changes_nothing(
    data: Data, within: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch(monkeypatch, 12, lambda shards: ray.kill(shards.actors[1], no_restart=False))
    grouped = make(data, "killed", data.config(**WITHIN), shards=3)
    assert len([1 for _, kind in calls if kind is LloydStep]) > 12
    assert_same(data, within, grouped)


def test_parts_written_before_a_death_are_kept(
    data: Data, within: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardActors.write

    def die_after_one(calls: list[Any], _: Any) -> None:
        # of the shards that write their parts
        ray.wait(calls, num_returns=1)
        raise Interrupted

    with monkeypatch.context() as first:

        def dying(*arguments: Any) -> Any:
            first.setattr(shards_module, "wait_for", die_after_one)
            return write(*arguments)

        first.setattr(ShardActors, "write", dying)
        with pytest.raises(Interrupted):
            make(data, "half", data.config(**WITHIN))
    place = data.folder / "clusters" / "half"
    finished = [path.stem for path in (place / "receipts").iterdir()]
    times = {
        path: path.stat().st_mtime_ns for stem in finished for path in place.glob(f"data/{stem}-*")
    }
    assert len(times) >= 4
    assert_same(data, within, make(data, "half", data.config(**WITHIN)))
    assert {path: path.stat().st_mtime_ns for path in times} == times


# ----------------------------------------------------------------------------------- use and refine


@pytest.fixture(scope="module")
def old(data: Data) -> Manifest:
    """All rows together, before the later parts came."""
    return make(data, "old", data.config(features="zscored"), trajectories=data.upto(OLD_PARTS))


@pytest.fixture(scope="module")
def old_within(data: Data) -> Manifest:
    """Within sources, before the later parts and the source "new" came."""
    return make(data, "old-within", data.config(within="source"), trajectories=data.upto(OLD_PARTS))


def test_centroids_in_use_stay_and_so_do_the_clusters_of_known_rows(
    data: Data, old: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch(monkeypatch, -1, None)
    grown = make(data, "grown", data.config(features="zscored", use="old"), base=old)
    assert SmallestHashes not in {kind for _, kind in calls}
    assert grown.info["centroids"] == old.info["centroids"]
    assert grown.info["objectives"] == []
    assert contents(data, grown)[:OLD_PARTS] == contents(data, old)
    assert sum(grown.info["sizes"]) == data.manifest.info["scored"]
    moved = grown.info["moved"]
    assert moved["base_sizes"] == old.info["sizes"]
    assert moved["before"] == grown.info["sizes"]
    assert (moved["changed"], moved["shifts"], moved["new_sources"]) == (0, [0.0] * K, [])
    assert moved["new_rows"] == sum(grown.info["sizes"]) - sum(old.info["sizes"]) > 0


def test_refined_centroids_keep_their_numbers_and_say_what_moved(data: Data, old: Manifest) -> None:
    config = data.config(features="zscored", use="old", refine=True, max_rounds=3)
    refined = make(data, "refined", config, base=old)
    used = make(data, "used", data.config(features="zscored", use="old"), base=old)
    before, after = labels_of(data, used), labels_of(data, refined)
    moved = refined.info["moved"]
    assert moved["changed"] == int((before != after).sum()) > 0
    assert moved["before"] == used.info["sizes"]
    shifts = np.linalg.norm(np.subtract(refined.info["centroids"], old.info["centroids"]), axis=1)
    np.testing.assert_allclose(moved["shifts"], shifts, rtol=1e-6)
    assert 0 < len(refined.info["objectives"]) <= 3
    assert refined.info["objective"] < used.info["objective"]
    # each cluster is still nearest to the one it was: numbers can be followed
    old_centroids, new_centroids = (
        np.array(old.info["centroids"]),
        np.array(refined.info["centroids"]),
    )
    distances = np.linalg.norm(new_centroids[:, None] - old_centroids, axis=2)
    assert distances.argmin(axis=1).tolist() == list(range(K))


@pytest.mark.parametrize("refine", [False, True])
def test_a_new_source_is_fitted_afresh_after_the_known_clusters(
    data: Data, old_within: Manifest, refine: bool
) -> None:
    name = f"grown-within-{refine}"
    grown = make(
        data, name, data.config(within="source", use="old-within", refine=refine), base=old_within
    )
    known = old_within.info["k"]
    assert grown.info["cluster_sources"] == old_within.info["cluster_sources"] + ["new"] * K
    assert grown.info["moved"]["new_sources"] == ["new"]
    assert len(grown.info["moved"]["before"]) == len(grown.info["moved"]["shifts"]) == known
    assert (grown.info["centroids"][:known] == old_within.info["centroids"]) is not refine
    fresh = make(data, f"{name}-alone", data.config(within="source"))
    assert grown.info["centroids"][known:] == fresh.info["centroids"][-K:]
    assert np.bincount(labels_of(data, grown)[data.scored]).tolist() == grown.info["sizes"]


def test_a_source_that_is_gone_keeps_its_empty_clusters(data: Data, within: Manifest) -> None:
    config = data.config(**WITHIN, use="within", refine=True)
    shrunk = make(data, "shrunk", config, trajectories=data.upto(OLD_PARTS), base=within)
    assert shrunk.info["cluster_sources"] == within.info["cluster_sources"]
    assert shrunk.info["sizes"][-K:] == [0] * K
    assert shrunk.info["centroids"][-K:] == within.info["centroids"][-K:]


def test_a_base_made_in_another_way_is_refused_with_what_differs(data: Data, old: Manifest) -> None:
    config = data.config(k=K + 1, features="raw", use="old")
    with pytest.raises(
        UserError, match=rf"k is {K} there and {K + 1} here; features is zscored there and raw here"
    ):
        make(data, "refused", config, base=old)
    other = replace(
        old, info={**old.info, "steps": [[0, step + 1] for _, step in old.info["steps"]]}
    )
    with pytest.raises(
        UserError, match=r"the steps \[proxy, step\] are \[\[0, 6\], .* there and \[\[0, 5\]"
    ):
        make(data, "refused", data.config(features="zscored", use="old"), base=other)
    assert not (data.folder / "clusters" / "refused").exists()


# ----------------------------------------------------------------------------------------- refusals


def test_features_that_make_rows_alike_are_refused_with_a_remedy(data: Data) -> None:
    # two z-scored numbers are 1 and -1, or -1 and 1, or 0 and 0
    config = data.config(features="zscored", steps=2)
    with pytest.raises(
        UserError, match=rf"clusters.k = {K} distinct trajectories, got 3\. .*clusters.features"
    ):
        make(data, "alike", config)


def test_losses_that_are_not_finite_are_refused_with_example_and_step(data: Data) -> None:
    artifact = data.artifact("trajectories", "bad")
    losses = data.losses[:700].copy()
    losses[33, 2] = np.nan
    table = pa.table(
        {
            "example_id": pa.array(data.ids[:700]),
            "losses": vector_column(np.ones(700, bool), losses),
        }
    )
    part = artifact.write_part(
        0, 700, {"data": (".parquet", parquet_bytes(table))}, "node", "run", {}
    )
    bad = replace(data.manifest, parts=[part], fingerprint="bad")
    config = data.config(features="centred")
    work = Work(
        config,
        data.artifact("clusters", "nan"),
        {"trajectories": artifact},
        {"trajectories": bad},
        "run",
        request=CLUSTERS.request(config),
    )
    with pytest.raises(
        UserError, match=rf"got nan for example_id {data.ids[33]} at step 10 of proxy number 0"
    ):
        clusters.make(work)
    assert not (data.folder / "clusters" / "nan" / "manifest.json").exists()


def test_the_columns_are_those_that_the_labels_name(data: Data, within: Manifest) -> None:
    section = Clusters.model_validate({**SECTION, **WITHIN})
    assert within.info["steps"] == feature_steps(STEPS, section) == STEPS[1:]
    assert within.info["features"] == "centred"
