"""B = S^T J: the columns S of a loss's Hessian, pulled back to one parameter.

B has a row for each column k and sample n, and stands in memory as (K, N, *shape) only where it is
small. The GGN is B^T B, a sum over k and n, and each part of it is asked of the *structure* of B:
`OuterProduct` holds two thin factors U and V, `RowSparse` the few rows that are not zero,
`ViewFactor` what stands in some rows of a parameter or in another order."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

CHUNK = 1 << 22  # entries of B that may stand in memory at once while it is being reduced


class Factor:
    """B of shape (K, N, *shape): K columns, N samples, a parameter of `shape`.

    A subclass must define `dense` and `columns`, and set the attributes below. All else follows,
    and may be overridden for speed, never for meaning.

    Attributes:
        k, n, shape: K, N and the shape of the parameter.
        device, dtype: of B.
        sparse: whether few rows of B are not zero, so that `inner` with any other factor is best
            asked of this one.
    """

    k: int
    n: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    sparse: bool = False

    # -- must be defined ---------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """B itself, (K, N, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} must define dense")

    def columns(self, which: slice) -> Factor:
        """The same for some of the columns."""
        raise NotImplementedError(f"{type(self).__name__} must define columns")

    # -- may be overridden: what quantities ask ----------------------------------------------------

    def square_sum(self) -> Tensor:
        """sum over k and n of B^2, the diagonal of B^T B: (*shape), a tensor of its own."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for part in self._slices(self.n * math.prod(self.shape)):
            total += self.columns(part).dense().square().sum((0, 1))
        return total

    def squares(self, total_columns: int | None = None) -> SquareSum:
        """The same as a term that others are added to: these are some of `total_columns` columns
        (by default of K) that come in chunks.
        """
        return SquareSum(self.square_sum())

    def gram(self, other: Factor) -> Tensor:
        """B^T B', summed over k and n: the block of the GGN between two parameters, (P, P').

        A subclass that has a faster way with some others asks `super()` for all the rest.
        """
        return other.gram_from(self)

    def gram_from(self, first: Factor) -> Tensor:
        """`first.gram(self)` where `first` knows nothing faster than dense chunks; a view of a
        parameter asks `first` again, for what it is a view of.
        """
        p, q = math.prod(first.shape), math.prod(self.shape)
        total = torch.zeros(p, q, dtype=first.dtype, device=first.device)
        for part in self._slices(self.n * (p + q)):
            rows = (part.stop - part.start) * self.n
            a = first.columns(part).dense().reshape(rows, p)
            b = a if first is self else self.columns(part).dense().reshape(rows, q)
            total.addmm_(a.mT, b)
        return total

    def inner(self, other: Factor) -> Tensor:
        """sum over k and n of B * B', entry by entry: (*shape)."""
        if other.sparse and not self.sparse:
            return other.inner(self)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for part in self._slices(self.n * math.prod(self.shape)):
            total += (self.columns(part).dense() * other.columns(part).dense()).sum((0, 1))
        return total

    def rmatvec(self, c: Tensor) -> Tensor:
        """sum over k and n of c_kn B_kn, for c of (K, N): (*shape)."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for part in self._slices(self.n * math.prod(self.shape)):
            total += torch.tensordot(c[part], self.columns(part).dense(), 2)
        return total

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        """B[:, sample, index] for pairs of a sample and an index of the first axis of the
        parameter: (K, pairs, *shape[1:]).
        """
        return self.dense()[:, sample, index]

    def write(self, out: Tensor, more: bool) -> None:
        """Put the only column into `out` of (N, P), or with `more` add it to what is there."""
        flat = self.dense()[0].reshape(out.shape)
        out.add_(flat) if more else out.copy_(flat)

    def to(self, dtype: torch.dtype) -> Factor:
        """The same in another precision."""
        return DenseFactor(self.dense().to(dtype))

    # -- may be overridden: several uses of one parameter ------------------------------------------

    def merge_key(self) -> Hashable:
        """Uses of one parameter with the same key become one factor, by `merge` of the first.

        By default no other has the same.
        """
        return object()  # not the factor, which a stranger's class need not let be hashed

    def merge(self, uses: Sequence[Any]) -> Factor:
        """The sum of several factors, all with the key of this one, which is the first of them."""
        return SumFactor(uses)

    def _slices(self, entries: int) -> list[slice]:
        """All columns in slices for which a tensor of so many `entries` a column is small."""
        step = max(1, CHUNK // max(1, entries))
        return [slice(i, min(i + step, self.k)) for i in range(0, self.k, step)]


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


class SumFactor(Factor):
    """B = B_1 + B_2 + ...: uses of one parameter, which are added before anything is squared."""

    def __init__(self, parts: Sequence[Factor]):
        self.parts = list(parts)
        first = self.parts[0]
        self.k, self.n, self.shape = first.k, first.n, first.shape
        self.device, self.dtype = first.device, first.dtype

    def dense(self) -> Tensor:
        return torch.stack([part.dense() for part in self.parts]).sum(0)

    def columns(self, which: slice) -> Factor:
        return SumFactor([part.columns(which) for part in self.parts])

    def rmatvec(self, c: Tensor) -> Tensor:
        return torch.stack([part.rmatvec(c) for part in self.parts]).sum(0)

    def to(self, dtype: torch.dtype) -> Factor:
        return SumFactor([part.to(dtype) for part in self.parts])

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        return torch.stack([part.entries(sample, index) for part in self.parts]).sum(0)

    def square_sum(self) -> Tensor:
        sparse = [part for part in self.parts if part.sparse]
        if not sparse:
            return super().square_sum()
        # (B_1 + B_2)^2 = B_1^2 + 2 B_1 B_2 + B_2^2, where a sparse one is met in its rows alone
        thick = [part for part in self.parts if not part.sparse]
        terms = ([SumFactor(thick)] if len(thick) > 1 else thick) + sparse
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for a, first in enumerate(terms):
            total += first.square_sum()
            for second in terms[a + 1 :]:
                total += 2 * first.inner(second)
        return total


def merge_uses(uses: Sequence[Factor]) -> Factor:
    """One factor for all uses of a parameter: their sum, with those of one `merge_key` made one."""
    if len(uses) == 1:
        return uses[0]
    groups: dict[Hashable, list[Factor]] = {}
    for use in uses:
        groups.setdefault(use.merge_key(), []).append(use)
    parts = [group[0].merge(group) if len(group) > 1 else group[0] for group in groups.values()]
    return parts[0] if len(parts) == 1 else SumFactor(parts)


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
