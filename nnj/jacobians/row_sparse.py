"""B with few rows that are not zero: the factor at a table, of which a sample reads some rows."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor, Pairs


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

    def _theirs(self, other: Factor) -> Tensor:
        """The entries of another factor where this one is not zero, (K', pairs, *shape[1:])."""
        if isinstance(other, RowSparse) and other.sample is self.sample and other.row is self.row:
            return other.v
        return other.entries(self.sample, self.row)

    def _there(self, d: Tensor) -> Tensor:
        """The entries of a d of (*shape) or (N, *shape) where B is not zero."""
        return d[self.sample, self.row] if self._lead(d) else d[self.row]

    def _flat(self, v: Tensor) -> Tensor:
        """(K, pairs, *shape[1:]) with one axis for what is in a row."""
        return v.reshape(*v.shape[:2], math.prod(self.shape[1:]))

    def inner(self, other: Factor, per_sample: bool = False) -> Tensor:
        products, total = (self.v * self._theirs(other)).sum(0), self._zeros(per_sample)
        if per_sample:
            total[self.sample, self.row] = products
            return total
        return total.index_add_(0, self.row, products)

    def kernel(self, other: Factor, pairs: Pairs = "all") -> Tensor:
        if pairs == "all":
            return super().kernel(other, pairs)
        mine, theirs = self._flat(self.v), self._flat(self._theirs(other))
        if pairs == "row":
            total = self.v.new_zeros(self.k, self.n)
            return total.index_add_(1, self.sample, (mine * theirs).sum(-1))
        total = self.v.new_zeros(self.n, self.k, other.k)
        return total.index_add_(0, self.sample, mine.transpose(0, 1) @ theirs.permute(1, 2, 0))

    def kernel_from(self, first: Factor, pairs: Pairs) -> Tensor:
        if pairs == "all":
            return super().kernel_from(first, pairs)
        return self.kernel(first, pairs).mT if pairs == "sample" else self.kernel(first, pairs)

    def matvec(self, v: Tensor) -> Tensor:
        moved = self._flat(self.v * self._there(v)).sum(-1)
        return self.v.new_zeros(self.k, self.n).index_add_(1, self.sample, moved)

    def rmatvec(self, c: Tensor) -> Tensor:
        v = torch.einsum("km,km...->m...", c[:, self.sample], self.v)
        return self._zeros().index_add_(0, self.row, v)

    def scale(self, d: Tensor) -> Factor:
        return RowSparse(self.v * self._there(d), self.sample, self.row, self.n, self.shape)

    def scale_rows(self, c: Tensor) -> Factor:
        there = c[:, self.sample].reshape(*self.v.shape[:2], *[1] * (self.v.dim() - 2))
        return RowSparse(self.v * there, self.sample, self.row, self.n, self.shape)

    def rotate(
        self, left: Tensor | None, right: Tensor | None, shape: Sequence[int] | None = None
    ) -> Factor:
        if left is not None or right is None or len(right) > 1:
            return super().rotate(left, right, shape)
        shape = shape or (self.shape[0], right.shape[2])
        v = (self._flat(self.v) @ right[0]).reshape(*self.v.shape[:2], *shape[1:])
        return RowSparse(v, self.sample, self.row, self.n, shape)

    def square_sum(self, per_sample: bool = False) -> Tensor:
        return self.inner(self, per_sample)

    def merge_key(self) -> Hashable:
        return RowSparse

    def merge(self, uses: Sequence[RowSparse]) -> Factor:
        v = torch.cat([use.v for use in uses], 1)
        sample, row = torch.cat([use.sample for use in uses]), torch.cat([use.row for use in uses])
        return RowSparse.build(v, sample, row, self.n, self.shape)
