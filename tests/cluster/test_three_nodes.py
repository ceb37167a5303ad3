"""The demo on three real hosts, submitted as a cluster's user would.

Each host has an empty home and no checkout.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.ray_hosts import RayHosts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
REPO = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "s2l_ray.run"]
# Short trainings: what they learn is not the question here, and the three hosts share the machine's
# cores.
SHORT = ["--proxy.epochs=1", "--target.steps=20", "--evaluation.max_new_tokens=0"]
WIDE = [
    *(f"--scaling.{stage}.workers=3" for stage in ("trajectories", "clusters", "target")),
    "--scaling.target.micro_batch=16",
    "--target.global_batch=48",
]


def manifests(storage: Path) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for path in sorted(storage.glob("*/*/manifest.json")):
        found[path.parts[-3]].append(json.loads(path.read_text()))
    return found


def data_files(storage: Path, stage: str) -> set[tuple[str, bytes]]:
    """Names and bytes of the stage's data files in all their folders, all artifacts of the stage
    together.
    """
    return {
        (str(path.relative_to(storage / stage)), path.read_bytes())
        for path in (storage / stage).rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def lines(output: str, words: str) -> list[str]:
    """Lines with these words, each once: of a job that failed Ray shows the last lines again."""
    return list(dict.fromkeys(line for line in output.splitlines() if words in line))


@pytest.fixture(scope="module")
def storage(ray_hosts: RayHosts) -> Path:
    """The storage of a demo that ran on all three hosts.

    The target's workers are as many as the CPUs, and each host must have room for readers too.
    """
    folder = ray_hosts.hosts.shared / "storage"
    status, output = ray_hosts.submit(
        [*RUN, f"--run.storage={folder}", *SHORT, *WIDE], REPO, timeout=1200
    )
    assert status == 0, output
    assert "3 node(s)" in output
    return folder


def test_every_host_made_parts(storage: Path, ray_hosts: RayHosts) -> None:
    made_on = {
        stage: {part["node"].rsplit("/")[-1] for manifest in found for part in manifest["parts"]}
        for stage, found in manifests(storage).items()
    }
    everywhere = {ray_hosts.hosts.address(i) for i in (1, 2, 3)}
    assert made_on["examples"] == everywhere
    assert made_on["clusters"] == everywhere
    assert set.union(*made_on.values()) == everywhere


def test_a_training_with_as_many_workers_as_hosts_of_one_cpu_ends(storage: Path) -> None:
    targets = manifests(storage)["target"]
    assert targets
    for target in targets:
        assert target["scaling"]["target"]["workers"] == 3
        assert target["info"]["total_steps"] == 20


def test_workers_that_leave_no_room_for_readers_are_refused_with_both_numbers(
    storage: Path, ray_hosts: RayHosts
) -> None:
    full = ["--scaling.target.cpus=1", "--scaling.side_by_side=1", "--target.seed=1"]
    status, output = ray_hosts.submit(
        [*RUN, f"--run.storage={storage}", *SHORT, *WIDE, *full], REPO, timeout=300
    )
    assert status == 1
    (said,) = lines(output, "error:")
    assert "3 workers take 3 of 3 CPUs (3 x 1), at most 3 of 3 fit, and 2 tasks of 0.25" in said


def test_one_node_chooses_the_same_bytes(storage: Path, tmp_path: Path) -> None:
    for folder in ("demo", "index", "examples", "proxy", "trajectories"):
        shutil.copytree(storage / folder, tmp_path / folder)
    arguments = [
        f"--run.storage={tmp_path}",
        *SHORT,
        "--until=subset",
        "--scaling.clusters.workers=2",
    ]
    env = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [*RUN, *arguments], cwd=REPO, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    # found again, not scored again
    assert len(manifests(tmp_path)["trajectories"]) == 1
    assert data_files(tmp_path, "clusters") == data_files(storage, "clusters")
    assert data_files(tmp_path, "subset") == data_files(storage, "subset")


def test_storage_that_is_not_shared_is_named(ray_hosts: RayHosts) -> None:
    status, output = ray_hosts.submit(
        [*RUN, "--run.storage=/var/tmp/alone", *SHORT], REPO, timeout=300
    )
    assert status != 0
    assert "error: checking the storage /var/tmp/alone" in output
    assert any(ray_hosts.hosts.address(i) in output.split("error:")[1] for i in (2, 3))
    assert "run.storage" in output.split("error:")[1]
