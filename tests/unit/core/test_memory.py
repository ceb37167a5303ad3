"""Freed memory stays with a process that asked for it."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource, sys
from s2l_ray.core.memory import keep_freed_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
def touch():
    place = c.malloc(1 << 26)
    ctypes.memset(place, 1, 1 << 26)
    c.free(place)
if sys.argv[1] == "keep":
    keep_freed_memory()
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_memory_is_used_again_without_new_pages() -> None:
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", COUNT, how], check=True, capture_output=True
            ).stdout
        )
        for how in ("keep", "give back")
    }
    assert faults["keep"] < 100 < faults["give back"]
