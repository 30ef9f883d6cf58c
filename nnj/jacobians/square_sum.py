"""sum over columns and samples of B^2, of columns that come in chunks."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from typing_extensions import Self


class Later(Protocol):
    """What adds up over chunks in another form than that of B^2, and becomes it only once."""

    def add_(self, other: Self, /) -> Self:
        """Add another one in place."""
        ...

    def value(self) -> Tensor:
        """(*shape)."""
        ...


class SquareSum:
    """sum over columns and samples of B^2, of columns that come in chunks: terms of
    `Factor.squares` add up with + (in place), and `value` is the sum.

    Args:
        total: what is summed, (*shape), which later terms are added to in place.
        later: what is cheaper to add up in a form of its own, such as kernels V^T V.
    """

    def __init__(self, total: Tensor | None = None, later: Later | None = None):
        self.total, self.later = total, later

    def __add__(self, other: SquareSum) -> SquareSum:
        self.total = _added(self.total, other.total)
        self.later = _added(self.later, other.later)
        return self

    def value(self) -> Tensor:
        """The sum, (*shape)."""
        if self.later is None:
            assert self.total is not None
            return self.total
        found = self.later.value()
        return found if self.total is None else found + self.total


def _added(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a.add_(b)
