"""B = S^T J: the columns S of a loss's Hessian, pulled back to one parameter.

B has a row for each column k and sample n, and stands in memory as (K, N, *shape) only where it is
small. The GGN is B^T B, a sum over k and n, and each part of it is asked of the *structure* of B:
`OuterProduct` holds two thin factors U and V, `RowSparse` the few rows that are not zero,
`ViewFactor` what stands in some rows of a parameter or in another order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nnj.jacobians.kron import Approx, Bias, Kron
from nnj.jacobians.square_sum import SquareSum

CHUNK = 1 << 22  # entries of B that may stand in memory at once while it is being reduced

# Between which rows of two factors a kernel is taken: every two of them, (K, N, K', N'); every two
# of one sample, (N, K, K'); each row and the same one of the other, (K, N).
Pairs = Literal["all", "sample", "row"]


class Factor:
    """B of shape (K, N, *shape): K columns, N samples, a parameter of `shape`.

    A subclass must define `dense` and `columns`, and set the attributes below. All else follows,
    and may be overridden for speed, never for meaning.

    Attributes:
        k, n, shape: K, N and the shape of the parameter.
        device, dtype: of B.
        sparse: whether few rows of B are not zero, so that `inner` with any other factor is best
            asked of this one.
        may_keep: whether there is room for what `kept` says.
    """

    k: int
    n: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    sparse: bool = False
    may_keep: bool = True

    # -- must be defined ---------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """B itself, (K, N, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} must define dense")

    def columns(self, which: slice) -> Factor:
        """The same for some of the columns."""
        raise NotImplementedError(f"{type(self).__name__} must define columns")

    # -- may be overridden: what quantities ask ----------------------------------------------------

    def square_sum(self, per_sample: bool = False) -> Tensor:
        """sum over k and n of B^2, the diagonal of B^T B: (*shape), a tensor of its own; with
        `per_sample` the sum over k alone, (N, *shape).
        """
        total = self._zeros(per_sample)
        for part in self._slices(self.n * math.prod(self.shape)):
            total += self.columns(part).dense().square().sum(0 if per_sample else (0, 1))
        return total

    def squares(self, total_columns: int | None = None) -> SquareSum:
        """The same as a term that others are added to: these are some of `total_columns` columns
        (by default of K) that come in chunks.
        """
        return SquareSum(self.square_sum())

    def kept(self, total_columns: int) -> int:
        """The bytes beside results that a term of `squares` takes until the last chunk."""
        return 0

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

    def inner(self, other: Factor, per_sample: bool = False) -> Tensor:
        """sum over k and n of B * B', entry by entry: (*shape); with `per_sample` the sum over k
        alone, (N, *shape).
        """
        if other.sparse and not self.sparse:
            return other.inner(self, per_sample)
        total = self._zeros(per_sample)
        for part in self._slices(self.n * math.prod(self.shape)):
            both = self.columns(part).dense() * other.columns(part).dense()
            total += both.sum(0 if per_sample else (0, 1))
        return total

    def kernel(self, other: Factor, pairs: Pairs = "all") -> Tensor:
        """B B'^T, summed over the entries of the parameter, between rows of both factors.

        A subclass that has a faster way with some others asks `super()` for all the rest.

        Args:
            other: at the same parameter, of the same samples but for pairs="all".
            pairs: "all" gives (K, N, K', N'), "sample" what is within each sample, (N, K, K'),
                "row" the diagonal of that, (K, N).
        """
        return other.kernel_from(self, pairs)

    def kernel_from(self, first: Factor, pairs: Pairs) -> Tensor:
        """`first.kernel(self)` where `first` knows nothing faster than dense chunks; a sum asks
        `first` again, for what it is a sum of.
        """
        size = math.prod(self.shape)
        if pairs == "row":
            total = torch.zeros(first.k, first.n, dtype=first.dtype, device=first.device)
            for part in first._slices(2 * first.n * size):
                total[part] = (first._rows(part) * self._rows(part)).sum(-1)
            return total
        within = pairs == "sample"
        shape = (first.n, first.k, self.k) if within else (first.k, first.n, self.k, self.n)
        total = torch.zeros(shape, dtype=first.dtype, device=first.device)
        for part in first._slices(first.n * size):
            a = first._rows(part)
            for other in self._slices(self.n * size):
                b = self._rows(other)
                if within:
                    total[:, part, other] = a.transpose(0, 1) @ b.permute(1, 2, 0)
                else:
                    total[part, :, other] = torch.tensordot(a, b, ([2], [2]))
        return total

    def matvec(self, v: Tensor) -> Tensor:
        """B v for v of (*shape), or (N, *shape) with one for each sample: (K, N)."""
        total = torch.zeros(self.k, self.n, dtype=self.dtype, device=self.device)
        flat = v.reshape(*self._lead(v), math.prod(self.shape))
        for part in self._slices(self.n * math.prod(self.shape)):
            total[part] = (self._rows(part) * flat).sum(-1)
        return total

    def rmatvec(self, c: Tensor) -> Tensor:
        """sum over k and n of c_kn B_kn, for c of (K, N): (*shape)."""
        total = self._zeros()
        for part in self._slices(self.n * math.prod(self.shape)):
            total += torch.tensordot(c[part], self.columns(part).dense(), 2)
        return total

    def scale(self, d: Tensor) -> Factor:
        """B diag(d): the entries of B times d of (*shape), or (N, *shape) with one for each
        sample.
        """
        return ScaledFactor(self, d)

    def kron(self, approx: Approx = "expand") -> list[Kron] | None:
        """The Kronecker factors of B^T B: of all of the parameter, or of each view of it that has
        some. None where they mean nothing: at a scale or a bias by itself, and where B is not known
        to be a sum over places of v u^T.
        """
        return None

    def output_squares(self, other: Factor) -> Tensor | None:
        """sum over rows and places of J * J', entry by entry, of the layer's own Jacobians at this
        parameter and another one of as many entries, which are diagonals: (P,), the GGN of half the
        summed squares of the layer's output. None where they are no diagonals, or unknown.
        """
        return None

    def biases(self) -> list[Bias]:
        """What of it is a sum of columns over places, as at a bias, for each view."""
        return []

    def rows(self, start: int, stop: int) -> Factor:
        """B in some rows of the parameter, as a factor at one of (stop - start, *shape[1:])."""
        return DenseFactor(self.dense()[:, :, start:stop])

    def rotate(
        self, left: Tensor | None, right: Tensor | None, shape: Sequence[int] | None = None
    ) -> Factor:
        """B (left (x) right) for each group of a parameter that reshapes to (G, O, I): entries
        sum_oi B[g, o, i] left[g, o, o'] right[g, i, i'] at a parameter of (G O', I').

        Args:
            left: (G, O, O'); None is the identity.
            right: (G, I, I'); None is the identity.
            shape: that the new parameter has, by default (G O', I').
        """
        g, o, i = self.grid(left, right)
        b = self.dense().reshape(self.k, self.n, g, o, i)
        b = b if left is None else left.mT @ b
        b = b if right is None else b @ right
        return DenseFactor(b.reshape(self.k, self.n, *(shape or (g * b.shape[3], b.shape[4]))))

    def beside(self, other: Factor) -> Factor | None:
        """B and another factor next to each other, as one at a parameter of (G O, I + I'), where
        that is as thin as both: those of a weight and of its bias. None where it is not.
        """
        return None

    def scale_rows(self, c: Tensor) -> Factor:
        """diag(c) B: row (k, n) times c_kn, for c of (K, N)."""
        return DenseFactor(self.dense() * c.reshape(self.k, self.n, *[1] * len(self.shape)))

    def unscaled(self) -> tuple[Factor, Tensor | None]:
        """(B', d) where this is B' diag(d), and B' may be thin where this is not."""
        return self, None

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        """B[:, sample, index] for pairs of a sample and an index of the first axis of the
        parameter: (K, pairs, *shape[1:]).
        """
        return self.dense()[:, sample, index]

    def write(self, out: Tensor, more: bool) -> None:
        """Put B into `out` of (K, N, P), or with `more` add it to what is there."""
        flat = self.dense().reshape(out.shape)
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

    def grid(
        self, left: Tensor | None, right: Tensor | None, groups: int = 1
    ) -> tuple[int, int, int]:
        """G, O and I of the parameter, given what it is rotated by; G is `groups` if by nothing."""
        some = right if left is None else left
        g = groups if some is None else len(some)
        return g, self.shape[0] // g if self.shape else 1, math.prod(self.shape[1:])

    def _zeros(self, per_sample: bool = False) -> Tensor:
        """(*shape), or (N, *shape)."""
        lead = (self.n,) if per_sample else ()
        return torch.zeros((*lead, *self.shape), dtype=self.dtype, device=self.device)

    def _lead(self, d: Tensor) -> tuple[int, ...]:
        """(N,) of a d of (N, *shape), and () of (*shape)."""
        return tuple(d.shape[: d.dim() - len(self.shape)])

    def _rows(self, which: slice) -> Tensor:
        """Some columns of B, (columns, N, P)."""
        size = math.prod(self.shape)
        return self.columns(which).dense().reshape(which.stop - which.start, self.n, size)

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


