"""B with few rows that are not zero: the factor at a table, of which a sample reads some rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor


class RowSparse(Factor):
    """Rows of B that are not zero: v[k, i] stands at B[k, sample[i], row[i]].

    Args:
        v: (K, pairs, *shape[1:]).
        sample, row: (pairs,); every pair of them occurs once.
        n, shape: N, and the shape of the parameter.
    """

    sparse = True

    def __init__(self, v: Tensor, sample: Tensor, row: Tensor, n: int, shape: Sequence[int]):
        self.v, self.sample, self.row = v, sample, row
        self.k, self.n, self.shape = v.shape[0], n, tuple(shape)
        self.device, self.dtype = v.device, v.dtype

    @classmethod
    def build(
        cls, v: Tensor, sample: Tensor, row: Tensor, n: int, shape: Sequence[int]
    ) -> RowSparse:
        """From v of (K, M, *shape[1:]) in which pairs may repeat, and a negative sample means
        nobody's.
        """
        keep = (sample >= 0).nonzero()[:, 0]
        pair, where = torch.unique(sample[keep] * shape[0] + row[keep], return_inverse=True)
        total = v.new_zeros(v.shape[0], len(pair), *v.shape[2:]).index_add_(1, where, v[:, keep])
        return cls(total, pair // shape[0], pair % shape[0], n, shape)

    def dense(self) -> Tensor:
        out = self.v.new_zeros(self.k, self.n, *self.shape)
        out[:, self.sample, self.row] = self.v
        return out

    def columns(self, which: slice) -> Factor:
        return RowSparse(self.v[which], self.sample, self.row, self.n, self.shape)

    def to(self, dtype: torch.dtype) -> Factor:
        return RowSparse(self.v.to(dtype), self.sample, self.row, self.n, self.shape)

    def inner(self, other: Factor) -> Tensor:
        theirs = self.v if other is self else other.entries(self.sample, self.row)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return total.index_add_(0, self.row, (self.v * theirs).sum(0))

    def rmatvec(self, c: Tensor) -> Tensor:
        v = torch.einsum("km,km...->m...", c[:, self.sample], self.v)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return total.index_add_(0, self.row, v)

    def square_sum(self) -> Tensor:
        return self.inner(self)

    def merge_key(self) -> Hashable:
        return RowSparse

    def merge(self, uses: Sequence[RowSparse]) -> Factor:
        v = torch.cat([use.v for use in uses], 1)
        sample, row = torch.cat([use.sample for use in uses]), torch.cat([use.row for use in uses])
        return RowSparse.build(v, sample, row, self.n, self.shape)
