"""`clusters` and `subset` on real shard actors: the same bytes however the parts are spread, in
whatever order, whoever dies.
"""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from s2l_ray.config import RULES, Config
from s2l_ray.contract.stage import Request
from s2l_ray.contract.work import Outcome, Work
from s2l_ray.core.data.find import find_files
from s2l_ray.core.data.parts import part_ranges
from s2l_ray.core.data.read import index_file
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.kmeans.process_rows import InView
from s2l_ray.core.kmeans.queries import LloydStep, SmallestHashes
from s2l_ray.core.query import Query
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.info import TrajectoriesInfo
from s2l_ray.core.storage.manifest import Manifest, Part
from s2l_ray.core.storage.parquet import parquet_bytes
from s2l_ray.core.storage.schemas import trajectories_schema, vector_column
from s2l_ray.core.storage.store import Store
from s2l_ray.edge import reduction
from s2l_ray.errors import UserError
from s2l_ray.stages.clusters import make as clusters
from s2l_ray.stages.clusters import shards as shards_module
from s2l_ray.stages.clusters.shards import ShardActors
from s2l_ray.stages.examples import make as examples
from s2l_ray.stages.subset import make as subset
from tests import tiny
from tests.committed import commit, info_with

pytestmark = pytest.mark.usefixtures("local_ray")


K, STEPS = 12, 5
# parts of 256 rows: sixteen of unequal size, one of 1 row, the last of 7
FILE_ROWS = (
    1000,
    700,
    1,
    512,
    300,
    519,
)

NO_LOSS = "no learned token within max_length"


