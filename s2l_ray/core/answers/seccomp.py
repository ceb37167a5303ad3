"""A filter of system calls for programs of others, as bubblewrap loads it (classic BPF)."""

import errno
import os
import platform
import struct

from s2l_ray.errors import UserError

# What no answer to a question needs, and what has been a way out of sandboxes or round their
# limits: (name, its number on x86_64, on aarch64).
DENIED = (
    ("shmget", 29, 194), ("shmat", 30, 196), ("msgget", 68, 186), ("semget", 64, 190),
    ("ptrace", 101, 117), ("mount", 165, 40), ("umount2", 166, 39), ("pivot_root", 155, 41),
    ("unshare", 272, 97), ("setns", 308, 268), ("keyctl", 250, 219), ("add_key", 248, 217),
    ("request_key", 249, 218), ("bpf", 321, 280), ("perf_event_open", 298, 241),
    ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271), ("userfaultfd", 323, 282),
    ("io_uring_setup", 425, 425), ("memfd_create", 319, 279), ("open_tree", 428, 428),
    ("move_mount", 429, 429), ("fsopen", 430, 430), ("mount_setattr", 442, 442),
    ("memfd_secret", 447, 447), ("socket", 41, 198), ("socketpair", 53, 199),
)  # fmt: skip
# AUDIT_ARCH of linux/audit.h, and which column of DENIED is meant
_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
# x86_64 has its calls a second time, for another ABI, from this number on.
_SECOND_ABI = 0x40000000


def denying_filter() -> int:
    """An open file with the filter, for `bwrap --seccomp`; the caller closes it.

    Raises:
        UserError: the processor is neither x86_64 nor aarch64.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise UserError(
            f"preparing to run answers that are programs: expected x86_64 or aarch64, got "
            f"{machine}. Set evaluation.answers: chain."
        )
    audit, column = _ARCHITECTURES[machine]
    numbers = [entry[column] for entry in DENIED]
    rules = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, len(numbers) + 1, 0, _SECOND_ABI),
        *((_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERROR),
    ]
    read, write = os.pipe()
    with os.fdopen(write, "wb") as file:
        file.write(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    return read
