"""What is asked of tensors: values that must be refused, all of them at once after a pass, since
each question stops the queue of a device; and numbers that decide little or nothing, so that a pass
that is traced need not be traced again when they are others (`nnj.compiling.questions`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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


# -- values that must be refused -------------------------------------------------------------------


class Refusals:
    """What is to be refused unless some values are fine, noted while they are on their device."""

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Callable[[], Exception]]] = []

    def note(self, fine: Tensor, error: Callable[[], Exception]) -> None:
        """`error()` is to be raised unless `fine`, a truth without axes, is true."""
        self._noted.append((fine, error))

    def first(self) -> Exception | None:
        """The first error of all that was noted, by one question to each device; then all is
        forgotten.
        """
        noted, self._noted = self._noted, []
        by_device: dict[torch.device, list[Tensor]] = {}
        for fine, _ in noted:
            by_device.setdefault(fine.device, []).append(fine)
        flags = (f[0] if len(f) == 1 else torch.stack(f).all() for f in by_device.values())
        if all(bool(flag) for flag in flags):
            return None
        return next(error() for fine, error in noted if not bool(fine))

    @contextmanager
    def later(self) -> Iterator[None]:
        """What is refused inside is noted. An error inside gives way to what was noted before it:
        that came first.
        """
        before, _waiting.refusals = _waiting.refusals, self
        try:
            yield
        except Exception:
            self.ask()
            raise
        finally:
            _waiting.refusals = before

    def ask(self) -> None:
        """Errors: the first of all that was noted."""
        error = self.first()
        if error is not None:
            raise error


class _Waiting(threading.local):
    """Where refusals are noted; None where values are asked for at once."""

    refusals: Refusals | None = None


_waiting = _Waiting()


def all_finite(t: Tensor) -> Tensor:
    """Whether all entries are finite, a truth without axes: t - t is zero then, and else nan. Less
    passes over t than isfinite makes.
    """
    return (t - t).sum() == 0


def refuse_unless(fine: Tensor, error: Callable[[], Exception]) -> None:
    """Raise `error()` unless `fine`, a truth without axes, is true: at once, or after the pass
    where one waits (`Refusals.later`).
    """
    refusals = _waiting.refusals
    if refusals is not None:
        refusals.note(fine, error)
    elif not bool(fine):
        raise error()


def ask_now() -> None:
    """Errors: the first of what was noted so far. Before anything is learnt from values that would
    be refused.
    """
    if _waiting.refusals is not None:
        _waiting.refusals.ask()


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, wrong values raise where they are seen: somebody may go another way then."""
    before, _waiting.refusals = _waiting.refusals, None
    try:
        yield
    finally:
        _waiting.refusals = before
