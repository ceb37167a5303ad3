"""Programs in answers: what is taken for one, what the sandbox lets it do, and what not."""

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from s2l_ray.core.answers import programs
from s2l_ray.core.answers.programs import FILES_BYTES, PRELUDE, Sandbox, program_in
from s2l_ray.errors import UserError

LAST = "print('went on')"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(seconds=3) as opened:
        try:
            opened.check()
        except UserError as error:
            if os.environ.get("S2L_RAY_CI"):
                raise
            pytest.skip(str(error))
        yield opened


def left_over() -> list[int]:
    """Processes of the user that programs of this process run as, which do not end soon."""
    own, found = str(programs.user_outside()), []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            continue
        if any(line.split()[:2] == ["Uid:", own] for line in lines):
            found.append(int(status.parent.name))
    return [process for process in found if not _ends(process)]


def _ends(process: int) -> bool:
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    ended = select.select([handle], [], [], 20)[0]
    os.close(handle)
    return bool(ended)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 2\nprint(x * 3)", "x = 2\nprint(x * 3)"),
        ("Here it is:\n```python\nprint(6)\n```\nDone.", "print(6)"),
        ("```\nprint(6)\n```", "print(6)"),
        ("```py\nprint(6)", "print(6)"),
        ("```python\nx = 1\n```\nand\n```python\nprint(6)\n```", "print(6)"),
        ("print(6)\n```\nThe answer is 7", "print(6)"),
        ("print(6)\n### Instruction:\nprint(7)", "print(6)"),
        ("The answer is 6", None),
        ("```python\nx = 6\n```", None),
        ("", None),
    ],
)
def test_a_program_is_what_prints(text: str, program: str | None) -> None:
    assert program_in(text) == (None if program is None else PRELUDE + program)


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("x = 2\nprint(x * 3)", "6"),
        ("print(sqrt(16) + math.pi > 7)", "True"),
        ("print(int(np.arange(4).sum()))", "6"),
        ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nprint(f(5))", "120"),
        ("print('a')\nprint('b')", "a\nb"),
    ],
)
def test_a_program_prints_its_answer(sandbox: Sandbox, program: str, output: str) -> None:
    found = program_in(program)
    assert found is not None
    assert sandbox.run(found) == programs.Ran(output, "well")


@pytest.mark.parametrize("program", ["print(1/0)", "print(", "print(1)\nraise SystemExit(3)"])
def test_a_program_that_fails_has_no_answer(sandbox: Sandbox, program: str) -> None:
    assert sandbox.run(program) == programs.Ran("", "error")