class ScaledFactor(Factor):
    """B diag(d): the entries of another factor times d, of (*shape) or (N, *shape)."""

    def __init__(self, factor: Factor, d: Tensor):
        self.factor, self.d = factor, d
        self.k, self.n, self.shape = factor.k, factor.n, factor.shape
        self.device, self.dtype = factor.device, factor.dtype

    def dense(self) -> Tensor:
        return self.factor.dense() * self.d

    def columns(self, which: slice) -> Factor:
        return ScaledFactor(self.factor.columns(which), self.d)

    def to(self, dtype: torch.dtype) -> Factor:
        return ScaledFactor(self.factor.to(dtype), self.d.to(dtype))

    def scale(self, d: Tensor) -> Factor:
        return ScaledFactor(self.factor, self.d * d)

    def scale_rows(self, c: Tensor) -> Factor:
        return ScaledFactor(self.factor.scale_rows(c), self.d)

    def unscaled(self) -> tuple[Factor, Tensor | None]:
        return self.factor, self.d

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        d = self.d[sample, index] if self._lead(self.d) else self.d[index]
        return self.factor.entries(sample, index) * d

    def kernel(self, other: Factor, pairs: Pairs = "all") -> Tensor:
        if pairs == "all" and self._lead(self.d):  # the other's samples are not those of d
            return super().kernel(other, pairs)
        return self.factor.kernel(other.scale(self.d), pairs)

    def matvec(self, v: Tensor) -> Tensor:
        return self.factor.matvec(self.d * v)


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

    def kernel(self, other: Factor, pairs: Pairs = "all") -> Tensor:
        return torch.stack([part.kernel(other, pairs) for part in self.parts]).sum(0)

    def kernel_from(self, first: Factor, pairs: Pairs) -> Tensor:
        return torch.stack([first.kernel(part, pairs) for part in self.parts]).sum(0)

    def matvec(self, v: Tensor) -> Tensor:
        return torch.stack([part.matvec(v) for part in self.parts]).sum(0)

    def rmatvec(self, c: Tensor) -> Tensor:
        return torch.stack([part.rmatvec(c) for part in self.parts]).sum(0)

    def scale(self, d: Tensor) -> Factor:
        return SumFactor([part.scale(d) for part in self.parts])

    def rows(self, start: int, stop: int) -> Factor:
        return merge_uses([part.rows(start, stop) for part in self.parts])

    def scale_rows(self, c: Tensor) -> Factor:
        return SumFactor([part.scale_rows(c) for part in self.parts])

    def rotate(
        self, left: Tensor | None, right: Tensor | None, shape: Sequence[int] | None = None
    ) -> Factor:
        return merge_uses([part.rotate(left, right, shape) for part in self.parts])

    def to(self, dtype: torch.dtype) -> Factor:
        return SumFactor([part.to(dtype) for part in self.parts])

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        return torch.stack([part.entries(sample, index) for part in self.parts]).sum(0)

    def square_sum(self, per_sample: bool = False) -> Tensor:
        sparse = [part for part in self.parts if part.sparse]
        if not sparse:
            return super().square_sum(per_sample)
        # (B_1 + B_2)^2 = B_1^2 + 2 B_1 B_2 + B_2^2, where a sparse one is met in its rows alone
        thick = [part for part in self.parts if not part.sparse]
        terms = ([SumFactor(thick)] if len(thick) > 1 else thick) + sparse
        total = self._zeros(per_sample)
        for a, first in enumerate(terms):
            total += first.square_sum(per_sample)
            for second in terms[a + 1 :]:
                total += 2 * first.inner(second, per_sample)
        return total


