"""Every named rule, from stored parts to chosen rows, against a few lines of numpy written apart from it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.config import FACILITY_LOCATION, RULES, Config, load
from s2l_ray.contract.work import Work, part_dict
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.selection.draw import Keys, draw, needs, quotas
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from s2l_ray.edge.parts import PartContext
from s2l_ray.errors import UserError
from s2l_ray.stages.subset.make import make as subset
from tests import synthetic

ROWS, STEPS, BUDGET, SEED = 900, 5, 240, 3
SOURCES = ["math/a", "chat", "code"]
MISSING = "no learned token"
BASE: dict[str, Any] = {
    "examples": {"files": ["none"]},
    "proxy": {"model": {"config": {"model_type": "llama"}}, "tokenizer": "bytes", "epochs": 1},
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two proxies of 5 steps; a ninth of the rows could not be scored, two clusters are tiny."""
    folder = str(tmp_path_factory.mktemp("rules"))
    synthetic.build(
        folder,
        ROWS,
        rows_per_part=128,
        steps=STEPS,
        sources=SOURCES,
        clusters=7,
        members=2,
        change=without_some,
    )
    return folder


def without_some(stage: str, table: pa.Table) -> pa.Table:
    ids = table["example_id"].to_numpy()
    missing = ids % 9 == 4
    if stage == "clusters":
        labels = np.where(
            ids < 3, 0, np.where(ids == 3, 1, np.maximum(table["cluster"].to_numpy(), 2))
        )
        table = table.set_column(1, "cluster", pa.array(labels.astype(np.int32)))
    if stage == "trajectories":
        reasons = pa.array(np.where(missing, MISSING, None).tolist(), pa.string())
        table = table.set_column(table.column_names.index("reason"), "reason", reasons)
    if stage == "examples":
        return table
    kept = ("example_id", "source", "reason")
    for place, name in enumerate(table.column_names):
        if name not in kept:
            column = table[name].combine_chunks()
            values = [
                None if gone else value
                for gone, value in zip(missing, column.to_pylist(), strict=True)
            ]
            table = table.set_column(place, name, pa.array(values, column.type))
    return table


def work_for(storage: str, rule: Any, **fields: Any) -> Work:
    config = Config.model_validate(
        {
            "run": {"storage": storage},
            **BASE,
            "trajectories": {"statistics": synthetic.STATISTICS},
            "subset": {"rule": rule, "budget": BUDGET, "seed": SEED, **fields},
        }
    )
    stages = ["examples", "trajectories"]
    stages += ["clusters"] if needs(config.subset) & {"cluster", "distance"} else []
    inputs = {stage: Artifact(Store(storage), stage, synthetic.NAME) for stage in stages}
    manifests = {stage: artifact.manifest() for stage, artifact in inputs.items()}
    return Work(config, Artifact(Store(storage), "subset", "s"), inputs, manifests, "run")


def chosen_ids(work: Work) -> tuple[list[int], list[float]]:
    """What the stage does, less Ray: ids of the chosen rows in order, and their scores."""
    reading = subset.reading_of(work)
    context = PartContext(work.config, work.artifact, work.inputs, work.run)
    stages = list(work.manifests)
    parts = [
        {stage: part_dict(part) for stage, part in zip(stages, several, strict=True)}
        for several in zip(*(work.manifests[stage].parts for stage in stages), strict=True)
    ]
    rows = [subset.read_rows(context, reading, part) for part in parts]
    chunks = [
        Keys.of(own.points, np.zeros(len(own.points.groups), np.int32), len(reading.groups.names))
        for own in rows
    ]

    def ask(method: str, args: tuple[Any, ...]) -> Iterable[Any]:
        return [getattr(keys, method)(*args) for keys in chunks]

    sizes = np.sum([keys.sizes() for keys in chunks], axis=0)
    section = work.config.subset
    wanted = quotas(sizes, BUDGET, section.small_last, reading.groups.parents)
    drawn = draw(ask, sizes, wanted, reading.rule.take, sample=64, gathered=64)
    ids, scores = [], []
    for own, part in zip(rows, parts, strict=True):
        table = context.inputs["examples"].read_part(
            subset.part_from(part["examples"]), ["example_id"]
        )
        taken = drawn.chosen(own.points)
        ids += table["example_id"].to_numpy()[own.eligible][taken].tolist()
        scores += [] if own.scores is None else own.scores[taken].tolist()
    return ids, scores


class Stored:
    """All stored columns of the rows that were scored, as plain arrays; matrices are [n, member, step]."""

    def __init__(self, storage: str) -> None:
        tables = {}
        for stage in ("trajectories", "clusters"):
            artifact = Artifact(Store(storage), stage, synthetic.NAME)
            tables[stage] = pa.concat_tables(
                [artifact.read_part(part) for part in artifact.manifest().parts]
            )
        scored = tables["trajectories"]["reason"].is_null()
        t, c = tables["trajectories"].filter(scored), tables["clusters"].filter(scored)
        self.ids = np.array(t["example_id"].to_pylist())
        self.source = np.array(t["source"].to_pylist())
        self.num_tokens = np.array(t["num_tokens"].to_pylist(), float)
        self.cluster = np.array(c["cluster"].to_pylist())
        self.distance = np.array(c["distance"].to_pylist(), float)
        for name in ("losses", *synthetic.STATISTICS):
            setattr(self, name, np.array(t[name].to_pylist(), float).reshape(len(t), 2, STEPS))


