"""Settings of the C library's memory allocation for a process that computes."""

import ctypes

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Have freed memory stay with this process for its next allocations; only glibc can.

    Pieces above LARGEST_KEPT bytes still go back to the system. By default every activation above
    32 MiB is mapped anew and returned to the kernel, which clears its pages each time they are
    touched: on a CPU a sixth of the time of scoring in bf16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Return freed memory to the system now, holes within what is used included; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
