"""glibc is told to keep the memory that a chunk of columns frees for the next chunk.

This is a setting of the whole process, made when columns are first propagated on a CPU, never on
import. `NNJ_MALLOPT=0` in the environment switches it off; where MALLOC_TRIM_THRESHOLD_,
MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES is set, what it says holds."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from typing import Any

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_MOST = 2**30  # mallopt takes an int
SWITCH = "NNJ_MALLOPT"
SET_BY_USERS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"
STATM = "/proc/self/statm"  # of proc(5)
PAUSE = 0.02  # seconds between two looks at the heap
_kept = 0
_looked = 0.0
_least = sys.maxsize  # of what is resident and not in use


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


def give_back(memory: float) -> None:
    """Give what is free in the heap back to the system, where it is more than half of `memory`
    again: until glibc 2.38 an aligned block does not fit into the hole that one of the same size
    has left, and with depth there are more and more holes.
    """
    global _looked, _least
    now = time.perf_counter()
    if not _kept or now - _looked < PAUSE:
        return
    _looked = now
    free = _resident_and_free()
    if free is None:
        return
    _least = min(_least, free)
    if free - _least > memory / 2:
        ctypes.CDLL(None).malloc_trim(0)
        _least = _resident_and_free() or 0


class _Mallinfo(ctypes.Structure):
    """What mallinfo2(3) tells."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        )
    ]


@functools.cache
def _mallinfo() -> Any:
    """mallinfo2 of the C library; None where it has none."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is not None:
        ask.restype = _Mallinfo
    return ask


def _resident_and_free() -> int | None:
    """The bytes of the process that are resident and not in use by malloc, up to a constant (the
    code, for one); None where the C library does not tell.
    """
    ask = _mallinfo()
    if ask is None:
        return None
    try:
        with open(STATM, "rb", buffering=0) as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return None
    info = ask()
    return int(resident - info.uordblks - info.hblkhd)


def _is_up_to_users() -> bool:
    return os.environ.get(SWITCH) == "0" or any(name in os.environ for name in SET_BY_USERS)