def take_first(
    groups: np.ndarray, scores: np.ndarray, ids: np.ndarray, middle: bool = False
) -> set[int]:
    """Water-filling by hand over sorted groups, then a plain sort in each."""
    ties = keyed_hash(SEED, ids)
    members = {
        group: sorted(
            np.flatnonzero(groups == group).tolist(), key=lambda row: (scores[row], int(ties[row]))
        )
        for group in sorted(set(groups.tolist()))
    }
    left, chosen = BUDGET, set()
    order = sorted(members, key=lambda group: len(members[group]))
    for number, group in enumerate(order):
        quota = min(len(members[group]), left // (len(order) - number))
        first = (len(members[group]) - quota) // 2 if middle else 0
        chosen |= {int(ids[row]) for row in members[group][first : first + quota]}
        left -= quota
    return chosen


def ifd(rows: Any) -> np.ndarray:
    ratio = np.exp(rows.losses[:, :, -1] - rows.answer_loss[:, :, -1])
    return np.where(ratio < 1, -ratio, ratio).mean(axis=1)


BY_HAND: dict[str, Callable[[Any], np.ndarray]] = {
    "s2l": lambda rows: np.zeros(len(rows.ids)),
    "random": lambda rows: np.zeros(len(rows.ids)),
    "source_balanced": lambda rows: np.zeros(len(rows.ids)),
    "longest": lambda rows: -rows.num_tokens,
    "least_confidence": lambda rows: rows.mean_probability[:, :, -1].mean(axis=1),
    "middle_perplexity": lambda rows: np.exp(rows.losses[:, :, -1]).mean(axis=1),
    "high_learnability": lambda rows: (rows.losses[:, :, -1] - rows.losses[:, :, 0]).mean(axis=1),
    "el2n": lambda rows: -rows.el2n[:, :, -1].mean(axis=1),
    "grand": lambda rows: -rows.grand[:, :, -1].mean(axis=1),
    "variability": lambda rows: -rows.mean_probability[:, :, 1:].std(axis=2).mean(axis=1),
    "ifd": ifd,
    "medoid": lambda rows: rows.distance,
    "stable_in_cluster": lambda rows: (
        np.abs(np.diff(rows.losses[:, :, 1:])).sum(axis=2).mean(axis=1)
    ),
    "confidence_curriculum": lambda rows: -rows.mean_probability[:, :, 1:].mean(axis=(1, 2)),
}
BY_CLUSTER = ("s2l", "medoid", "stable_in_cluster")


@pytest.mark.parametrize("name", list(BY_HAND))
def test_a_rule_chooses_what_numpy_chooses(storage: str, name: str) -> None:
    rows = Stored(storage)
    groups = {**dict.fromkeys(BY_CLUSTER, rows.cluster), "source_balanced": rows.source}.get(
        name, np.zeros(len(rows.ids))
    )
    scores = BY_HAND[name](rows)
    ids, told = chosen_ids(work_for(storage, name))
    assert len(ids) == BUDGET
    assert ids == sorted(take_first(groups, scores, rows.ids, name == "middle_perplexity"))
    expected = (
        scores[np.isin(rows.ids, ids)] if name not in ("s2l", "random", "source_balanced") else []
    )
    np.testing.assert_allclose(told, expected, rtol=1e-6)


def test_s2l_within_sources_shares_over_sources_first(storage: str) -> None:
    rows = Stored(storage)
    ids, _ = chosen_ids(work_for(storage, "s2l_within_sources"))
    per_source = [int((rows.source[np.isin(rows.ids, ids)] == source).sum()) for source in SOURCES]
    assert sum(per_source) == BUDGET
    assert max(per_source) - min(per_source) <= 1  # every source has more than its share
    for source in SOURCES:
        mine = rows.source == source
        taken = [int(np.isin(rows.ids[mine & (rows.cluster == k)], ids).sum()) for k in range(7)]
        sizes = [int((mine & (rows.cluster == k)).sum()) for k in range(7)]
        assert taken == quotas(np.array(sizes), sum(taken)).tolist()


def test_clusters_within_sources_tell_the_source_themselves(storage: str) -> None:
    work = work_for(storage, "s2l_within_sources")
    clusters = work.manifests["clusters"]
    of = [SOURCES[number % 3] for number in range(7)]
    work.manifests["clusters"] = replace(clusters, info={**clusters.info, "cluster_sources": of})
    reading = subset.reading_of(work)
    assert list(reading.columns) == ["clusters"]
    assert reading.groups.names[:2] == ("math/a / 0", "chat / 1")
    ids, _ = chosen_ids(work)
    rows = Stored(storage)
    sizes = np.bincount(rows.cluster, minlength=7)
    parents = np.array([sorted(SOURCES).index(source) for source in of])
    taken = np.bincount(rows.cluster[np.isin(rows.ids, ids)], minlength=7)
    np.testing.assert_array_equal(taken, quotas(sizes, BUDGET, parents=parents))


def test_every_rule_has_a_test(storage: str) -> None:
    assert set(BY_HAND) | {"s2l_within_sources"} == set(RULES)
    assert FACILITY_LOCATION not in RULES


@pytest.mark.parametrize(("at", "column"), [("early", 1), ("late", 4), (2, 2), (0, 0)])
def test_at_says_which_step_one_shot_rules_look_at(storage: str, at: Any, column: int) -> None:
    rows = Stored(storage)
    ids, _ = chosen_ids(work_for(storage, "el2n", at=at))
    scores = -rows.el2n[:, :, column].mean(axis=1)
    assert ids == sorted(take_first(np.zeros(len(rows.ids)), scores, rows.ids))


def test_a_step_that_is_not_stored_is_told_with_those_that_are(storage: str) -> None:
    with pytest.raises(UserError, match="a stored step, 0, 1, 2, 3, 4; got 7"):
        chosen_ids(work_for(storage, "el2n", at=7))


def test_a_rule_of_ones_own_is_one_line(storage: str) -> None:
    job = load(None, ["--subset.rule={group: cluster, score: -num_tokens}"], BASE)
    rows = Stored(storage)
    ids, _ = chosen_ids(work_for(storage, job.first.subset.rule.model_dump()))  # type: ignore[union-attr]
    assert ids == sorted(take_first(rows.cluster, -rows.num_tokens, rows.ids))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("el2m", "subset.rule: there is no rule 'el2m'. Did you mean el2n?"),
        (
            "el2n",
            "subset.rule: 'el2n' reads el2n, which is not stored. Set trajectories.statistics to [grand, el2n]",
        ),
        ("{score: at(answer_loss) - at(el2n)}", "reads answer_loss, el2n, which is not stored"),
        ("{group: clusters}", "subset.rule.group: expected one of all; source; cluster;"),
        ("{group: source + cluster}", "subset.rule.group: expected one of"),
        (
            "{score: -num_token}",
            "subset.rule.score: there is no column 'num_token'. Did you mean num_tokens?",
        ),
        ("{score: loss}", "subset.rule.score: 'loss' has a value for every step"),
        ("{scores: hash}", "subset.rule.scores: unknown key. Did you mean score?"),
        ("{take: largest}", "subset.rule.take: input should be 'smallest' or 'middle'"),
        ("{score: 1}", "subset.rule.score: input should be a valid string"),
        ("[cluster, hash]", "subset.rule: input should be"),
    ],
)
def test_a_wrong_rule_is_refused_before_any_work(rule: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load(None, [f"--subset.rule={rule}", "--trajectories.statistics=[grand]"], BASE)
    assert words in str(error.value)
    assert "1 problem(s)" in str(error.value)


def test_infinities_are_first_and_last(storage: str) -> None:
    rows = Stored(storage)
    text = "where(num_tokens < 100, -1 / (distance - distance), where(num_tokens > 200, 1 / 0, distance))"
    ids, scores = chosen_ids(work_for(storage, {"group": "all", "score": text}))
    by_hand = np.where(
        rows.num_tokens < 100, -np.inf, np.where(rows.num_tokens > 200, np.inf, rows.distance)
    )
    assert ids == sorted(take_first(np.zeros(len(rows.ids)), by_hand, rows.ids))
    assert np.isneginf(scores).any()


def test_a_score_that_is_no_number_names_the_row_and_the_expression(storage: str) -> None:
    rows = Stored(storage)
    first = rows.ids[(rows.num_tokens == rows.num_tokens) & (rows.num_tokens > 390)][0]
    with pytest.raises(
        UserError, match=rf"'sqrt\(390 - num_tokens\)' is NaN .* example_id {first} first"
    ):
        chosen_ids(work_for(storage, {"score": "sqrt(390 - num_tokens)"}))


def test_a_statistic_that_a_scored_row_lacks_is_no_number_either(tmp_path: Path) -> None:
    def without_one(stage: str, table: pa.Table) -> pa.Table:
        if stage != "trajectories":
            return table
        values = [
            None if row == 7 else value for row, value in enumerate(table["grand"].to_pylist())
        ]
        place = table.column_names.index("grand")
        return table.set_column(place, "grand", pa.array(values, table["grand"].type))

    synthetic.build(str(tmp_path), ROWS, 1000, STEPS, change=without_one)
    with pytest.raises(UserError, match=r"'-at\(grand\)' is NaN .* 1 row.* example_id 7 first"):
        chosen_ids(work_for(str(tmp_path), "grand"))


@pytest.mark.parametrize("small", [0, 1, 2, 3])
def test_small_clusters_come_last_when_asked_for(storage: str, small: int) -> None:
    rows = Stored(storage)
    ids, _ = chosen_ids(work_for(storage, "s2l", small_last=small))
    taken = [int(np.isin(rows.ids[rows.cluster == cluster], ids).sum()) for cluster in (0, 1)]
    assert taken == [0 if size <= small else size for size in (3, 1)]
    assert len(ids) == BUDGET
