"""A new stage is one value in STAGES: it is planned, named, checked, estimated and made like all
others.
"""

from pathlib import Path
from typing import Any

import pytest

from s2l_ray import config, pipeline
from s2l_ray.errors import UserError
from s2l_ray.pipeline import estimate, planning
from s2l_ray.stages import STAGES
from tests import tiny, toy_stage
from tests.committed import commit


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job without target, and the package with one stage more."""
    stages = (*STAGES[:-1], toy_stage.COUNTS, STAGES[-1])
    monkeypatch.setattr(planning, "STAGES", stages)
    monkeypatch.setattr(planning, "NAMES", tuple(stage.name for stage in stages))
    return tiny.job(tmp_path, target=None, evaluation=None)


def test_it_is_made_once_and_reused(tree: dict[str, Any]) -> None:
    plan = pipeline.plan(config.load(None, [], tree))
    examples, counts = (plan.of("s2l")[name] for name in ("examples", "counts"))
    commit(examples.artifact)
    only = {examples.label, counts.label}
    first, again = pipeline.run(plan, only=only), pipeline.run(plan, only=only)
    assert [done.made for done in first] == [False, True]
    assert [done.made for done in again] == [False, False]
    (entry,) = first[1].manifest.files
    assert counts.artifact.read_file(entry) == b'{"rows": 0}'
    assert first[1].manifest.inputs == {"examples": examples.artifact.fingerprint}


def test_the_report_and_the_estimate_know_of_it(tree: dict[str, Any]) -> None:
    plan = pipeline.plan(config.load(None, [], tree))
    nodes = plan.of("s2l")
    assert list(nodes)[-2:] == ["counts", "report"]
    assert "s2l/counts" in nodes["report"].inputs
    assert estimate.cost(nodes["counts"], plan).rows == 300


def test_its_check_and_its_wish_count(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1001 rows are too many to count"):
        pipeline.plan(
            config.load(None, [], tiny.job(tmp_path, count=1001, target=None, evaluation=None))
        )
    with_target = pipeline.plan(config.load(None, [], tiny.job(tmp_path)))
    assert "counts" not in with_target.of("s2l")
