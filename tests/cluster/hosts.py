"""Makes several hosts of one Linux machine, so that tests can lose a machine, a disk or a cable.

A host is a process tree in network, mount, PID, UTS and IPC namespaces and a memory cgroup of its
own. It has an address, a hostname, a process table, an empty /tmp, /run, /dev/shm and home, and
does not see the checkout. Run as a program, this file is process 1 of a host, or the janitor that
removes everything when the test has ended.
"""

import contextlib
import json
import os
import platform
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
HOME = "/run/home"
GIB = 1 << 30
_TOOLS = ("ip", "mount", "umount", "unshare", "nsenter", "setpriv", "env")
_NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
_PROGRAM = [sys.executable, "-IS", str(Path(__file__).resolve())]
# $0 is the cgroup.procs file: the shell moves itself there and then becomes the command.
_IN_CGROUP = ["sh", "-c", 'echo $$ > "$0" && exec "$@"']


def why_not() -> str | None:
    """Tells why this machine cannot make hosts, or None if it can."""
    if platform.system() != "Linux":
        return "hosts need Linux namespaces"
    if os.geteuid() != 0:
        return "hosts need root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"hosts need the programs {', '.join(missing)} (Debian: iproute2, util-linux)"
    if _memory_root() is None:
        return (
            "hosts need the memory controller of cgroup v1, or of v2 enabled at the root of "
            "/sys/fs/cgroup"
        )
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "true"], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"hosts need namespaces: {tried.stderr.strip()}"


