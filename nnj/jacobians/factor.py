"""B = V J: what columns V of the loss become at a parameter, one (N, *p) for each column, kept as
lazily as J allows.

A GGN is sum over columns k and samples n of B[k, n]^T B[k, n]. Its diagonal and its blocks are
asked of the *structure* of B, which mostly never stands in memory: `Places` holds the two thin
factors of B, `Lookup` its few rows that are not zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22  # entries of B that may stand in memory at once while it is being reduced


class Factor:
    """B of shape (K, N, *shape). Must define `dense` and `columns`; may override the rest, for
    speed alone.
    """

    k: int
    n: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """B itself, (K, N, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} must define dense")

    def write(self, out: Tensor, more: bool) -> None:
        """Put the only column into `out` of (N, P), or with `more` add it to what is there."""
        flat = self.dense()[0].reshape(out.shape)
        out.add_(flat) if more else out.copy_(flat)

    def columns(self, which: slice) -> Factor:
        """The same for some of the columns."""
        raise NotImplementedError(f"{type(self).__name__} must define columns")

    def to(self, dtype: torch.dtype) -> Factor:
        """The same in another precision."""
        return DenseFactor(self.dense().to(dtype))

    def chunks(self) -> list[Factor]:
        """Groups of columns of which the dense form is small."""
        step = max(1, CHUNK // max(1, self.n * math.prod(self.shape)))
        return [self.columns(slice(i, min(i + step, self.k))) for i in range(0, self.k, step)]

    def inner(self, other: Factor) -> Tensor:
        """sum over k and n of B * B', entry by entry: (*shape)."""
        if isinstance(other, RowSparse):
            return other.inner(self)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // max(1, self.n * math.prod(self.shape)))
        for i in range(0, self.k, step):
            part = slice(i, min(i + step, self.k))
            total += (self.columns(part).dense() * other.columns(part).dense()).sum((0, 1))
        return total

    def square_sum(self) -> Tensor:
        """sum over k and n of B^2: the diagonal of the GGN, (*shape)."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for part in self.chunks():
            total += part.dense().square().sum((0, 1))
        return total

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        """B[:, sample, index] for paired samples and indices of the first axis:
        (K, M, *shape[1:]).
        """
        return self.dense()[:, sample, index]

    def gram(self, other: Factor) -> Tensor:
        """sum over k and n of the outer products of B and B': the block of the GGN, (P, P')."""
        p, q = math.prod(self.shape), math.prod(other.shape)
        total = torch.zeros(p, q, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // max(1, self.n * (p + q)))
        for i in range(0, self.k, step):
            part = slice(i, min(i + step, self.k))
            a = self.columns(part).dense().reshape(-1, p)
            b = a if other is self else other.columns(part).dense().reshape(-1, q)
            total.addmm_(a.mT, b)
        return total


class DenseFactor(Factor):
    """B as it stands, b of (K, N, *shape)."""

    def __init__(self, b: Tensor):
        self.b = b
        self.k, self.n, self.shape = b.shape[0], b.shape[1], tuple(b.shape[2:])
        self.device, self.dtype = b.device, b.dtype

    def dense(self) -> Tensor:
        return self.b

    def columns(self, which: slice) -> Factor:
        return DenseFactor(self.b[which])


class RowSparse(Factor):
    """Rows of B that are not zero: v[k, m] stands at B[k, sample[m], row[m]]; every pair
    (sample, row) occurs once.
    """

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

    def square_sum(self) -> Tensor:
        return self.inner(self)
