"""The report page: its sections, hostile text stays text, nothing is loaded from outside."""

import base64
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from s2l_ray.core.report.data import (
    ClusterExample,
    Clustering,
    Evaluation,
    LeftOut,
    LossCurve,
    ReportData,
    StageCost,
    Subset,
)
from s2l_ray.core.report.page import render
from s2l_ray.core.storage.info import Moved

HOSTILE = (
    '<script>alert("x")</script><img src=http://evil.example/a.png> & '
    "$\\frac{1}$ \x00\x1b\u4e2d\u6587"
)
SHORT = (
    # what is cut for a picture still has all that could break one
    "$\\frac{1$ \x00\x1b</text>&"
)
SECTIONS = ("variants", "sources", "clusters", "proxy", "left-out", "costs", "examples", "versions")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects ids, tags with attributes and visible text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.bold: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if "style" not in self.open:
            self.words += text
        if self.open and self.open[-1] == "td" and "best" in (self.tags[-1][1].get("class") or ""):
            self.bold.append(text)

    def pictures(self) -> list[str]:
        uris = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(uri.startswith("data:image/svg+xml;base64,") for uri in uris)
        return [base64.b64decode(uri.partition(",")[2]).decode() for uri in uris]


def clustering(
    num_clusters: int, num_steps: int, sources: Sequence[str], **changes: object
) -> Clustering:
    rng = np.random.default_rng(num_clusters)
    mean = rng.uniform(0.5, 3.0, (num_clusters, num_steps))
    source_sizes = rng.integers(0, 900, (len(sources), num_clusters))
    sizes = source_sizes.sum(axis=0)
    members = [
        ClusterExample(
            cluster=k,
            example_id=k << 40,
            source=sources[0],
            prompt=f"prompt {k}",
            completion="answer",
            distance=0.5,
        )
        for k in range(num_clusters)
    ]
    values: dict = {
        "variant": "s2l",
        "steps": range(100, 100 * num_steps + 1, 100),
        "mean": mean,
        "low": mean - 0.2,
        "high": mean + 0.3,
        "band": "10 to 90 % of its examples",
        "sizes": sizes,
        "quotas": np.minimum(sizes, 400),
        "objective": [9e4, 8e4, 7.5e4],
        "sources": sources,
        "source_sizes": source_sizes,
        "examples": members,
    }
    return Clustering(**values | changes)


