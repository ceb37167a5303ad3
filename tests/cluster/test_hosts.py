"""Holds the hosts to what tests on several machines rely on: what is separate, what is shared, what
dies.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import CHECKOUT, GIB, Hosts
from tests.cluster.ray_hosts import RayHosts

pytestmark = pytest.mark.cluster
MIB = 1024**2


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(2, memory=GIB, private=[tmp_path_factory.mktemp("private")]) as hosts:
        yield hosts


def shell(hosts: Hosts, i: int, script: str) -> str:
    done = hosts.run(i, ["bash", "-c", script])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def eventually(condition: Callable[[], bool], *, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def can_connect(hosts: Hosts, i: int, address: str) -> bool:
    """Tells whether host i gets an answer, be it a refusal, from the given address."""
    attempt = (
        "import socket; s = socket.socket(); s.settimeout(1); "
        f"print(s.connect_ex(('{address}', 9)))"
    )
    return hosts.run(i, [sys.executable, "-c", attempt]).stdout.strip() == str(errno.ECONNREFUSED)


def test_each_host_has_its_own_name_address_and_process_table(hosts: Hosts) -> None:
    for i in hosts.numbers:
        assert shell(hosts, i, "hostname") == f"host{i}"
        assert f"inet {hosts.address(i)}/24" in shell(hosts, i, "ip address show eth0")
        assert len(shell(hosts, i, "ls -d /proc/[0-9]*").splitlines()) < 8
    assert hosts.address(1) != hosts.address(2)


def test_each_host_has_its_own_empty_home_and_temporary_folders(hosts: Hosts) -> None:
    for folder in ("$HOME", "/dev/shm"):
        assert shell(hosts, 1, f"ls -A {folder}") == ""
        shell(hosts, 1, f"touch {folder}/mine")
        assert shell(hosts, 2, f"ls -A {folder}") == ""
        shell(hosts, 1, f"rm {folder}/mine")
    shell(hosts, 1, "mkdir /tmp/ray")
    assert shell(hosts, 2, "test -e /tmp/ray || echo absent") == "absent"
    assert not (hosts.disk(2) / "tmp" / "ray").exists()


def test_the_checkout_is_absent_and_the_running_python_is_there(hosts: Hosts) -> None:
    # a virtual environment in the checkout is all that may be seen of it
    python = Path(sys.prefix)
    inside = {python.relative_to(CHECKOUT).parts[0]} if python.is_relative_to(CHECKOUT) else set()
    assert set(shell(hosts, 1, f"ls -A {CHECKOUT}").split()) == inside
    assert hosts.run(1, [sys.executable, "-c", "import ray"]).returncode == 0


def test_a_python_inside_the_checkout_stays_visible_while_the_checkout_does_not(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "tests" / "cluster"
    folder.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("hosts.py"), folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(folder)!r})
        from hosts import Hosts
        code = "import os, sys; print(sys.prefix, *os.listdir({str(tmp_path)!r}))"
        with Hosts(1) as hosts:
            done = hosts.run(1, [sys.executable, "-c", code])
            print(done.stdout, done.stderr)
    """)
    python = tmp_path / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [f"{tmp_path}/.venv", ".venv"], done.stdout + done.stderr


def test_private_folders_are_private_and_the_shared_folder_is_shared(hosts: Hosts) -> None:
    private = hosts.private[0]
    shell(hosts, 1, f"echo one > {private}/file; echo all > {hosts.shared}/file")
    assert shell(hosts, 2, f"ls -A {private}") == ""
    assert not list(private.iterdir())
    assert shell(hosts, 2, f"cat {hosts.shared}/file") == "all"
    assert (hosts.shared / "file").read_text() == "all\n"
    hosts.kill(1)
    hosts.boot(1)
    assert shell(hosts, 1, f"cat {private}/file") == "one"


def test_a_process_over_the_memory_limit_is_killed(hosts: Hosts) -> None:
    take = [sys.executable, "-c", f"b = bytearray({200 * MIB}); print(len(b))"]
    hosts.limit_memory(1, 100 * MIB)
    assert hosts.run(1, take).returncode == -signal.SIGKILL
    hosts.limit_memory(1, GIB)
    assert hosts.run(1, take).stdout.strip() == str(200 * MIB)


