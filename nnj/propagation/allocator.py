"""glibc is told to keep the memory that a chunk of columns frees for the next chunk.

This is a setting of the whole process, made when columns are first propagated on a CPU, never on
import. `NNJ_MALLOPT=0` in the environment switches it off; where MALLOC_TRIM_THRESHOLD_,
MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES is set, what it says holds."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_MOST = 2**30  # mallopt takes an int
SWITCH = "NNJ_MALLOPT"
SET_BY_USERS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"
_kept = 0


def keep_heap(memory: int) -> None:
    """Let glibc keep up to `memory` bytes (1 GiB at most) of what is freed, instead of giving it
    back to the system and faulting it in anew.

    It takes large blocks from the system one by one, and gives the end of its heap back as soon as
    it is free (mallopt(3)): a sweep then spends up to a fifth of its time on pages that the kernel
    clears. The limit is only ever raised; nothing happens where users have said otherwise."""
    global _kept
    memory = min(memory, _MOST)
    if memory <= _kept or sys.platform != "linux" or _is_up_to_users():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_MMAP, memory)
        mallopt(_TRIM, memory)
        _kept = memory


def _is_up_to_users() -> bool:
    return os.environ.get(SWITCH) == "0" or any(name in os.environ for name in SET_BY_USERS)