def full_data(
    num_clusters: int = 5, num_steps: int = 4, sources: Sequence[str] = ("gsm", "camel", "aqua")
) -> ReportData:
    losses = {"full": 1.25, "random": 2.5, "s2l": 1.0}
    return ReportData(
        run="demo",
        created="2025-01-02 03:04 UTC",
        num_examples=1_234_567,
        versions={"ray": "2.60.0"},
        subsets=[
            Subset(
                variant="random",
                rule="random",
                num_examples=30_000,
                uri="s3://b/r",
                source_sizes=[9] * len(sources),
            ),
            Subset(
                variant="s2l",
                rule="s2l",
                num_examples=30_000,
                uri="/tmp/x/subset/ab",
                source_sizes=[5] * len(sources),
            ),
        ],
        sources=sources,
        source_sizes=[1000 // (i + 1) for i in range(len(sources))],
        proxies=[LossCurve(label="proxy", steps=range(1, 1301), losses=np.linspace(3, 1, 1300))],
        clusterings=[clustering(num_clusters, num_steps, sources)],
        left_out=[
            LeftOut(stage="examples", reason="broken JSON", count=4321, examples=["data.jsonl:17"])
        ],
        evaluations=[
            Evaluation(
                variant=name,
                num_examples=30_000,
                target_steps=1500,
                metrics={
                    "loss": dict.fromkeys(sources, loss),
                    "exact": dict.fromkeys(sources, loss / 4),
                },
            )
            for name, loss in losses.items()
        ],
        stages=[
            StageCost(stage="examples", variant="", reused=True, rows=1_234_567, seconds=4.5),
            StageCost(
                stage="target",
                variant="s2l",
                reused=False,
                rows=30_000,
                seconds=3700.0,
                flops=4.4e18,
            ),
        ],
    )


def evaluated(evaluations: Sequence[Evaluation]) -> ReportData:
    return ReportData(run="demo", created="now", num_examples=10, evaluations=evaluations)


def test_every_section_appears_when_its_data_are_there() -> None:
    page = Page(render(full_data()))
    assert sorted(page.ids) == sorted(SECTIONS)
    for text in (
        "1,234,567",
        "30,000",
        "2.43 %",
        "/tmp/x/subset/ab",
        "4,321",
        "data.jsonl:17",
        "1 h 01 min",
        "4.4 EFLOP",
    ):
        assert text in page.words


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"evaluations": ()}, {"variants"}),
        ({"sources": (), "source_sizes": ()}, {"sources"}),
        ({"subsets": ()}, {"sources"}),
        ({"clusterings": ()}, {"clusters", "examples"}),
        ({"proxies": ()}, {"proxy"}),
        ({"left_out": ()}, {"left-out"}),
        ({"stages": ()}, {"costs"}),
        ({"versions": {}}, {"versions"}),
    ],
)
def test_a_section_and_its_link_go_when_its_data_are_not_there(
    changes: dict, missing: set[str]
) -> None:
    page = Page(render(replace(full_data(2, 2, ("gsm",)), **changes)))
    assert set(page.ids) == set(SECTIONS) - missing
    links = {(attributes["href"] or "")[1:] for tag, attributes in page.tags if tag == "a"}
    assert links == set(page.ids)


def test_a_run_of_nothing_renders() -> None:
    page = Page(render(ReportData(run="empty", created="now", num_examples=0)))
    assert page.ids == []
    assert page.pictures() == []


