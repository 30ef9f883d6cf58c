"""B with few rows that are not zero: the factor at a table, of which a sample reads some rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor, Pairs
from nnj.jacobians.kron import Approx, Kron
from nnj.jacobians.table_kron import TableKron


class RowSparse(Factor):
    """Rows of B among which are all that are not zero: v[k, i] stands at B[k, sample[i], row[i]].

    Args:
        v: (K, pairs, *shape[1:]).
        sample, row: (pairs,); every pair of them occurs once.
        n, shape: N, and the shape of the parameter.

    Attributes:
        places: (v, sample, row) of the places of which it is the sum, where pairs repeat.
    """

    sparse = True

    def __init__(self, v: Tensor, sample: Tensor, row: Tensor, n: int, shape: Sequence[int]):
        self.v, self.sample, self.row = v, sample, row
        self.k, self.n, self.shape = v.shape[0], n, tuple(shape)
        self.device, self.dtype = v.device, v.dtype
        self.places = [(v, sample, row)]

    @classmethod
    def build(
        cls, v: Tensor, sample: Tensor, row: Tensor, n: int, shape: Sequence[int]
    ) -> RowSparse:
        """From v of (K, M, *shape[1:]) in which pairs may repeat, and a negative sample means
        nobody's.
        """
        pair, where = _numbered(sample, row, n, shape[0])
        total = v.new_zeros(v.shape[0], len(pair) + 1, *v.shape[2:]).index_add_(1, where, v)
        found = cls(total[:, :-1], pair // shape[0], pair % shape[0], n, shape)
        found.places = [(v, sample, row)]
        return found

    def dense(self) -> Tensor:
        out = self.v.new_zeros(self.k, self.n, *self.shape)
        out[:, self.sample, self.row] = self.v
        return out

    def columns(self, which: slice) -> Factor:
        return self._with(lambda v, sample, row: v[which])

    def to(self, dtype: torch.dtype) -> Factor:
        return self._with(lambda v, sample, row: v.to(dtype))

    def _with(
        self,
        change: Callable[[Tensor, Tensor, Tensor], Tensor],
        shape: tuple[int, ...] | None = None,
    ) -> RowSparse:
        """The same of `change(v, sample, row)` for v of (K, M, *shape[1:]), also at its places."""
        v, shape = change(self.v, self.sample, self.row), self.shape if shape is None else shape
        found = RowSparse(v, self.sample, self.row, self.n, shape)
        found.places = [
            (v if place[0] is self.v else change(*place), *place[1:]) for place in self.places
        ]
        return found

    def kron(self, approx: Approx = "expand") -> list[Kron] | None:
        if len(self.shape) < 2 or not self.places:
            return None
        v, sample, row = (
            parts[0] if len(parts) == 1 else torch.cat(parts, axis)
            for parts, axis in zip(zip(*self.places, strict=True), (1, 0, 0), strict=True)
        )
        return [TableKron(v, sample, row, self.n, self.shape[0], approx)]

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
        found = RowSparse(self.v * self._there(d), self.sample, self.row, self.n, self.shape)
        found.places = []  # no rows of the identity any more
        return found

    def scale_rows(self, c: Tensor) -> Factor:
        def weighted(v: Tensor, sample: Tensor, row: Tensor) -> Tensor:
            there = c[:, sample.clamp(min=0)]  # some are nobody's
            return v * there.reshape(*v.shape[:2], *[1] * (v.dim() - 2))

        return self._with(weighted)

    def rotate(
        self, left: Tensor | None, right: Tensor | None, shape: Sequence[int] | None = None
    ) -> Factor:
        whole = shape is None or shape[0] == self.shape[0]
        if left is not None or right is None or len(right) > 1 or not whole:
            return super().rotate(left, right, shape)
        side, into = right[0], tuple(shape or (self.shape[0], right.shape[2]))
        turn = lambda v, sample, row: (self._flat(v) @ side).reshape(*v.shape[:2], *into[1:])
        return self._with(turn, into)

    def square_sum(self, per_sample: bool = False) -> Tensor:
        return self.inner(self, per_sample)

    def merge_key(self) -> Hashable:
        return RowSparse

    def merge(self, uses: Sequence[RowSparse]) -> Factor:
        v = torch.cat([use.v for use in uses], 1)
        sample, row = torch.cat([use.sample for use in uses]), torch.cat([use.row for use in uses])
        found = RowSparse.build(v, sample, row, self.n, self.shape)
        found.places = [place for use in uses for place in use.places]
        return found


def _numbered(sample: Tensor, row: Tensor, n: int, rows: int) -> tuple[Tensor, Tensor]:
    """Different pairs, as sample * rows + row, among them all that occur, and which of them each
    place is (one more than the last where it is nobody's).

    How many occur is asked of no tensor: there are as many as places, or as pairs, and what is left
    over are pairs that do not occur."""
    m, dead = len(sample), sample < 0
    key = torch.where(dead, n * rows, sample * rows + row)
    if n * rows <= m:
        return torch.arange(n * rows, device=key.device), key
    ordered, order = key.sort(stable=True)
    new = torch.ones_like(dead)
    new[1:] = ordered[1:] != ordered[:-1]
    number = torch.where(ordered == n * rows, m, new.cumsum(0) - 1)
    where = torch.empty_like(key).scatter_(0, order, number)
    # of the first m pairs of all, those that do not occur
    free = torch.ones(m + 1, dtype=torch.bool, device=key.device)
    free = free.index_fill_(0, key.clamp(max=m), False)[:m]
    occur = (new & (ordered < n * rows)).sum()
    left = torch.where(free, occur + free.cumsum(0) - 1, m).clamp(max=m)
    pair = torch.zeros(m + 1, dtype=key.dtype, device=key.device)
    pair.scatter_(0, left, torch.arange(m, device=key.device)).scatter_(0, number, ordered)
    return pair[:m], where
