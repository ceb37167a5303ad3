"""Evaluations of variants as the report shows them, and tests on the rows that they share."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2l_ray.core.report import data
from s2l_ray.core.report.page import render
from s2l_ray.core.storage.info import (
    Differing,
    Estimate,
    EvaluationInfo,
    HeldOut,
    SourceHeldOut,
    stored,
)
from s2l_ray.stages.report import evaluations

NUMBER = 200


def manifest(name: str, values: np.ndarray, first: int = 0) -> Any:
    metrics = {"loss": Estimate(1.0, 0.9, 1.1)}
    info = EvaluationInfo(
        by_source={"s": SourceHeldOut(metrics=metrics, rows=NUMBER)}, macro=HeldOut(metrics=metrics)
    )
    table = pa.table(
        {
            "example_id": np.arange(first, first + NUMBER),
            "source": ["s"] * NUMBER,
            "loss": pa.array(values, pa.float32()),
        }
    )
    return SimpleNamespace(stage="evaluation", fingerprint=name, info=stored(info), parts=[table])


def paired(**manifests: Any) -> list[data.PairedTest]:
    read = SimpleNamespace(read_part=lambda part, columns: part.select(columns))
    work: Any = SimpleNamespace(inputs={f"{name}/evaluation": read for name in manifests})
    return evaluations.paired_tests(
        work, {name: {"evaluation": found} for name, found in manifests.items()}
    )


def test_variants_are_compared_on_the_rows_that_they_share() -> None:
    losses = np.random.default_rng(0).random(NUMBER)
    one, better, same = manifest("a", losses), manifest("b", losses - 0.1), manifest("c", losses)
    found = paired(one=one, better=better, same=same)
    assert [(test.first, test.second) for test in found] == [
        ("better", "one"), ("same", "one"), ("same", "better"),
    ]  # fmt: skip
    assert [test.difference for test in found] == pytest.approx([-0.1, 0, 0.1], abs=1e-6)
    assert found[0].p < 0.01
    assert found[1].p == 1.0
    assert paired(one=one) == []
    # One artifact, and other rows.
    assert paired(one=one, again=one) == []
    assert paired(one=one, other=manifest("d", losses, first=1)) == []


def test_many_variants_are_compared_with_the_first_alone() -> None:
    losses = np.ones(NUMBER)
    made = {f"v{n}": manifest(str(n), losses + n) for n in range(evaluations.MOST_IN_ALL_PAIRS + 1)}
    assert {test.second for test in paired(**made)} == {"v0"}


def test_the_page_shows_intervals_tests_and_answers_that_rules_judge_otherwise() -> None:
    differing = Differing(
        example_id=12,
        source="s",
        gold="<b>7</b>",
        answer="9",
        right=["published"],
        wrong=["numeric"],
    )
    shown = [
        data.Evaluation(
            variant=name,
            num_examples=1,
            target_steps=1,
            metrics={"numeric": {"s": 0.5}},
            intervals={"numeric": {"s": (0.411, 0.588), data.ALL: (0.412, 0.589)}},
            counts={"came to max_new_tokens": 3},
            differ=4,
            differing=[differing],
        )
        for name in ("one", "other")
    ]
    test = data.PairedTest(
        metric="numeric",
        first="one",
        second="other",
        difference=0.25,
        low=0.125,
        high=0.375,
        p=0.016,
    )
    page = render(
        data.ReportData(
            run="r", created="now", num_examples=1, evaluations=shown, paired_tests=[test]
        )
    )
    for text in ("0.411 to 0.588", "0.412 to 0.589", "0.125 to 0.375", "0.016", "differ about 4"):
        assert text in page
    assert "3 came to max_new_tokens" in page
    assert "&lt;b&gt;7&lt;/b&gt;" in page