class Hosts:
    """Hosts 1..n on a network of their own, up inside the `with` block and gone without a trace
    after it.

    Host i is 10.77.k.i, this machine is 10.77.k.254; k is free when the block is entered. A host
    sees this machine's files except /tmp, /run, /var/tmp, the home folder, the checkout and the
    folders named `private`, which are its own and start empty; the running Python stays visible
    wherever it lies. `shared` is one folder that all hosts and this machine see under the same
    path. Private folders and the home are the host's disk: they outlive `kill`.

    If the test process dies in any way, even by SIGKILL, the hosts die with it and a janitor
    removes the rest.
    """

    def __init__(self, count: int, *, memory: int = 4 * GIB, private: Sequence[Path] = ()) -> None:
        """`memory` is the limit of each host in bytes.

        `private` are folders that exist on this machine.
        """
        missing = [str(path) for path in private if not path.is_dir()]
        if missing:
            raise ValueError(
                f"making hosts: private folders must exist here first, but {missing} do not"
            )
        self.numbers = range(1, count + 1)
        self._memory = memory
        self.private = [path.resolve() for path in private]
        self._inits: dict[int, tuple[subprocess.Popen[str], int]] = {}

    def __enter__(self) -> "Hosts":
        memory_root = _memory_root()
        if memory_root is None:
            raise RuntimeError(f"making hosts: {why_not()}")
        self._memory_root = memory_root
        self.root = Path(tempfile.mkdtemp(prefix="s2l-hosts-")).resolve()
        self.shared = self.root / "shared"
        self.shared.mkdir()
        # Nobody writes into this pipe. Its end of file means: this process is gone or wants the
        # hosts gone.
        self._gone, self._alive = os.pipe()
        with (self.root / "janitor.log").open("w") as log:
            self._janitor = subprocess.Popen(
                [
                    "unshare",
                    "--net",
                    *_PROGRAM,
                    "janitor",
                    json.dumps([str(self.root), str(memory_root)]),
                ],
                stdin=self._gone,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            _expect_line(self._janitor, "the janitor", Path(log.name))
            self._make_network()
            for i in self.numbers:
                self._make_disk(i)
                self.boot(i)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Has the janitor end every process and remove network, cgroups and files; idempotent."""
        if self._alive < 0:
            return
        os.close(self._alive)
        os.close(self._gone)
        self._alive = -1
        status = self._janitor.wait(timeout=60)
        for outer, _ in self._inits.values():
            outer.wait(timeout=60)
        if status != 0:
            why = (self.root / "janitor.log").read_text()
            raise RuntimeError(
                f"removing hosts: {self.root} and its cgroups are left, remove them: {why}"
            )

    def address(self, i: int) -> str:
        """Returns the IPv4 address of host i; number 254 is this machine."""
        return f"{self._network}.{i}"

    def disk(self, i: int) -> Path:
        """Returns the folder of this machine that keeps what host i has written.

        Hosts do not see it.
        """
        return self.root / str(i)

    def boot(self, i: int) -> None:
        """Switches host i on, with an empty /tmp, and returns when it has its network."""
        if self._is_on(i):
            raise RuntimeError(f"booting host {i}: it is on already")
        shutil.rmtree(self.disk(i) / "tmp", ignore_errors=True)
        (self.disk(i) / "tmp").mkdir(mode=0o1777)
        init = ["unshare", *_NAMESPACES, "--fork", *_PROGRAM, "init", self._init_spec(i)]
        with (self.disk(i) / "boot.log").open("w") as log:
            outer = subprocess.Popen(
                [*_IN_CGROUP, str(self._cgroup(i) / "cgroup.procs"), *init],
                stdin=self._gone,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._inits[i] = (outer, int(_expect_line(outer, f"host {i}", Path(log.name))))
        self._plug_in(i)

    def kill(self, i: int) -> None:
        """Cuts host i's power: its peers hear nothing more from it, not even that connections
        close.
        """
        outer, init = self._inits.pop(i)
        self._switch("link", "del", f"host{i}")
        if outer.poll() is None:
            # the kernel ends all processes of the namespace with its first
            os.kill(init, signal.SIGKILL)
        outer.wait(timeout=60)

    def cut(self, i: int) -> None:
        """Unplugs host i from the network; its processes go on."""
        self._switch("link", "set", f"host{i}", "down")

    def heal(self, i: int) -> None:
        """Plugs host i into the network again."""
        self._switch("link", "set", f"host{i}", "up")

    def limit_memory(self, i: int, limit: int) -> None:
        """Limits the memory of host i, including /dev/shm, to `limit` bytes without swap."""
        group = self._cgroup(i)
        if (group / "memory.max").exists():
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
            return
        # counts both, and may not be below the limit of memory
        with_swap = group / "memory.memsw.limit_in_bytes"
        if with_swap.exists():
            with_swap.write_text("-1")
        (group / "memory.limit_in_bytes").write_text(str(limit))
        if with_swap.exists():
            with_swap.write_text(str(limit))

    def popen(
        self,
        i: int,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = HOME,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Starts argv on host i; `options` go to subprocess.Popen. Killing the returned process
        kills argv.

        The environment is PATH (the running Python first), HOME and LANG, plus `env`; nothing is
        inherited.
        """
        _, init = self._inits[i]
        enter = ["nsenter", f"--target={init}", *_NAMESPACES]
        command = [
            *_IN_CGROUP,
            str(self._cgroup(i) / "cgroup.procs"),
            *enter,
            "env",
            f"--chdir={cwd}",
            "setpriv",
            "--pdeathsig=KILL",
            *argv,
        ]
        path = f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {"PATH": path, "HOME": HOME, "LANG": "C.UTF-8", **(env or {})}
        return subprocess.Popen(
            command, env=environment, text=True, start_new_session=True, **options
        )

    def run(
        self, i: int, argv: Sequence[str], *, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs argv on host i for at most `timeout` seconds.

        Returns status and outputs, raises only if late.
        """
        pipe = subprocess.PIPE
        options = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **options}
        with self.popen(i, argv, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def _is_on(self, i: int) -> bool:
        return i in self._inits and self._inits[i][0].poll() is None

    def _cgroup(self, i: int) -> Path:
        return self._memory_root / f"{self.root.name}-{i}"

    def _make_network(self) -> None:
        """Puts a bridge into the janitor's namespace, out of reach of this machine's firewall, and
        a cable to it.
        """
        for k in range(1, 255):
            if _output("ip", "-4", "route", "show", "root", f"10.77.{k}.0/24"):
                continue
            # Creating a device is atomic, so its name is also the lock on the network's number.
            peer = ["peer", "name", "machine", "netns", str(self._janitor.pid)]
            make = ["ip", "link", "add", f"s2l{k}", "type", "veth", *peer]
            if subprocess.run(make, capture_output=True).returncode == 0:
                break
        else:
            raise RuntimeError(
                "making hosts: all networks 10.77.1.0/24 to 10.77.254.0/24 are in use here"
            )
        self._network = f"10.77.{k}"
        _output("ip", "addr", "add", f"{self.address(254)}/24", "dev", f"s2l{k}")
        _output("ip", "link", "set", f"s2l{k}", "up")
        self._switch("link", "add", "bridge", "type", "bridge")
        self._switch("link", "set", "bridge", "up")
        self._switch("link", "set", "machine", "master", "bridge", "up")

    def _make_disk(self, i: int) -> None:
        disk = self.disk(i)
        for target in self._hidden():
            _under(disk / "hidden", target).mkdir(parents=True, exist_ok=True)
        (disk / "home").mkdir(parents=True)
        names = "".join(f"{self.address(j)} host{j}\n" for j in self.numbers)
        # Gloo looks its own hostname up to choose an interface; without this file it takes the
        # loopback.
        (disk / "hosts").write_text(f"127.0.0.1 localhost\n{self.address(254)} machine\n{names}")
        self._cgroup(i).mkdir()
        self.limit_memory(i, self._memory)

    def _hidden(self) -> list[Path]:
        home = Path(pwd.getpwuid(os.getuid()).pw_dir).resolve()
        hidden = {Path("/var/tmp"), home, CHECKOUT, *self.private}
        return sorted(path for path in hidden if path != Path("/") and path.is_dir())

    def _init_spec(self, i: int) -> str:
        hidden = self._hidden()
        kept = [
            path
            for path in _python_folders() | {self.shared}
            if path not in hidden
            and any(path.is_relative_to(top) for top in [Path("/tmp"), *hidden])
        ]
        return json.dumps(
            {
                "name": f"host{i}",
                "disk": str(self.disk(i)),
                "hidden": [str(path) for path in hidden],
                "kept": [str(path) for path in kept],
                "cgroup": str(self._cgroup(i)),
                "cgroup_seen_at": str(self._memory_root),
                "shm": self._memory // 2,
            }
        )

    def _switch(self, *argv: str) -> None:
        _output("nsenter", f"--net=/proc/{self._janitor.pid}/ns/net", "ip", *argv)

    def _plug_in(self, i: int) -> None:
        _, init = self._inits[i]
        # stays the same over a boot, as others remember it
        mac = f"02:4d:00:00:00:{i:02x}"
        self._switch(
            "link",
            "add",
            f"host{i}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "address",
            mac,
            "netns",
            str(init),
        )
        self._switch("link", "set", f"host{i}", "master", "bridge", "up")
        # The route leads nowhere, but programs learn their address by asking how they would reach
        # the internet.
        for argv in (
            ["addr", "add", f"{self.address(i)}/24", "dev", "eth0"],
            ["link", "set", "lo", "up"],
            ["link", "set", "eth0", "up"],
            ["route", "add", "default", "via", self.address(254)],
        ):
            _output("nsenter", f"--net=/proc/{init}/ns/net", "ip", *argv)


def _memory_root() -> Path | None:
    """Finds the folder under which a new folder is a cgroup with a memory limit."""
    root = Path("/sys/fs/cgroup")
    if (root / "memory" / "memory.limit_in_bytes").exists():
        return root / "memory"
    # of cgroup v2; switching it on is the owner's business
    enabled = root / "cgroup.subtree_control"
    return root if enabled.exists() and "memory" in enabled.read_text().split() else None


def _python_folders() -> set[Path]:
    """Returns the folders that the running Python needs: environment, installation, and links
    between them.
    """
    folders = {Path(sys.prefix), Path(sys.base_prefix)}
    link = Path(sys.executable)
    while link.is_symlink():
        link = link.parent / os.readlink(link)
        folders.add(Path(os.path.normpath(link)).parent.parent)
    return folders | {folder.resolve() for folder in folders}


def _under(folder: Path, target: Path) -> Path:
    return folder / target.relative_to("/")


def _output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"making hosts: `{' '.join(argv)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _expect_line(process: subprocess.Popen[str], what: str, log: Path) -> str:
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline().strip()
    if not line:
        status = process.wait()
        raise RuntimeError(
            f"making hosts: {what} did not come up, exit status {status}: {log.read_text()}"
        )
    return line


def _serve_as_init(spec: dict[str, Any]) -> None:
    """Process 1 of a host: arranges its files, says its process id as the machine sees it, then
    reaps orphans.
    """
    # /proc is still this machine's
    process_id = os.readlink("/proc/self")
    _arrange_files(spec)
    socket.sethostname(spec["name"])
    signal.signal(signal.SIGCHLD, _reap)
    print(process_id, flush=True)
    # end of file: the test is over, and all processes of the host end with this one
    os.read(0, 1)


def _arrange_files(spec: dict[str, Any]) -> None:
    _output("mount", "-t", "proc", "proc", "/proc")
    _output("mount", "-t", "tmpfs", "tmpfs", "/run")
    _bind(spec["disk"], "/run/disk")
    for number, path in enumerate(spec["kept"]):
        _bind(path, f"/run/kept/{number}")
    layers = {path: str(_under(Path("/run/disk/hidden"), Path(path))) for path in spec["hidden"]}
    layers |= {path: f"/run/kept/{number}" for number, path in enumerate(spec["kept"])}
    layers |= {"/tmp": "/run/disk/tmp", HOME: "/run/disk/home"}
    # Outer folders first, so that inner ones lie on top.
    for target in sorted(layers, key=lambda path: len(Path(path).parts)):
        _bind(layers[target], target)
    _output("mount", "--bind", "/run/disk/hosts", "/etc/hosts")
    _output("mount", "-t", "tmpfs", "-o", f"size={spec['shm']}", "tmpfs", "/dev/shm")
    _bind(spec["cgroup"], spec["cgroup_seen_at"])
    for folder in ["/run/disk", *(f"/run/kept/{number}" for number in range(len(spec["kept"])))]:
        _output("umount", "--lazy", folder)
        os.rmdir(folder)


def _bind(source: str, target: str) -> None:
    os.makedirs(target, exist_ok=True)
    _output("mount", "--rbind", source, target)


def _reap(number: int, frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve_as_janitor(root: Path, memory_root: Path) -> None:
    """Holds the network of the hosts, waits for the test's end, and removes what carries this
    root's name.
    """
    print("ready", flush=True)
    os.read(0, 1)
    groups = list(memory_root.glob(f"{root.name}-*"))
    deadline = time.monotonic() + 30
    while processes := [
        pid for group in groups for pid in (group / "cgroup.procs").read_text().split()
    ]:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise SystemExit(f"removing hosts: processes {processes} do not end")
        time.sleep(0.05)
    for group in groups:
        _remove_cgroup(group, deadline)
    # Deleting one end of a cable deletes the other; the bridge and what hangs on it go with this
    # process.
    subprocess.run(["ip", "link", "del", "machine"], capture_output=True)
    shutil.rmtree(root)


def _remove_cgroup(group: Path, deadline: float) -> None:
    """A cgroup stays busy for a moment after its last process has gone."""
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    role, argument = sys.argv[1:]
    if role == "init":
        _serve_as_init(json.loads(argument))
    else:
        _serve_as_janitor(*map(Path, json.loads(argument)))
