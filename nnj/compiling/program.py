"""What is traced and replayed: a function of a batch and of modules, without side effects, and what
becomes of its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Untraceable(Exception):
    """What a function does cannot be part of a graph; the message says what."""


class Program(Generic[T]):
    """A pass. A subclass must define all of it.

    Attributes:
        modules: those that it reads, with all their parts.
    """

    modules: Sequence[nn.Module] = ()

    def eager(self, batch: Any) -> T:
        """The pass as it is without any graph."""
        raise NotImplementedError(f"{type(self).__name__} must define eager")

    def run(self, batch: Any, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """The results of the pass, and how they are laid out.

        Args:
            inputs: all tensors on which it depends; results that belong to one of them are to be
                laid out by its number, since it may be another tensor in a replay.
        """
        raise NotImplementedError(f"{type(self).__name__} must define run")

    def take(self, results: Sequence[Tensor], layout: Any, inputs: Sequence[Tensor]) -> T:
        """What `eager` gives and does, from the results of `run`."""
        raise NotImplementedError(f"{type(self).__name__} must define take")