def test_a_program_is_nobody_and_sees_no_tokens(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [Path.home() / ".ray" / "auth_token", Path.home() / ".cache/huggingface/token"]
    tokens.append(tmp_path / "token")
    tokens[-1].write_text("SECRET")
    monkeypatch.setenv("HF_TOKEN", "SECRET")
    said = sandbox.run(
        "import os\nprint(os.getuid(), sorted(os.environ))\n"
        f"for path in {list(map(str, tokens))}:\n    print(os.path.exists(path))"
    ).output
    assert said.splitlines() == [
        "65534 ['LC_CTYPE', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PWD']",
        *["False"] * 3,
    ]


def test_a_program_reaches_no_socket_of_the_host(sandbox: Sandbox, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as raylet, socket.create_server(("127.0.0.1", 0)) as server:
        raylet.bind(str(tmp_path / "raylet"))
        raylet.listen()
        port = server.getsockname()[1]
        places = [("AF_UNIX", str(tmp_path / "raylet")), ("AF_INET", ("127.0.0.1", port))]
        for family, address in places:
            ran = sandbox.run(f"import socket\nsocket.socket(socket.{family}).connect({address!r})")
            assert ran.ended == "error"


HOSTILE = {
    "forks for ever": ("import os\nwhile True:\n    os.fork()", {"error", "time"}),
    "starts threads for ever": (
        "import threading, time\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(9,)).start()",
        {"error", "time"},
    ),
    "leaves a process behind": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.close(1)\n    os.close(2)\n"
        f"    time.sleep(999)\n{LAST}",
        {"well", "time"},
    ),
    "fills the memory": ("a = bytearray(1 << 33)", {"error"}),
    "computes for ever": ("while True:\n    pass", {"time", "error"}),
    "prints for ever": ("while True:\n    print('x' * 1000)", {"output"}),
    "prints for ever to stderr": (
        "import sys\nwhile True:\n    print('x' * 1000, file=sys.stderr)", {"output"}
    ),
    "sleeps for ever": ("import time\ntime.sleep(999)", {"time"}),
    "writes a long file": ("open('/tmp/x', 'wb').write(bytes(1 << 24))", {"error"}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("sandbox")
def test_a_program_ends_and_leaves_nothing(name: str) -> None:
    program, ends = HOSTILE[name]
    with Sandbox(seconds=1.5) as own:
        assert own.run(program).ended in ends
    assert left_over() == []


TRIED = {
    "writes outside": """
for path in ("/usr/x", "/x", "/dev/x", "/dev/shm/x", "/var/x", "/proc/sys/kernel/core_pattern"):
    try:
        open(path, "w").write("x")
    except OSError:
        pass
    else:
        print(path)
""",
    "kills its parent": """
import os
for process in (os.getppid(), 1):
    try:
        os.kill(process, 9)
    except PermissionError:
        pass
    else:
        print(process)
""",
    "types into the terminal": """
import fcntl, os, termios
try:
    os.setsid()
except OSError:
    pass
for number in (0, 1, 2):
    try:
        fcntl.ioctl(number, termios.TIOCSTI, b"x")
    except OSError:
        pass
    else:
        print(number)
try:
    print(os.open("/dev/tty", os.O_RDWR))
except OSError:
    pass
""",
    "reads of other processes": """
import glob, os
own = f"/proc/{os.getpid()}/"
for path in glob.glob("/proc/[0-9]*/"):
    for name in ("environ", "mem", "fd", "root"):
        try:
            os.listdir(path + name) if name in ("fd", "root") else open(path + name).read(9)
        except OSError:
            pass
        else:
            if path != own:
                print(path)
""",
    "makes namespaces, traces, shares memory": """
import ctypes
libc = ctypes.CDLL(None)
for found in (libc.unshare(0x10000000), libc.ptrace(16, 1, 0, 0), libc.shmget(0, 4096, 0o1600)):
    if found != -1:
        print(found)
""",
    "becomes root again": """
import os
for change in (os.setuid, os.setgid):
    try:
        change(0)
    except PermissionError:
        pass
    else:
        print(change)
""",
    "raises its limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, PermissionError):
        pass
    else:
        print(kind)
""",
    "keeps files of its starter": """
import os
for number in range(3, 64):
    try:
        print(os.readlink(f"/proc/self/fd/{number}"))
    except OSError:
        pass
""",
}


@pytest.mark.parametrize("name", TRIED)
def test_a_program_cannot(sandbox: Sandbox, name: str) -> None:
    assert sandbox.run(TRIED[name] + LAST) == programs.Ran("went on", "well")


def test_a_program_fills_no_disk(sandbox: Sandbox) -> None:
    ran = sandbox.run(
        "total = 0\ntry:\n    for number in range(99):\n"
        "        total += open(f'/tmp/{number}', 'wb', 0).write(bytes(1 << 20))\n"
        "except OSError:\n    pass\nprint(total)"
    )
    assert int(ran.output) <= FILES_BYTES


def test_nothing_runs_without_a_sandbox(tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    broken.chmod(0o755)
    with (
        Sandbox(bwrap=str(broken)) as sandbox,
        pytest.raises(UserError, match=r"no namespaces here.*never run without a sandbox"),
    ):
        sandbox.check()
    with Sandbox() as sandbox:
        sandbox.bwrap = None
        with pytest.raises(UserError, match="there is no bwrap"):
            sandbox.check()
