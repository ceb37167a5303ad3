"""What a process that computes tells the C library about memory."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
LARGEST_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Have freed memory stay with this process for its next allocations, pieces above LARGEST_KEPT bytes left out; only glibc can.

    By default every activation above 32 MiB is mapped anew and given back to the kernel, which clears its pages each time they are
    touched: on a CPU a sixth of scoring in bf16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Give memory that was freed back to the system now, holes within what is used included; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
