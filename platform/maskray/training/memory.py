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
    if _is_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)


def give_back_freed_memory() -> None:
    """Give back what was kept until now, but for the end of each arena, before another thread trains.

    glibc deals out eight arenas a core among threads, and what was freed in one is found again in that one alone: where
    each trial trains in a thread of its own, the process would come to hold what a step needs once for each arena.
    """
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
