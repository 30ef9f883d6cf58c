"""Numbers that are asked of a tensor and decide little or nothing, so that a pass that is traced
need not be traced again when they are others (`nnj.compiling.questions`); and whether it is traced.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from torch._guards import TracingContext


class _Asking(threading.local):
    """What a number that is asked for is needed for.

    Attributes:
        said: whether it is only said, in a message.
        most: if a larger one will do as well, the largest that it may be; else None.
    """

    said = False
    most: int | None = None


_asking = _Asking()


def being_traced() -> bool:
    """Whether a pass is being traced: then a loop over columns would be a graph as long as they are
    many.
    """
    return TracingContext.try_get() is not None


def is_said() -> bool:
    """Whether the number that is asked for is only said."""
    return _asking.said


def most() -> int | None:
    """The largest number that may be given in the place of a smaller one; None if it must be
    exact.
    """
    return _asking.most


def number(t: Tensor) -> float:
    """A tensor without axes as a number, for a message alone."""
    _asking.said = True
    try:
        return float(t)
    finally:
        _asking.said = False


def enough(t: Tensor, largest: int) -> int:
    """A number that is not below a tensor of one whole number, nor above `largest`: where a pass is
    traced, one that will serve others, too.
    """
    _asking.most = largest
    try:
        found: Any = t.item()
        return int(found)
    finally:
        _asking.most = None
