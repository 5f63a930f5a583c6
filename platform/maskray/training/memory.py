"""The host's memory, as the C library hands it out."""

from __future__ import annotations

import ctypes
import platform

# Of <malloc.h>: the largest values that `mallopt`, which takes an int, and glibc accept.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _HEAP_BYTES = 2**31 - 1, 2**30


def keep_freed_memory() -> None:
    """Keep what a step on the CPU frees for the next one, in the whole process; elsewhere than in glibc nothing is set.

    By default glibc gives large blocks back to the system, which zeroes each page that it hands out again: up to a
    fifth of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)
