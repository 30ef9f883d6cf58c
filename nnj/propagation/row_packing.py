"""Columns of rows as columns of samples: those of all rows of a sample, one behind the other, since
each goes on alone, zero at the entries of all other rows.

Where rows have numbers of columns of their own, as under a tolerance, a sample has as many as its
rows have together: the cost behind the last mixing follows the mean uncertainty of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nnj.checks import enough


class Packed(NamedTuple):
    """Of each column of samples and each sample, (Q, N): which column of which row stands there;
    row is -1 where nothing does.
    """

    column: Tensor
    row: Tensor


class RowPacking:
    """Which columns of rows stand in which column of samples.

    Args:
        sample: (R,), of each row; n where it is nobody's, or has no column.
        n: the number of samples.
        counts: (R,), how many columns a row has; None where all have all.
    """

    def __init__(self, sample: Tensor, n: int, counts: Tensor | None = None):
        self.sample, self.n, self.counts = sample, n, counts
        # rows by sample, and where those of each begin
        self._sorted, self._order = sample.sort(stable=True)
        self._first = torch.searchsorted(self._sorted, self._sorted)

    @cached_property
    def slots(self) -> int:
        """How many rows a sample has at most."""
        position = torch.arange(len(self.sample), device=self.sample.device)
        number = torch.where(self._sorted < self.n, position - self._first + 1, 0)
        # one of zeros, if there is none
        return max(1, enough(number.max(), len(number)) if len(number) else 1)

    def _ends(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of each row, by sample: how many of some columns it has, and how many its sample has up
        to it.
        """
        assert self.counts is not None
        mine = (self.counts[self._order] - start).clamp(0, stop - start)
        mine = torch.where(self._sorted < self.n, mine, 0)
        total = mine.cumsum(0)
        before = total - mine
        return mine, total - before[self._first]

    def sizes(self, cuts: Sequence[tuple[int, int]]) -> list[int]:
        """How many columns of samples come of columns start to stop of rows, for some of these."""
        if self.counts is None:
            return [(stop - start) * self.slots for start, stop in cuts]
        if not len(self.sample) or not cuts:
            return [1] * len(cuts)
        found = torch.stack([self._ends(*cut)[1].max() for cut in cuts])
        return [max(1, size) for size in found.tolist()]

    def table(self, start: int, stop: int, size: int) -> Packed:
        """Where columns start to stop of rows stand, `size` in all."""
        k = stop - start
        column = torch.arange(k, device=self.sample.device)[:, None]
        if self.counts is None:
            position = torch.arange(len(self.sample), device=self.sample.device) - self._first
            there = column * self.slots + position
            alive = self._sorted < self.n
        else:
            mine, end = self._ends(start, stop)
            there, alive = end - mine + column, column < mine
        at = torch.where(alive, there * self.n + self._sorted, size * self.n).flatten()
        row = self._order.expand(k, -1).flatten()
        empty = torch.full((size * self.n + 1,), -1, device=row.device)
        rows = empty.index_put((at,), row)[:-1].view(size, self.n)
        columns = column.expand(k, len(self.sample)).flatten()
        return Packed(empty.clamp(min=0).index_put((at,), columns)[:-1].view(size, self.n), rows)

    def spread(self, v: Tensor, of: Tensor, packed: Packed) -> Tensor:
        """Columns of rows (k, *shape) as columns of samples (Q, *shape).

        Args:
            of: the row of each entry, of a shape that broadcasts.
        """
        sample = self.sample[of]
        nobody = sample >= self.n
        sample = sample.clamp(max=max(0, self.n - 1))
        column, row = (t[:, sample] for t in packed)
        found = v.gather(0, column.expand(-1, *v.shape[1:]))
        return found * ((row == of) & ~nobody)


def in_parts(packed: Packed, size: int) -> Iterator[Packed]:
    """Some columns of samples after the other, at most `size` at a time."""
    for column, row in zip(packed.column.split(size), packed.row.split(size), strict=True):
        yield Packed(column, row)
