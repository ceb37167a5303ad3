"""SIGTERM at start-up, and Ctrl-C while trainings go on side by side: the process ends soon, says
so, and the same command goes on from there.
"""

import signal
import time
from pathlib import Path

import pytest
import yaml

from s2l_ray import config
from s2l_ray.core.storage.artifact import Artifact
from s2l_ray.core.storage.store import Store
from tests import tiny
from tests.integration.conftest import Finished, Runs, write_job

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two proxies that need nothing of one another, long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    made = tiny.job(
        folder,
        proxy={"epochs": 30},
        scaling={"side_by_side": 2, "local_cpus": 2},
        variants={"one": {"proxy.seed": 1}, "two": {"proxy.seed": 2}},
    )
    return write_job(folder, made)


def test_an_interrupted_run_ends_and_goes_on(job: Path, runs: Runs) -> None:
    driver = runs.start(job, "--until", "proxy")
    while "examples" not in Path(f"{job}.err").read_text():
        assert driver.poll() is None, Path(f"{job}.err").read_text()
        time.sleep(0.01)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 143
    said = Path(f"{job}.err").read_text()
    assert said.endswith("terminated; the same command goes on from here\n")
    assert "SIGTERM received" not in said
    assert said.count("started Ray") == 1
    driver = runs.start(job, "--until", "proxy")
    storage, until = job.parent / "storage", time.monotonic() + 240
    lists = "proxy/*/state/member-0/state/*/part-*.json"
    while len({path.parents[3] for path in storage.glob(lists)}) < 2:
        assert driver.poll() is None, Path(f"{job}.err").read_text()
        assert time.monotonic() < until, "the trainings did not go on side by side"
        time.sleep(0.01)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130
    said = Path(f"{job}.err").read_text()
    assert "interrupted; the same command goes on" in said
    assert "Traceback" not in said
    runs.wait_until_idle()
    again = runs(job, "--until", "proxy")
    assert again.status == 0, again.err
    assert len(list(storage.glob("proxy/*/manifest.json"))) == 2


def test_artifacts_made_side_by_side_are_those_made_one_after_the_other(
    finished: Finished, runs: Runs, tmp_path: Path
) -> None:
    plan = yaml.safe_load(finished.job.read_text())
    plan = config.merge(
        plan, {"run": {"storage": str(tmp_path / "storage")}, "scaling": {"side_by_side": 2}}
    )
    # two targets at once: the first and the third are trained by workers that have trained the
    # proxy or another target
    others = {"few": {"subset.budget": 5}, "more": {"subset.budget": 6}}
    job = write_job(tmp_path, {**plan, "variants": {**others, "same": {}}})
    ended = runs(job, "--until", "evaluation")
    assert ended.status == 0, ended.err
    label = f"target {finished.artifact('target').fingerprint[:8]}"
    assert f"{label}: in workers that are up already" in ended.err
    assert ended.err.count("in workers that are up already") == 2
    for stage in ("subset", "target", "evaluation"):
        alone = finished.artifact(stage)
        beside = Artifact(Store(str(tmp_path / "storage")), stage, alone.fingerprint).manifest()
        assert [part.files for part in beside.parts] == [
            part.files for part in alone.manifest().parts
        ]
        assert {f.name: f.sha256 for f in beside.files} == {
            f.name: f.sha256 for f in alone.manifest().files
        }