def test_a_cut_host_is_silent_until_healed(hosts: Hosts) -> None:
    assert can_connect(hosts, 2, hosts.address(1))
    hosts.cut(1)
    assert not can_connect(hosts, 2, hosts.address(1))
    hosts.heal(1)
    assert eventually(lambda: can_connect(hosts, 2, hosts.address(1)), timeout=20)


def test_killing_a_host_ends_all_its_processes_and_booting_brings_it_back(hosts: Hosts) -> None:
    process = hosts.popen(2, ["bash", "-c", "setsid sleep 1234 & touch /tmp/old; sleep 1234"])
    assert eventually(lambda: hosts.run(2, ["test", "-e", "/tmp/old"]).returncode == 0, timeout=20)
    hosts.kill(2)
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert not can_connect(hosts, 1, hosts.address(2))
    hosts.boot(2)
    assert eventually(lambda: can_connect(hosts, 1, hosts.address(2)), timeout=20)
    assert shell(hosts, 2, "ls /tmp/old 2>/dev/null; pgrep sleep; true") == ""


def test_nothing_is_left_when_the_test_process_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from hosts import Hosts
        with Hosts(1) as hosts:
            hosts.popen(1, ["sleep", "1234"])
            pids = hosts._janitor.pid, hosts._inits[1][1]
            print(hosts.root, hosts._cgroup(1), hosts.address(254), *pids, flush=True)
            sys.stdin.read()
    """)
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, text=True
    ) as dying:
        assert dying.stdout is not None
        root, cgroup, address, *processes = dying.stdout.readline().split()
        assert Path(root).exists()
        dying.kill()

    def everything_is_gone() -> bool:
        left = [Path(root), Path(cgroup), *(Path("/proc") / pid / "cwd" for pid in processes)]
        return not any(os.path.lexists(path) for path in left) and address not in _addresses()

    assert eventually(everything_is_gone, timeout=30)


def _addresses() -> str:
    return subprocess.run(["ip", "-4", "addr"], capture_output=True, text=True, check=True).stdout


SPREAD_JOB = """
import ray
import own_module

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def where(barrier):
    ray.get(barrier.arrive.remote())
    return ray.util.get_node_ip_address()

@ray.remote(num_cpus=0)
class Barrier:
    def __init__(self, count):
        import asyncio
        self.left, self.open = count, asyncio.Event()

    async def arrive(self):
        self.left -= 1
        if self.left == 0:
            self.open.set()
        await self.open.wait()

ray.init()
barrier = Barrier.remote(own_module.TASKS)
print("ADDRESSES", *sorted(ray.get([where.remote(barrier) for _ in range(own_module.TASKS)])))
"""


def test_a_submitted_job_brings_its_code_and_runs_on_every_host(
    ray_hosts: RayHosts, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text(SPREAD_JOB)
    (tmp_path / "own_module.py").write_text("TASKS = 3\n")
    status, output = ray_hosts.submit(["python", "job.py"], tmp_path)
    assert status == 0, output
    line = next(line for line in output.splitlines() if line.startswith("ADDRESSES"))
    assert line.split()[1:] == [ray_hosts.hosts.address(i) for i in (1, 2, 3)]


def test_a_failing_job_is_told_apart(ray_hosts: RayHosts, tmp_path: Path) -> None:
    status, output = ray_hosts.submit(
        ["python", "-c", "raise SystemExit('broken on purpose')"], tmp_path
    )
    assert status != 0
    assert "broken on purpose" in output


def test_ray_notices_a_lost_host_and_takes_it_back(ray_hosts: RayHosts) -> None:
    ray_hosts.hosts.kill(3)
    ray_hosts.wait_for_nodes([1, 2])
    ray_hosts.hosts.boot(3)
    ray_hosts.start(3)
    ray_hosts.wait_for_nodes([1, 2, 3])
