"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
SET_BY_USERS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"
_kept = 0


def keep_heap(memory: int) -> None:
    """Let glibc keep up to `memory` bytes of what is freed, instead of giving it back to the system
    and faulting it in anew.

    It takes large blocks from the system one by one, and gives the end of its heap back as soon as
    it is free (mallopt(3)): a sweep then spends up to a fifth of its time on pages that the kernel
    clears. What users set in the environment holds."""
    global _kept
    memory = min(memory, 2**30)
    if (
        memory <= _kept
        or sys.platform != "linux"
        or any(name in os.environ for name in SET_BY_USERS)
    ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_MMAP, memory)
        mallopt(_TRIM, memory)
        _kept = memory
