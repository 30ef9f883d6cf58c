"""The state of one place over all passes: merged, or the rows of samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnj.collecting.quantity import Quantity


class Part(NamedTuple):
    """What a group of samples has at a holder.

    Attributes:
        start: the number of its first sample.
        samples: how many there are.
        state: of them.
    """

    start: int
    samples: int
    state: Any


class Merged:
    """The states that reached one holder, merged: of sums over samples. What no samples have adds
    nothing, and stands only while there is nothing else.

    Attributes:
        reached: whether there is one, be it None: then of some samples nothing is known.
    """

    def __init__(self, merge: Callable[[Any, Any], Any]) -> None:
        self._merge, self._state = merge, None
        self.reached = False
        self._of_none = False  # whether the state is one of no samples

    def with_pass(self, found: list[Part]) -> tuple[Any, bool]:
        """What `take` is to be given of one pass."""
        known: list[Any] = [self._state] if self.reached else []
        counted = [part.state for part in found if part.samples]
        if not counted:
            return (known or [found[0].state])[0], self._of_none or not known
        return functools.reduce(self._of_two, counted if self._of_none else known + counted), False

    def _of_two(self, one: Any, other: Any) -> Any:
        return None if one is None and other is None else self._merge(one, other)

    def begin(self, state: Any) -> None:
        """Take in a state that is all that there is."""
        self._state, self.reached = state, True

    def take(self, given: tuple[Any, bool]) -> None:
        """Take in the state with one pass more."""
        self._state, self._of_none = given
        self.reached = True

    def state(self, samples: int) -> Any:
        """All of them; None if nothing reached the holder."""
        return self._state

    @property
    def shape(self) -> torch.Size | None:
        """Of what one sample may add."""
        return None if self._state is None else getattr(self._state, "shape", torch.Size())


class Rows:
    """The rows of all samples at one holder; they are joined only when somebody asks for them."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._length = 0

    def with_pass(self, found: list[Part]) -> list[Part]:
        """What `take` is to be given of one pass.

        Errors: ValueError for what has not a row for each sample.
        """
        for _, samples, rows in found:
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            if not isinstance(shape, tuple) or shape[:1] != (samples,):
                raise ValueError(
                    f"results that are per_sample have a row for each sample, ({samples}, ...), "
                    f"and here is {shape}"
                )
        return found

    def begin(self, state: Tensor) -> None:
        """Take in rows that are all that there are."""
        self.take([Part(0, len(state), state)])

    def take(self, found: list[Part]) -> None:
        """Take in the rows of one pass."""
        for start, _, rows in found:
            if rows.untyped_storage().nbytes() != rows.nbytes:
                rows = rows.clone(memory_format=torch.contiguous_format)  # a view of all columns
            self._fill(start, rows)
            self._parts.append(rows)
            self._length += len(rows)

    @property
    def reached(self) -> bool:
        """Whether there are any."""
        return bool(self._parts)

    def state(self, samples: int) -> Tensor | None:
        """(samples, ...); None if nothing reached the holder."""
        if not self._parts:
            return None
        self._fill(samples, self._parts[0])
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    @property
    def shape(self) -> torch.Size | None:
        """Of the row of one sample."""
        return self._parts[0].shape[1:] if self._parts else None

    def _fill(self, length: int, like: Tensor) -> None:
        """Zeros for the samples before number `length` that did not reach the holder."""
        if length > self._length:
            self._parts.append(like.new_zeros((length - self._length, *like.shape[1:])))
            self._length = length


def empty(quantity: Quantity) -> Merged | Rows:
    """What a place has before anything reaches it."""
    return Rows() if quantity.per_sample else Merged(quantity.merge)