def joint_gram(factors: Sequence[Factor | None], shapes: Sequence[Sequence[int]] = ()) -> Tensor:
    """B^T B over several parameters, flattened one behind the other, (P, P).

    Args:
        factors: B at each; None where it is zero, but not at all of them.
        shapes: of the parameters, if some factor is None.
    """
    sizes = [math.prod(s) for s in shapes or (f.shape for f in factors if f is not None)]
    starts = list(itertools.accumulate(sizes, initial=0))
    known = [(a, f) for a, f in zip(starts, factors, strict=False) if f is not None]
    some = known[0][1]
    block = torch.zeros(starts[-1], starts[-1], dtype=some.dtype, device=some.device)
    for i, (a, f) in enumerate(known):
        for b, g in known[i:]:
            part = f.gram(g)
            block[a : a + part.shape[0], b : b + part.shape[1]] = part
            if g is not f:
                block[b : b + part.shape[1], a : a + part.shape[0]] = part.mT
    return block


def merge_uses(uses: Sequence[Factor]) -> Factor:
    """One factor for all uses of a parameter: their sum, with those of one `merge_key` made one."""
    if len(uses) == 1:
        return uses[0]
    groups: dict[Hashable, list[Factor]] = {}
    for use in uses:
        groups.setdefault(use.merge_key(), []).append(use)
    parts = [group[0].merge(group) if len(group) > 1 else group[0] for group in groups.values()]
    return parts[0] if len(parts) == 1 else SumFactor(parts)