def config_for(folder: Path, **sections: Any) -> Config:
    base: dict[str, Any] = {
        "run": {"storage": str(folder / "storage")},
        "examples": {"files": [str(folder / "raw")], "rows_per_part": 256},
        "proxy": {"model": {"config": tiny.LLAMA}, "tokenizer": "bytes", "epochs": 1},
        "clusters": {"k": K, "tolerance": 0.0, "max_rounds": 25},
        "subset": {"budget": 333, "rows_per_file": 100},
    }
    return Config.model_validate(
        {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Committed examples of real rows, and trajectories of the same parts with losses drawn around
    a few shapes.
    """
    folder = tmp_path_factory.mktemp("shards")
    for number, rows in enumerate(FILE_ROWS):
        made = [
            {**row, "grade": number + 0.5, "tags": ["a", row["source"]]}
            for row in tiny.rows(rows, seed=number)
        ]
        tiny.write_jsonl(folder / "raw" / f"{number}.jsonl", made)
    config = config_for(folder)
    files = find_files(config.examples.files, None)
    ranges = part_ranges(files, [index_file(file, 256) for file in files])
    artifact = Artifact(Store(config.run.storage), "examples", "e")
    manifest = commit(artifact, examples.make(Work(config, artifact, {}, {}, "run", ranges)))
    return {"examples": manifest, "trajectories": make_trajectories(artifact, manifest)}


def make_trajectories(source: Artifact, manifest: Manifest) -> Manifest:
    artifact = Artifact(source.store, "trajectories", "t")
    numbers = np.random.default_rng(1)
    shapes = numbers.uniform(1, 6, (9, STEPS)).cumsum(axis=1)[:, ::-1] / 3
    parts, sources = [], Counter[str]()
    for part in manifest.parts:
        rows = source.read_part(part, ["example_id", "source"])
        scored = numbers.random(part.rows) < 0.93
        if part.rows == 1:
            # a part without any trajectory
            scored[:] = False
        losses = shapes[numbers.choice(9, part.rows, p=np.arange(1, 10) / 45)] + numbers.normal(
            0, 0.2, (part.rows, STEPS)
        )
        # step 0 comes first
        losses = np.concatenate([losses[:, :1], losses], axis=1)
        reasons = np.where(scored, None, NO_LOSS)
        columns = {
            "example_id": rows["example_id"],
            "source": rows["source"],
            "num_tokens": pa.array(np.full(part.rows, 9, np.int32), mask=~scored),
            "losses": vector_column(scored, losses),
            "reason": pa.array(reasons.tolist(), pa.string()),
        }
        data = parquet_bytes(pa.table(columns, schema=trajectories_schema(STEPS + 1)))
        parts.append(
            artifact.write_part(
                part.index, part.rows, {"data": (".parquet", data)}, "node", "run", {}
            )
        )
        sources.update(rows.filter(pa.array(scored))["source"].to_pylist())
    info = info_with(
        TrajectoriesInfo,
        scored=sum(sources.values()),
        sources=dict(sources),
        steps=[[0, step] for step in range(STEPS + 1)],
    )
    return commit(artifact, Outcome(parts, info=info))


def artifact_of(source: dict[str, Manifest], stage: str, config: Config) -> Artifact:
    return Artifact(Store(config.run.storage), stage, source[stage].fingerprint)


@pytest.fixture
def config(source: dict[str, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_for(next(tmp_path_factory.getbasetemp().glob("shards*")))


def cluster(
    source: dict[str, Manifest],
    config: Config,
    name: str,
    shards: int = 2,
    parts: list[Part] | None = None,
) -> Manifest:
    """Make clusters under a name of their own, handing the parts over in the given order."""
    trajectories = replace(source["trajectories"], parts=parts or source["trajectories"].parts)
    artifact = Artifact(Store(config.run.storage), "clusters", name)
    inputs = {"trajectories": artifact_of(source, "trajectories", config)}
    return commit(
        artifact,
        clusters.make(
            Work(
                config,
                artifact,
                inputs,
                {"trajectories": trajectories},
                "run",
                request=Request("actors", shards, all_at_once=True),
            )
        ),
    )


def choose(
    source: dict[str, Manifest], config: Config, name: str, grouped: Manifest | None = None
) -> Manifest:
    """Make a subset under a name of its own."""
    manifests = {**source} if grouped is None else {**source, "clusters": grouped}
    inputs = {
        stage: Artifact(Store(config.run.storage), stage, m.fingerprint)
        for stage, m in manifests.items()
    }
    artifact = Artifact(Store(config.run.storage), "subset", name)
    return commit(artifact, subset.make(Work(config, artifact, inputs, manifests, "run")))


def contents(manifest: Manifest, config: Config) -> dict[str, bytes]:
    """Name -> bytes of all data files of the parts."""
    artifact = Artifact(Store(config.run.storage), manifest.stage, manifest.fingerprint)
    return {
        entry.name: artifact.read(entry.name)
        for part in manifest.parts
        for entry in part.files.values()
    }


@pytest.fixture(scope="module")
def alone(
    source: dict[str, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, Manifest]:
    """Clusters and subset by one shard, never disturbed."""
    config = config_for(next(tmp_path_factory.getbasetemp().glob("shards*")))
    grouped = cluster(source, config, "alone", shards=1)
    return grouped, choose(source, config, "alone", grouped)


def assert_same(config: Config, alone: tuple[Manifest, Manifest], *others: Manifest) -> None:
    for manifest, other in zip(alone, others, strict=False):
        assert contents(other, config) == contents(manifest, config)
    facts = (
        "centroids",
        "cluster_sources",
        "sizes",
        "objective",
        "objectives",
        "moves",
        "reseeded",
        "converged",
    )
    assert {name: others[0].info[name] for name in facts} == {
        name: alone[0].info[name] for name in facts
    }


# --------------------------------------------------------------------------- the same bytes, always


def test_the_data_are_as_told(
    source: dict[str, Manifest], alone: tuple[Manifest, Manifest]
) -> None:
    rows = [part.rows for part in source["trajectories"].parts]
    assert len(rows) == 15
    assert rows[-1] == 7
    assert len(set(rows)) > 5
    grouped = alone[0].info
    assert len(grouped["objectives"]) > 8, "too few rounds to interrupt"
    assert sum(grouped["sizes"]) == source["trajectories"].info["scored"] < sum(rows)
    assert min(grouped["sizes"]) > 0


@pytest.mark.parametrize("shards", [2, 5, 13])
def test_any_number_of_shards_gives_the_same_bytes(
    source: dict[str, Manifest],
    config: Config,
    alone: tuple[Manifest, Manifest],
    shards: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    enter = ShardActors.__enter__
    monkeypatch.setattr(
        ShardActors, "__enter__", lambda self: started.append(len(self.actors)) or enter(self)
    )
    grouped = cluster(source, config, f"shards-{shards}", shards)
    assert started == [shards]
    assert_same(config, alone, grouped, choose(source, config, f"shards-{shards}", grouped))


def test_parts_in_any_order_give_the_same_bytes(
    source: dict[str, Manifest], config: Config, alone: tuple[Manifest, Manifest]
) -> None:
    parts = source["trajectories"].parts
    shuffled = [parts[number] for number in np.random.default_rng(0).permutation(len(parts))]
    grouped = cluster(source, config, "shuffled", shards=3, parts=shuffled)
    assert_same(config, alone, grouped, choose(source, config, "shuffled", grouped))


class Interrupted(Exception):
    """Stands for the death of the driver."""


def watch(monkeypatch: pytest.MonkeyPatch, at: int, act: Any) -> list[type[Query[Any, Any]]]:
    """The kinds of all queries, in order; before the given LloydStep, `act(shards)` happens."""
    queries: list[type[Query[Any, Any]]] = []
    ask = ShardActors.ask

    def watched(self: ShardActors, query: InView[Any]) -> Any:
        queries.append(type(query.query))
        if isinstance(query.query, LloydStep) and queries.count(LloydStep) == at:
            act(self)
        return ask(self, query)

    monkeypatch.setattr(ShardActors, "ask", watched)
    return queries


def test_a_shard_that_dies_between_rounds_changes_nothing(
    source: dict[str, Manifest],
    config: Config,
    alone: tuple[Manifest, Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = watch(monkeypatch, 5, lambda shards: ray.kill(shards.actors[1], no_restart=False))
    grouped = cluster(source, config, "killed", shards=3)
    assert calls.count(LloydStep) > 5
    assert_same(config, alone, grouped)


def test_shards_in_a_deep_tree_give_the_same_bytes_whoever_dies(
    source: dict[str, Manifest],
    config: Config,
    alone: tuple[Manifest, Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reduction, "FAN_IN", 2)
    answers: Counter[int] = Counter()
    merged = reduction._merged

    class Counting:
        """Counts the answers that every merging task gets."""

        @staticmethod
        def remote(query: Any, *of_shards: Any) -> Any:
            answers[len(of_shards)] += 1
            return merged.remote(query, *of_shards)

    monkeypatch.setattr(reduction, "_merged", Counting)
    assert_same(config, alone, cluster(source, config, "tree", shards=12))
    assert set(answers) == {1, 2}

    def kill(shards: Any) -> None:
        for number in (0, 3, 11):
            ray.kill(shards.actors[number], no_restart=False)

    calls = watch(monkeypatch, 5, kill)
    assert_same(config, alone, cluster(source, config, "tree-killed", shards=12))
    assert calls.count(LloydStep) > 5


def test_what_a_shard_refuses_passes_through_the_tree(
    source: dict[str, Manifest], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "FAN_IN", 2)
    *parts, last = source["trajectories"].parts
    changed = replace(last, files={"data": replace(last.files["data"], sha256="0")})
    with pytest.raises(UserError, match="expected SHA-256 0, got"):
        cluster(source, config, "damaged", shards=len(parts) + 1, parts=[*parts, changed])


def test_kmeans_goes_on_after_the_last_stored_round(
    source: dict[str, Manifest],
    config: Config,
    alone: tuple[Manifest, Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as first:
        watch(first, 6, die)
        with pytest.raises(Interrupted):
            cluster(source, config, "resumed", shards=2)
    state = json.loads(
        Artifact(Store(config.run.storage), "clusters", "resumed").read(clusters.state_name(None))
    )
    assert len(state["history"]) == 5
    calls = watch(monkeypatch, -1, None)
    grouped = cluster(source, config, "resumed", shards=5)
    rounds = len(alone[0].info["objectives"])
    # the last one assigns all rows to the final centroids
    assert calls.count(LloydStep) == rounds - 5 + 1
    assert SmallestHashes not in calls
    assert_same(config, alone, grouped)


def test_parts_written_before_a_death_are_kept(
    source: dict[str, Manifest],
    config: Config,
    alone: tuple[Manifest, Manifest],
    monkeypatch: pytest.MonkeyPatch,
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
            cluster(source, config, "half", shards=2)
    place = Path(config.run.storage) / "clusters" / "half"
    # a part counts once it has its receipt
    finished = [path.stem for path in (place / "receipts").iterdir()]
    times = {
        path: path.stat().st_mtime_ns for stem in finished for path in place.glob(f"data/{stem}-*")
    }
    assert len(times) >= 4
    grouped = cluster(source, config, "half", shards=2)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert_same(config, alone, grouped)


# ------------------------------------------------------------------------- which rows, and how many


def rows_of(manifest: Manifest, config: Config) -> pa.Table:
    artifact = Artifact(Store(config.run.storage), manifest.stage, manifest.fingerprint)
    return pa.concat_tables([artifact.read_part(part) for part in manifest.parts])


def expected_ids(
    groups: np.ndarray, ids: np.ndarray, budget: int, draw: str, seed: int
) -> list[int]:
    """The paper's rule in a loop: smallest group first, an equal share of what is left, by keyed
    hash inside a group.
    """
    names = sorted(set(groups.tolist()) - {-1}, key=lambda name: ((groups == name).sum(), name))
    chosen: list[int] = []
    for done, name in enumerate(names):
        members = ids[groups == name]
        share = (budget - len(chosen)) // (len(names) - done)
        chosen += members[np.argsort(keyed_hash(draw, seed, members))][:share].tolist()
    return sorted(chosen)


@pytest.mark.parametrize("rule", ["s2l", "random", "source_balanced"])
@pytest.mark.parametrize("budget", [1, 200, 1234, 0.29, 1.0], ids=str)
def test_the_budget_is_spent_exactly_on_the_rows_of_the_rule(
    source: dict[str, Manifest],
    config: Config,
    alone: tuple[Manifest, Manifest],
    rule: str,
    budget: float,
) -> None:
    changed = config.model_copy(
        update={
            "subset": config.subset.model_copy(
                update={"rule": rule, "budget": budget, "seed": 4, "rows_per_file": 77}
            )
        }
    )
    grouped = alone[0] if rule == "s2l" else None
    manifest = choose(source, changed, f"{rule}-{budget}", grouped)
    table = rows_of(manifest, config)
    trajectories = rows_of(source["trajectories"], config)
    scored = trajectories["reason"].is_null().to_numpy()
    eligible = int(scored.sum())
    assert table.num_rows == (
        budget if isinstance(budget, int) else int(Fraction(str(budget)) * eligible)
    )
    groups = {
        "s2l": rows_of(alone[0], config)["cluster"].fill_null(-1).to_numpy(),
        "random": np.zeros(len(scored), int),
        "source_balanced": np.unique(trajectories["source"].to_pylist(), return_inverse=True)[1],
    }[rule]
    expected = expected_ids(
        np.where(scored, groups, -1),
        trajectories["example_id"].to_numpy(),
        table.num_rows,
        f"subset by {RULES[rule].group}; hash; smallest",
        4,
    )
    assert table["example_id"].to_pylist() == expected
    assert [part.rows for part in manifest.parts[:-1]] == [77] * (len(manifest.parts) - 1)
    cluster_of = dict(zip(trajectories["example_id"].to_pylist(), groups.tolist(), strict=True))
    wanted = [cluster_of[i] if rule == "s2l" else None for i in expected]
    assert table["cluster"].to_pylist() == wanted


def test_rows_are_whole_and_jsonl_says_the_same(
    source: dict[str, Manifest], config: Config, alone: tuple[Manifest, Manifest]
) -> None:
    artifact = Artifact(Store(config.run.storage), "subset", "alone")
    raw = {}
    for number, file in enumerate(find_files(config.examples.files, None)):
        raw.update(
            {
                (number << 40) + n: json.loads(line)
                for n, line in enumerate(Path(file.uri).read_text().splitlines())
            }
        )
    for part in alone[1].parts:
        rows = artifact.read_part(part).to_pylist()
        lines = artifact.read_file(part.files["jsonl"]).decode().splitlines()
        assert [json.loads(line) for line in lines] == rows
        for row in rows:
            added = {name: row.pop(name) for name in ("example_id", "cluster")}
            assert row == raw[added["example_id"]]
    info = alone[1].info
    assert sum(after for _, after in info["sources"].values()) == 333
    assert sum(info["quotas"]) == info["budget"] == 333


def test_a_budget_above_the_scored_rows_is_refused(
    source: dict[str, Manifest], config: Config, alone: tuple[Manifest, Manifest]
) -> None:
    rows = sum(part.rows for part in source["trajectories"].parts)
    greedy = config.model_copy(update={"subset": config.subset.model_copy(update={"budget": rows})})
    with pytest.raises(UserError, match=r"only \d+ can be chosen"):
        choose(source, greedy, "greedy", alone[0])


def test_more_clusters_than_distinct_trajectories_are_refused(
    source: dict[str, Manifest], config: Config
) -> None:
    scored = source["trajectories"].info["scored"]
    many = config.model_copy(
        update={"clusters": config.clusters.model_copy(update={"k": scored + 1})}
    )
    with pytest.raises(UserError, match="Lower k"):
        cluster(source, many, "many")
