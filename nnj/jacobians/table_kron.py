"""The Kronecker factors at a table, of which each place reads a row: A is a diagonal of counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnj.jacobians.kron import Approx, Kron


class TableKron(Kron):
    """Of rows of a table: u is a row of the identity, and A is diagonal. Of reduce it is the
    diagonal of sum u u^T, which is not.

    Args:
        v: (K, M, *row), what arrives at M places.
        sample, row: (M,), of which sample a place is, and which row it reads; with a negative
            sample it is none.
        n, rows: N, and how many rows the table has.
    """

    inputs_first = True

    def __init__(self, v: Tensor, sample: Tensor, row: Tensor, n: int, rows: int, approx: Approx):
        self.v = v.reshape(*v.shape[:2], math.prod(v.shape[2:]))
        self.sample, self.row, self.n, self.rows = sample, row, n, rows
        self.reduce = approx == "reduce"

    def forget_columns(self) -> None:
        super().forget_columns()
        self.v = self.v.new_empty(0)

    def outer_v(self) -> Tensor:
        there = (self.sample >= 0).nonzero()[:, 0]
        v = self.v[:, there]
        if self.reduce:
            total = v.new_zeros(len(v), self.n, v.shape[2])
            v = total.index_add_(1, self.sample[there], v)
        flat = v.reshape(-1, v.shape[2])
        return (flat.mT @ flat)[None]

    def outer_u(self, alive: Tensor | None = None, ones: bool = False) -> Tensor:
        if ones:
            raise ValueError("a table has no bias")
        there = self._counted(alive).nonzero()[:, 0]
        sample, row = self.sample[there], self.row[there]
        total = self.v.new_zeros(self.rows)
        if not self.reduce:
            return total.index_add_(0, row, self.v.new_ones(len(row)))[None]
        pair, times = torch.unique(sample * self.rows + row, return_counts=True)
        sample, row = pair // self.rows, pair % self.rows
        places = self.v.new_zeros(self.n).index_add_(0, sample, times.to(self.v.dtype))
        return total.index_add_(0, row, (times / places[sample]).square())[None]

    def count(self, alive: Tensor | None = None) -> Tensor:
        if not self.reduce:
            return self._counted(alive).sum().to(self.v.dtype)
        if alive is None:
            return self.v.new_full((), self.n)
        found = torch.zeros(self.n, dtype=torch.bool, device=alive.device)
        found[self.sample[self._counted(alive)]] = True
        return found.sum().to(self.v.dtype)

    def alive(self) -> Tensor:
        return (self.v != 0).any(-1).any(0) & (self.sample >= 0)

    def _counted(self, alive: Tensor | None) -> Tensor:
        there = self.sample >= 0
        return there if alive is None else there & alive
