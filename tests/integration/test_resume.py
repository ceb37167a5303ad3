"""kill -9 of the driver during every stage, then the same command: it finishes, and remakes nothing
that was finished.

The killed job has one CPU in all, the undisturbed one has two: scaling decides nothing about the
content.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import Finished, Runs, shared_job, write_job

# what lies in the storage when a stage is in its middle
HALFWAY = {
    "examples": "receipts/part-*.json",
    "proxy": "state/member-0/state/*/part-*.json",
    "trajectories": "receipts/part-*.json",
    "clusters": "rounds/latest.json",
    "subset": "receipts/part-*.json",
    "target": "state/state/*/part-*.json",
    "evaluation": "receipts/part-*.json",
}
ONE_CPU = "--scaling.local_cpus=1"
pytestmark = pytest.mark.timeout(900)
IN_PARTS = ("examples", "trajectories", "subset", "evaluation")


@dataclass
class Killed:
    """The killed and restarted job, what was there of each stage when its driver's processes had
    gone, and what every run said.
    """

    finished: Finished
    receipts: dict[str, set[str]]
    old_files: dict[str, dict[str, int]]
    said: str


def folder_of(storage: Path, finished: Finished, stage: str) -> Path:
    """The same job has the same fingerprints in another storage."""
    return storage / stage / finished.artifact(stage).fingerprint


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, finished: Finished) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    job, storage = write_job(folder, shared_job(folder)), folder / "storage"
    runs = Runs()
    receipts: dict[str, set[str]] = {}
    old_files: dict[str, dict[str, int]] = {}
    said = ""
    try:
        for stage, pattern in HALFWAY.items():
            place = folder_of(storage, finished, stage)
            said += kill_when(
                runs,
                job,
                lambda place=place, pattern=pattern: any(place.glob(pattern)),
                everything=stage not in IN_PARTS and stage != "clusters",
            )
            assert not (place / "manifest.json").exists(), (
                f"{stage} was over before the driver was killed"
            )
            receipts[stage] = {path.name for path in (place / "receipts").glob("part-*.json")}
            files = [path for path in place.rglob("*") if path.is_file()]
            old_files[stage] = {
                str(path.relative_to(place)): path.stat().st_mtime_ns for path in files
            }
        ended = runs(job, ONE_CPU)
        assert ended.status == 0, ended.err
        return Killed(Finished(folder, job, ended), receipts, old_files, said)
    finally:
        runs.end()


def kill_when(runs: Runs, job: Path, holds: Callable[[], bool], everything: bool) -> str:
    """Start the job, kill its driver as soon as `holds`, and wait until its workers have gone; what
    the driver said.

    Training workers live on for seconds and would finish so small a training, so there `everything`
    dies, as with a machine.
    """
    driver = runs.start(job, ONE_CPU)
    until = time.monotonic() + 240
    while not holds():
        assert driver.poll() is None, Path(f"{job}.err").read_text()
        assert time.monotonic() < until, "the stage did not get there"
        time.sleep(0.002)
    os.kill(driver.pid, signal.SIGKILL)
    if everything:
        runs.end()
    driver.wait()
    runs.wait_until_idle()
    return Path(f"{job}.err").read_text()


def test_the_subset_is_that_of_an_undisturbed_run(finished: Finished, killed: Killed) -> None:
    for stage in ("examples", "trajectories", "clusters", "subset"):
        disturbed = [part.files for part in killed.finished.manifest(stage).parts]
        assert disturbed == [part.files for part in finished.manifest(stage).parts], stage


def test_checkpoints_are_those_of_an_undisturbed_run(finished: Finished, killed: Killed) -> None:
    for stage in ("proxy", "target"):
        disturbed = {entry.name: entry.sha256 for entry in killed.finished.manifest(stage).files}
        assert disturbed == {
            entry.name: entry.sha256 for entry in finished.manifest(stage).files
        }, stage


@pytest.mark.parametrize("stage", IN_PARTS)
def test_finished_parts_were_not_made_again(killed: Killed, stage: str) -> None:
    manifest = killed.finished.manifest(stage)
    found = killed.receipts[stage]
    assert found, "the kill came before any part was finished"
    reused = {f"part-{part.index:05d}.json" for part in manifest.parts if part.run != manifest.run}
    assert reused == found
    assert manifest.parts_made_by(manifest.run) == len(manifest.parts) - len(found) > 0


@pytest.mark.parametrize("stage", ["proxy", "target"])
def test_training_went_on_from_its_state(killed: Killed, stage: str) -> None:
    place = Path(killed.finished.artifact(stage).uri)
    old = {
        name: time
        for name, time in killed.old_files[stage].items()
        if name.startswith(("checkpoint", "member"))
    }
    checkpoints = [name for name in old if name.endswith("files.json")]
    if stage == "proxy":
        assert checkpoints, "the checkpoint of step 0 is written before the first state"
    for name in checkpoints:
        assert (place / name).stat().st_mtime_ns == old[name], f"{name} was written again"
    metrics = sorted(path.name for path in place.rglob("metrics/*.json"))
    assert metrics[-1] > "from-00000001.json", f"training began anew: {metrics}"


def test_no_step_is_missing_from_what_is_told_of_a_training(
    finished: Finished, killed: Killed
) -> None:
    told, again = (
        result.manifest("proxy").info["members"][0] for result in (finished, killed.finished)
    )
    assert again["tokens"] == told["tokens"]
    assert again["curve"]["step"] == told["curve"]["step"]


def test_kmeans_went_on_from_its_last_round(finished: Finished, killed: Killed) -> None:
    told, again = (result.manifest("clusters").info for result in (finished, killed.finished))
    assert again["objectives"] == told["objectives"]
    assert "going on after round" in killed.said
