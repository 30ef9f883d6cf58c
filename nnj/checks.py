"""Numbers that a sentence tells and that decide nothing: where a pass is traced, they are no
question to the tensor (`nnj.compiling.questions`).
"""

from __future__ import annotations

import threading

from torch import Tensor


class _Saying(threading.local):
    """Whether a number is asked for a sentence."""

    now = False


_saying = _Saying()


def is_saying() -> bool:
    """Whether the number that is asked for is only said."""
    return _saying.now


def number(t: Tensor) -> float:
    """A tensor without axes as a number, for a message alone."""
    _saying.now = True
    try:
        return float(t)
    finally:
        _saying.now = False
