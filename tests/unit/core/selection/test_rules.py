"""Every named rule, from stored parts to chosen rows, against a few lines of plain numpy."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.config import FACILITY_LOCATION, RULES, Config, Rule, Subset, expressions, load
from s2l_ray.contract.work import Work
from s2l_ray.core.hashing import keyed_hash
from s2l_ray.core.query import Query
from s2l_ray.core.selection.draw import draw
from s2l_ray.core.selection.keys import GroupSizes, Keys
from s2l_ray.core.selection.quotas import quotas
from s2l_ray.core.selection.rules import by_cluster, groups_of, needs, uses_at
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.manifest import Part
from s2l_ray.core.storage.records import from_json
from s2l_ray.core.storage.store import Store
from s2l_ray.edge.parts import PartContext
from s2l_ray.errors import UserError
from s2l_ray.stages.subset.rows import descriptors, row_reader
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
    stages += ["clusters"] if by_cluster(config.subset) else []
    inputs = {stage: Artifact(Store(storage), stage, synthetic.NAME) for stage in stages}
    manifests = {stage: artifact.manifest() for stage, artifact in inputs.items()}
    return Work(config, Artifact(Store(storage), "subset", "s"), inputs, manifests, "run")


def chosen_ids(work: Work) -> tuple[list[int], list[float]]:
    """What the stage does, less Ray: ids of the chosen rows in order, and their scores."""
    reader = row_reader(work)
    context = PartContext(work.config, work.artifact, work.inputs, work.run)
    parts = descriptors(work, work.manifests)
    rows = [reader.read(context, part) for part in parts]
    chunks = [
        Keys.of(own.points, np.zeros(len(own.points.groups), np.int32), len(reader.groups.names))
        for own in rows
    ]

    def ask(query: Query[Keys, Any], /) -> Any:
        return query.merge([query.of(keys) for keys in chunks])

    sizes = ask(GroupSizes())
    section = work.config.subset
    wanted = quotas(sizes, BUDGET, section.small_last, reader.groups.parents)
    drawn = draw(ask, sizes, wanted, reader.rule.take, sample=64, gathered=64)
    ids, scores = [], []
    for own, part in zip(rows, parts, strict=True):
        mine = from_json(Part, part["examples"])
        table = context.inputs["examples"].read_part(mine, ["example_id"])
        taken = drawn.chosen(own.points)
        ids += table["example_id"].to_numpy()[own.eligible][taken].tolist()
        scores += [] if own.scores is None else own.scores[taken].tolist()
    return ids, scores


class Stored:
    """All stored columns of the rows that were scored, as plain arrays.

    Matrices are [n, member, step].
    """

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
    draw: str, groups: np.ndarray, scores: np.ndarray, ids: np.ndarray, middle: bool = False
) -> set[int]:
    """Water-filling by hand over sorted groups, then a plain sort in each."""
    ties = keyed_hash(f"subset by {draw}", SEED, ids)
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
    ratio = rows.losses[:, :, -1] / rows.answer_loss[:, :, -1]
    return np.where(ratio <= 1, -ratio, ratio).mean(axis=1)


def superfiltering(rows: Any) -> np.ndarray:
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
    "superfiltering": superfiltering,
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
    ids, found = chosen_ids(work_for(storage, name))
    assert len(ids) == BUDGET
    rule = RULES[name]
    draw = f"{rule.group}; {rule.score}; {rule.take}"
    assert ids == sorted(take_first(draw, groups, scores, rows.ids, rule.take == "middle"))
    expected = (
        scores[np.isin(rows.ids, ids)] if name not in ("s2l", "random", "source_balanced") else []
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_s2l_within_sources_shares_over_sources_first(storage: str) -> None:
    rows = Stored(storage)
    ids, _ = chosen_ids(work_for(storage, "s2l_within_sources"))
    per_source = [int((rows.source[np.isin(rows.ids, ids)] == source).sum()) for source in SOURCES]
    assert sum(per_source) == BUDGET
    # every source has more than its share
    assert max(per_source) - min(per_source) <= 1
    for source in SOURCES:
        mine = rows.source == source
        taken = [int(np.isin(rows.ids[mine & (rows.cluster == k)], ids).sum()) for k in range(7)]
        sizes = [int((mine & (rows.cluster == k)).sum()) for k in range(7)]
        assert taken == quotas(np.array(sizes), sum(taken)).tolist()


def test_clusters_within_sources_need_no_column_of_sources(storage: str) -> None:
    work = work_for(storage, "s2l_within_sources")
    clusters = work.manifests["clusters"]
    of = [SOURCES[number % 3] for number in range(7)]
    work.manifests["clusters"] = replace(clusters, info={**clusters.info, "cluster_sources": of})
    reader = row_reader(work)
    assert list(reader.columns) == ["clusters"]
    assert reader.groups.names[:2] == ("math/a / 0", "chat / 1")
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
    assert ids == sorted(
        take_first("all; -at(el2n); smallest", np.zeros(len(rows.ids)), scores, rows.ids)
    )


def test_subsets_of_two_rules_meet_by_chance_and_paired_ones_wherever_they_can(
    storage: str,
) -> None:
    rows = Stored(storage)
    everyone = np.ones(len(rows.ids))
    names = {"random": everyone, "s2l": rows.cluster, "source_balanced": rows.source}

    def shared(paired: bool) -> dict[str, int]:
        chosen = {
            name: set(chosen_ids(work_for(storage, name, paired=paired))[0]) for name in names
        }
        # The same rule under another name draws the same rows.
        own = {"group": "all", "score": "hash"}
        assert set(chosen_ids(work_for(storage, own, paired=paired))[0]) == chosen["random"]
        return {
            f"{a}, {b}": len(chosen[a] & chosen[b]) for a, b in itertools.combinations(names, 2)
        }

    def share(groups: np.ndarray) -> np.ndarray:
        """The probability with which each row is chosen."""
        _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        return (quotas(sizes, BUDGET) / sizes)[numbers]

    apart, together = shared(False), shared(True)
    for a, b in itertools.combinations(names, 2):
        chances = share(names[a]) * share(names[b])
        deviation = np.sqrt((chances * (1 - chances)).sum())
        assert abs(apart[f"{a}, {b}"] - chances.sum()) < 3 * deviation
        assert together[f"{a}, {b}"] > chances.sum() + 6 * deviation


def test_a_step_that_is_not_stored_is_refused_with_those_that_are(storage: str) -> None:
    with pytest.raises(UserError, match="a stored step, 0, 1, 2, 3, 4; got 7"):
        chosen_ids(work_for(storage, "el2n", at=7))


def test_a_rule_of_ones_own_is_one_line(storage: str) -> None:
    job = load(None, ["--subset.rule={group: cluster, score: -num_tokens}"], BASE)
    rows = Stored(storage)
    ids, _ = chosen_ids(work_for(storage, job.first.subset.rule.model_dump()))  # type: ignore[union-attr]
    assert ids == sorted(
        take_first("cluster; -num_tokens; smallest", rows.cluster, -rows.num_tokens, rows.ids)
    )


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("el2m", "subset.rule: there is no rule 'el2m'. Did you mean el2n?"),
        (
            "el2n",
            "subset.rule: 'el2n' reads el2n, which is not stored. "
            "Set trajectories.statistics to [grand, el2n]",
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
    text = (
        "where(num_tokens < 100, -1 / (distance - distance), "
        "where(num_tokens > 200, 1 / 0, distance))"
    )
    ids, scores = chosen_ids(work_for(storage, {"group": "all", "score": text}))
    by_hand = np.where(
        rows.num_tokens < 100, -np.inf, np.where(rows.num_tokens > 200, np.inf, rows.distance)
    )
    assert ids == sorted(
        take_first(f"all; {text}; smallest", np.zeros(len(rows.ids)), by_hand, rows.ids)
    )
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


# ------------------------------------------------------------------------------- groups and columns


def test_groups_have_numbers_and_names() -> None:
    sources, clusters = np.array([0, 1, 1]), np.array([2, 0, 2])

    def of(group: str, cluster_sources: list[str] | None = None) -> tuple[list[int], list[str]]:
        made = groups_of(Rule(group=group), ["a", "b"], 3, cluster_sources)
        return np.broadcast_to(made.numbers(sources, clusters), 3).tolist(), list(made.names)

    assert of("all") == ([0, 0, 0], ["all"])
    assert of("source") == ([0, 1, 1], ["a", "b"])
    assert of("cluster") == ([2, 0, 2], ["0", "1", "2"])
    pairs = ["a / 0", "a / 1", "a / 2", "b / 0", "b / 1", "b / 2"]
    assert of("(source, cluster)") == of("source/cluster") == ([2, 3, 5], pairs)
    # clusters within sources are pairs by themselves
    assert of("source / cluster", ["b", "b", "a"]) == ([2, 0, 2], ["b / 0", "b / 1", "a / 2"])
    nested = groups_of(Rule(group="source / cluster"), ["a", "b"], 3, ["b", "b", "a"])
    assert nested.parents is not None
    assert nested.parents.tolist() == [1, 1, 0]
    assert groups_of(Rule(group="(source, cluster)"), ["a", "b"], 3, None).parents is None


@pytest.mark.parametrize(
    ("rule", "columns"),
    [
        ("s2l", {"cluster"}),
        ("s2l_within_sources", {"source", "cluster"}),
        ("random", set()),
        ("source_balanced", {"source"}),
        ("longest", {"num_tokens"}),
        ("ifd", {"losses", "answer_loss"}),
        ("medoid", {"cluster", "distance"}),
        ("facility_location", {"losses"}),
        (Rule(group="source", score="at(el2n) * distance"), {"source", "el2n", "distance"}),
    ],
)
def test_a_rule_reads_no_more_columns_than_it_names(rule: str | Rule, columns: set[str]) -> None:
    assert needs(Subset(rule=rule)) == columns


def test_only_some_rules_look_at_one_step() -> None:
    assert uses_at(Subset(rule="el2n"))
    assert not uses_at(Subset(rule="variability"))
    assert not uses_at(Subset(rule="facility_location"))


def test_ifd_and_superfiltering_rank_as_their_authors_do() -> None:
    """Four rows by hand: equal differences of losses, and ratios that differ."""
    losses, alone = np.array([0.5, 2.0, 1.5, 3.0]), np.array([1.0, 2.5, 1.5, 2.0])
    arrays = {"loss": losses[:, None], "answer_loss": alone[:, None]}
    columns = expressions.Columns(arrays, num_rows=4, num_steps=1, at=0)
    scores = {n: expressions.parse(RULES[n].score)(columns) for n in ("ifd", "superfiltering")}
    # data_by_IFD.py: 1.0, 0.8, 0.5; 1.5 is left out.
    assert np.argsort(scores["ifd"]).tolist() == [2, 1, 0, 3]
    # select_data.py: exp(-0.5) twice; 1.0 and e are left out.
    assert scores["superfiltering"][0] == scores["superfiltering"][1] == -np.exp(-0.5)
    assert np.argsort(scores["superfiltering"])[2:].tolist() == [2, 3]