def test_hostile_text_is_shown_and_never_interpreted() -> None:
    data = full_data(sources=(HOSTILE, SHORT, ""))
    member = ClusterExample(
        cluster=0, example_id=1, source=HOSTILE, prompt=HOSTILE, completion=HOSTILE
    )
    data = replace(
        data,
        run=HOSTILE,
        subsets=[replace(data.subsets[0], variant=HOSTILE, rule=HOSTILE, uri=HOSTILE)],
        proxies=[replace(data.proxies[0], label=SHORT), data.proxies[0]],
        clusterings=[
            replace(data.clusterings[0], variant=HOSTILE, band=HOSTILE, examples=[member])
        ],
        left_out=[LeftOut(stage=HOSTILE, reason=HOSTILE, count=1, examples=[HOSTILE + "\ud800"])],
        evaluations=[replace(data.evaluations[0], variant=HOSTILE)],
        stages=[replace(data.stages[1], stage=SHORT, variant=HOSTILE)],
        versions={HOSTILE: HOSTILE},
    )
    text = render(data)
    # a lone surrogate would stop the write
    text.encode("utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.words.count('<script>alert("x")</script>') >= 8
    assert "\u4e2d\u6587" in page.words
    assert "\x00" not in text
    for svg in page.pictures():
        assert "script" not in {
            element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()
        }


def test_the_page_needs_nothing_from_outside() -> None:
    text = render(full_data(sources=("http://a.example/x", "camel", "aqua")))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text
    for svg in page.pictures():
        assert not re.search(r"""(href|src)\s*=\s*["'](?!#|data:)""", svg)


@pytest.mark.parametrize(
    ("num_clusters", "num_steps", "num_sources"),
    [(1, 1, 1), (2, 1, 1), (1, 12, 2), (7, 3, 45), (36, 3, 2), (300, 12, 3)],
)
def test_any_shape_renders_without_nan(num_clusters: int, num_steps: int, num_sources: int) -> None:
    sources = [f"source {i}" for i in range(num_sources)]
    page = Page(render(full_data(num_clusters, num_steps, sources)))
    assert not re.search(r"\b(nan|inf|None)\b", page.words)
    for svg in page.pictures():
        assert not re.search(r"\b(nan|inf)\b", svg)
        ElementTree.fromstring(svg)
    assert page.words.count("prompt ") == num_clusters


def test_beyond_36_clusters_the_largest_get_panels() -> None:
    sizes = 1000 + np.arange(37)
    shape = clustering(37, 2, ("a",), sizes=sizes, quotas=None, source_sizes=None, objective=())
    page = Page(render(ReportData(run="demo", created="now", num_examples=10, clusterings=[shape])))
    assert "Trajectories of the 36 largest clusters" in page.words
    _, panels = page.pictures()
    assert ">1,036</text>" in panels
    assert ">1,001</text>" in panels
    assert ">1,000</text>" not in panels


def test_missing_and_undefined_numbers_are_dashes() -> None:
    data = full_data()
    mean = np.array(data.clusterings[0].mean)
    # an empty cluster
    mean[2] = np.nan
    empty = np.where(np.arange(5) == 2, 0, 7)
    shape = clustering(
        5,
        4,
        data.sources,
        mean=mean,
        low=mean,
        high=mean,
        sizes=empty,
        quotas=empty,
        objective=(),
        source_sizes=None,
    )
    evaluations = [
        Evaluation(
            variant="full",
            num_examples=1,
            target_steps=1,
            metrics={"loss": {"gsm": float("nan"), "camel": 1.0, "aqua": 5.0}},
        ),
        Evaluation(
            variant="s2l",
            num_examples=1,
            target_steps=1,
            metrics={"loss": {"gsm": 0.2, "camel": 2.0, "aqua": None}},
        ),
    ]
    stages = [StageCost(stage="report", variant="", reused=False)]
    page = Page(render(replace(data, clusterings=[shape], evaluations=evaluations, stages=stages)))
    assert not re.search(r"\b(nan|inf|None)\b", page.words)
    assert not any(re.search(r"\b(nan|inf)\b", svg) for svg in page.pictures())
    assert "mean loss \u2013 to \u2013" in page.words
    assert "4 of the clusters whole" in page.words
    # only camel has a value for both
    assert "macro mean of 1 sources" in page.words
    assert "Exact match" not in page.words


def test_the_best_of_a_row_is_bold_ties_included_and_a_lone_variant_is_not() -> None:
    values = {"full": (1.0, 0.5), "random": (1.0002, 0.7), "s2l": (1.2, 0.1)}
    evaluations = [
        Evaluation(
            variant=name,
            num_examples=1,
            target_steps=1,
            metrics={"loss": {"gsm": loss}, "exact": {"gsm": match}},
        )
        for name, (loss, match) in values.items()
    ]
    page = Page(render(evaluated(evaluations)))
    # In the summary by variant, then by source and as macro mean. 1.0002 is shown as 1.000, so it
    # counts as equal.
    assert page.bold == ["1.000", "1.000", "0.700", *["1.000", "1.000"] * 2, *["0.700"] * 2]
    assert Page(render(evaluated(evaluations[:1]))).bold == []


def test_the_gain_of_a_source_is_its_share_chosen_over_its_share_of_the_data() -> None:
    subset = Subset(variant="s2l", rule="s2l", num_examples=100, uri="u", source_sizes=[50, 50, 0])
    data = ReportData(
        run="demo",
        created="now",
        num_examples=1000,
        sources="abc",
        source_sizes=(800, 100, 100),
        subsets=[subset],
    )
    rows = re.search(r"Numbers by source(.*?)</table>", render(data), re.DOTALL)
    assert rows is not None
    numbers = [re.findall(r'<td class="n">(.*?)</td>', row) for row in rows[1].split("<tr>")[2:]]
    assert [row[-1] for row in numbers] == ["0.62", "5.00", "0.00"]
    assert numbers[1] == ["100", "10.0 %", "50", "50.0 %", "5.00"]


def test_long_texts_are_cut_and_several_clusterings_fold() -> None:
    data = full_data(2, 2, ("gsm",))
    long = ClusterExample(
        cluster=0, example_id=1, source="s", prompt="p" * 5000, completion="c" * 5000
    )
    first = replace(data.clusterings[0], examples=[long])
    page = Page(
        render(replace(data, clusterings=[first, replace(data.clusterings[0], variant="s2l_k9")]))
    )
    assert "p" * 599 + "\u2026" in page.words
    assert "p" * 600 not in page.words
    assert "s2l_k9: 2 clusters" in page.words


def test_features_are_named_and_what_moved_is_told() -> None:
    shifts = np.linspace(0, 1, 40)
    moved = Moved(
        base_sizes=list(range(1000, 1040)),
        before=list(range(2000, 2040)),
        shifts=shifts.tolist(),
        new_rows=12_345,
        changed=678,
        new_sources=["<new>"],
    )
    data = full_data(2)
    changed = clustering(40, 4, ("a",), feature="z-scored loss", moved=moved)
    page = Page(render(replace(data, clusterings=[changed])))
    assert "mean z-scored loss" in page.words
    assert sum("z-scored loss" in svg for svg in page.pictures()) == 2
    assert "12,345 more examples; 678 examples are in another cluster" in page.words
    assert "new sources with clusters of their own: <new>" in page.words
    size = changed.sizes[39]
    assert f"391,0392,039{size:,}1.000" in page.words
    assert "The 12 clusters whose centroids moved most" in page.words
    plain = Page(render(data))
    assert "moved" not in plain.words
    assert "mean loss" in plain.words


def test_new_and_dropped_files_of_an_extended_data_set_are_named() -> None:
    data = replace(full_data(), new_files=["new/b.jsonl", HOSTILE], dropped_files=["old.csv"])
    words = Page(render(data)).words
    assert "extends: 2 files, new/b.jsonl, " in words
    assert "gone or changed: 1 file, old.csv" in words
    assert "extends" not in Page(render(replace(full_data(2), clusterings=()))).words


def test_files_that_are_passed_over_are_listed_with_the_reason() -> None:
    passed_over = {"/data/LICENSE": "no kind of file that is read", f"/data/{HOSTILE}": "empty"}
    data = ReportData(run="r", created="today", num_examples=1, passed_over=passed_over)
    words = Page(render(data)).words
    assert "name 2 files that are not read." in words
    assert "/data/LICENSEno kind of file that is read" in words
    many = {f"/data/{number}.md": "empty" for number in range(1_201)}
    words = Page(render(replace(data, passed_over=many))).words
    assert "1,201 files that are not read; the first 200." in words
    assert "/data/199.md" in words
    assert "/data/200.md" not in words
    assert "passed over" not in Page(render(replace(data, passed_over={}))).words


def test_arrays_of_other_shapes_are_refused() -> None:
    moved = Moved(
        base_sizes=[0] * 5, before=[1, 2], shifts=[0] * 5, new_rows=0, changed=0, new_sources=[]
    )
    with pytest.raises(ValueError, match=r"moved.before has shape \(2,\), expected \(5,\)"):
        clustering(5, 4, ("a",), moved=moved)
    with pytest.raises(
        ValueError, match=r"clusters of s2l: high has shape \(2, 3\), expected \(5, 4\)"
    ):
        clustering(5, 4, ("a",), high=np.zeros((2, 3)))


def test_the_same_data_give_the_same_page_and_it_stays_small() -> None:
    data = full_data(num_clusters=100, num_steps=12, sources=[f"source {i}" for i in range(20)])
    page = render(data)
    assert page == render(data)
    assert len(page.encode()) < 1_500_000
