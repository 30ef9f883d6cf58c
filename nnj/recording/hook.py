"""What all hooks on modules are, those of models and those of losses."""

from __future__ import annotations

from types import FrameType
from typing import Protocol, TypeVar

from nnj.errors import NNJError


class _ScriptedError(NNJError, AttributeError):
    """An error of ours that `hasattr` and `getattr` with a default take for an attribute that is
    not there.
    """


class Hook:
    """A hook of ours: no function that torch.jit.script could compile, as it tries to."""

    @property
    def __name__(self) -> str:  # which nothing but torch.jit.script asks for
        raise _ScriptedError(
            "torch.jit.script compiles the hooks of a module, and those of nnj are none for it. "
            "Take them away first (nnj.retract of the model, or of the loss), script, and extend "
            "it again"
        )


class Frame(Protocol):
    """A call that is going on.

    Attributes:
        python: the frame of Python that made the call.
    """

    python: FrameType


F = TypeVar("F", bound=Frame)


def drop_finished(frames: list[F], python: FrameType) -> None:
    """Forget calls that ended without their hook being called (they raised, or were interrupted by
    the keyboard): those whose frame is not among the callers of `python`.
    """
    while frames:
        caller: FrameType | None = python
        last = frames[-1].python
        while caller is not None and caller is not last:
            caller = caller.f_back
        if caller is not None:
            return
        frames.pop()
