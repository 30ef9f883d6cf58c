"""Sums over what comes one after the other: the uses of one parameter, and squares of columns that
come in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor, RowSparse
from nnj.jacobians.outer_product import OuterProduct, Patches, kernel_squares


class SquareSum:
    """sum over columns and samples of B^2, of columns that come in turns. Turns add up with +, and
    `value` is the sum.

    Where kernels are cheaper they add up over the turns, and meet U only once: diag(U (V^T V) U^T),
    no entry of B is formed."""

    def __init__(self, factor: Factor, in_all: int | None = None):
        self.shape, self.dtype = factor.shape, factor.dtype
        self.total: Tensor | None = None
        self.kernel: Tensor | None = None
        self.patches: Patches | None = None
        if isinstance(factor, OuterProduct) and factor.by_gram(in_all or factor.k):
            self.kernel, self.patches = factor.kernels(), factor.patches
        elif isinstance(factor, OuterProduct):
            self.total = factor.explicit_squares()
        else:
            self.total = factor.square_sum()

    def __add__(self, other: SquareSum) -> SquareSum:
        sum_of = lambda a, b: b if a is None else a if b is None else a.add_(b)
        self.total, self.kernel = sum_of(self.total, other.total), sum_of(self.kernel, other.kernel)
        self.patches = self.patches or other.patches
        return self

    def value(self) -> Tensor:
        """(*shape)."""
        if self.kernel is None or self.patches is None:
            assert self.total is not None
            return self.total
        found = kernel_squares(self.kernel, self.patches).to(self.dtype).reshape(self.shape)
        return found if self.total is None else found + self.total


class SumFactor(Factor):
    """B1 + B2 + ...: the uses of one parameter. They are added before anything is squared."""

    def __init__(self, parts: Sequence[Factor]):
        self.parts = list(parts)
        first = self.parts[0]
        self.k, self.n, self.shape, self.device, self.dtype = (
            first.k,
            first.n,
            first.shape,
            first.device,
            first.dtype,
        )

    def dense(self) -> Tensor:
        return torch.stack([part.dense() for part in self.parts]).sum(0)

    def columns(self, which: slice) -> Factor:
        return SumFactor([part.columns(which) for part in self.parts])

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        return torch.stack([part.entries(sample, index) for part in self.parts]).sum(0)

    def square_sum(self) -> Tensor:
        if not any(isinstance(part, RowSparse) for part in self.parts):
            return super().square_sum()
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for a, first in enumerate(self.parts):
            total += first.square_sum()
            for second in self.parts[a + 1 :]:
                total += 2 * first.inner(second)
        return total


def merge_factors(parts: Sequence[Factor]) -> Factor:
    """One factor for all uses of a parameter."""
    if len(parts) == 1:
        return parts[0]
    forms = {
        (p.v.shape[2], p.v.shape[3], p.patches.inputs) if isinstance(p, OuterProduct) else None
        for p in parts
    }
    if len(forms) == 1 and None not in forms:
        places = [p for p in parts if isinstance(p, OuterProduct)]
        u = Patches(
            lambda rows: torch.cat([p.patches(rows) for p in places], -1),
            parts[0].n,
            places[0].patches.inputs,
        )
        return OuterProduct(u, torch.cat([p.v for p in places], -1), parts[0].shape)
    if all(isinstance(p, RowSparse) for p in parts):
        found = [p for p in parts if isinstance(p, RowSparse)]
        v, sample, row = (
            torch.cat([getattr(p, name) for p in found], d)
            for name, d in (("v", 1), ("sample", 0), ("row", 0))
        )
        return RowSparse.build(v, sample, row, parts[0].n, parts[0].shape)
    sparse = [p for p in parts if isinstance(p, RowSparse)]
    rest = [p for p in parts if not isinstance(p, RowSparse)]
    if not sparse or not rest:
        return SumFactor(parts)
    return SumFactor([merge_factors(rest), merge_factors(sparse)])
