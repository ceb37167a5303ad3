"""Small data get defaults that work; what is set is kept, and refused where it does not fit."""

import logging
from pathlib import Path
from typing import Any

import pytest

from s2l_ray import config, pipeline
from s2l_ray.errors import UserError
from tests import tiny


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A job on 40 rows that sets neither batch, checkpoints nor k."""
    made = tiny.job(tmp_path, count=40, subset={"budget": 0.25})
    for section, name in (
        ("proxy", "global_batch"), ("proxy", "checkpoints"), ("clusters", "k"),
        ("target", "global_batch"),
    ):  # fmt: skip
        del made[section][name]
    return made


def planned(tree: dict[str, Any], *overrides: str, **options: Any) -> config.Config:
    return pipeline.plan(config.load(None, list(overrides), tree), **options).job.first


def test_defaults_scale_down_with_the_rows_and_it_is_said(
    tree: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="s2l_ray")
    made = planned(tree, "--proxy.epochs=2")
    # 40 rows twice in batches of 8, the least that micro-batches allow, are 10 steps.
    assert (made.proxy.global_batch, made.proxy.checkpoints, made.clusters.k) == (8, 10, 4)
    assert made.target is not None
    assert made.target.global_batch == 8
    said = [record.message for record in caplog.records if "small data" in record.message]
    assert said[0].startswith("small data: proxy.global_batch is 8, not 128 as for more data than")
    assert len(said) == 4
    caplog.clear()
    many = planned(tree, "--examples.expected_rows=100000", "--examples.files=[]", assume=True)
    assert (many.proxy.global_batch, many.proxy.checkpoints, many.clusters.k) == (128, 12, 100)
    assert not [record for record in caplog.records if "proxy" in record.message]


def test_what_is_set_stays_and_is_refused_where_it_does_not_fit(tree: dict[str, Any]) -> None:
    kept = ["--proxy.global_batch=16", "--proxy.checkpoints=3", "--clusters.k=40"]
    made = planned(tree, *kept)
    assert (made.proxy.global_batch, made.proxy.checkpoints, made.clusters.k) == (16, 3, 40)
    for override, said in (
        ("--clusters.k=41", "clusters.k = 41, but only 40 of 40"),
        ("--trajectories.sample=0.5", "clusters.k = 40, but only 20 of 40"),
        ("--proxy.checkpoints=4", "proxy.checkpoints = 4"),
        ("--subset.budget=41", "only 40 can be chosen"),
    ):
        with pytest.raises(UserError, match=said):
            planned(tree, *kept, override)


def test_only_what_a_job_will_make_is_checked(tree: dict[str, Any]) -> None:
    wrong = ["--clusters.k=41", "--proxy.checkpoints=12", "--proxy.global_batch=16"]
    planned(tree, *wrong, until="examples")
    planned(tree, *wrong, until="clusters", checked=False)
    with pytest.raises(UserError, match=r"proxy\.checkpoints = 12"):
        planned(tree, *wrong, until="proxy")
    with pytest.raises(UserError, match=r"clusters\.k = 41"):
        planned(tree, wrong[0], until="clusters")


def test_a_dry_run_names_files_that_are_not_there(tree: dict[str, Any]) -> None:
    tree["examples"]["files"] = ["absent/*.jsonl"]
    with pytest.raises(UserError, match=r"absent/\*\.jsonl"):
        planned(tree, assume=True)
    assert planned(tree, "--examples.expected_rows=1000", assume=True).clusters.k == 100
