"""A Ray cluster on several hosts of this machine, to which jobs are submitted as a cluster's user
would.
"""

import json
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import GIB, Hosts

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_OBJECT_STORE = 256 * 1024**2
# A silent host is noticed within some 15 s; with Ray's own settings it takes over a minute, by the
# same code.
_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


class RayHosts:
    """A Ray cluster with its head on host 1 and one worker node on every other host, one CPU each.

    Token authentication is on, with a token of this cluster's own. `hosts` may be killed, cut and
    booted at will; a booted host joins again with `start`.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self._started: list[subprocess.Popen[str]] = []
        self.url = f"http://{hosts.address(1)}:8265"
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
            **_HEALTH_CHECKS,
        }

    def start(self, i: int) -> None:
        """Starts Ray on host i (host 1 is the head) and returns at once; see `wait_for_nodes`."""
        head = self.hosts.address(1)
        place = ["--head", "--dashboard-host=0.0.0.0"] if i == 1 else [f"--address={head}:6379"]
        size = ["--num-cpus=1", f"--memory={GIB}", f"--object-store-memory={_OBJECT_STORE}"]
        argv = [*_RAY, "start", *place, f"--node-ip-address={self.hosts.address(i)}", *size]
        with self._log(i).open("a") as log:
            output: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": log,
                "stderr": subprocess.STDOUT,
            }
            ray = self.hosts.popen(
                i, [*argv, "--disable-usage-stats", "--block"], env=self.env, **output
            )
        # an unreferenced Popen warns when it is collected
        self._started.append(ray)

    def nodes(self) -> set[str]:
        """Returns the addresses of the nodes that the head thinks alive.

        OSError if it does not answer.
        """
        request = urllib.request.Request(
            f"{self.url}/api/v0/nodes?limit=1000",
            headers={"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=10) as response:
            answer = json.load(response)
        return {
            node["node_ip"]
            for node in answer["data"]["result"]["result"]
            if node["state"] == "ALIVE"
        }

    def wait_for_nodes(self, numbers: Sequence[int], *, timeout: float = 90) -> None:
        """Waits until exactly these hosts are living nodes.

        If that does not happen, shows what each logged.
        """
        wanted, seen = {self.hosts.address(i) for i in numbers}, None
        deadline = time.monotonic() + timeout
        while seen != wanted:
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- host {i}\n{self._log(i).read_text()}" for i in self.hosts.numbers
                )
                pytest.fail(f"waiting {timeout} s for nodes {sorted(wanted)}: came {seen}\n{logs}")
            time.sleep(0.3)
            try:
                seen = self.nodes()
            # the dashboard is not up yet, or too busy
            except OSError as error:
                seen = {str(error)}

    def submit(
        self,
        argv: Sequence[str],
        working_dir: Path,
        *,
        runtime_env: dict[str, Any] | None = None,
        timeout: float = 120,
    ) -> tuple[int, str]:
        """Runs `ray job submit` on this machine until the job ends.

        Returns its exit status and its output.
        """
        with self.popen_job(argv, working_dir, runtime_env=runtime_env) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return process.returncode, output

    def popen_job(
        self, argv: Sequence[str], working_dir: Path, *, runtime_env: dict[str, Any] | None = None
    ) -> subprocess.Popen[str]:
        """Starts `ray job submit` on this machine.

        The job's output comes on stdout while it runs.
        """
        command = [
            *_RAY,
            "job",
            "submit",
            f"--address={self.url}",
            f"--working-dir={working_dir}",
            f"--runtime-env-json={json.dumps(runtime_env or {})}",
            "--",
            *argv,
        ]
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.hosts.root), "LANG": "C.UTF-8", **self.env}
        return subprocess.Popen(
            command,
            env=env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def _log(self, i: int) -> Path:
        return self.hosts.disk(i) / "ray.log"
