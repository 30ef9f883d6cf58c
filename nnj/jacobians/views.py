"""A parameter seen as a view: some of its rows, or its entries in another order; the factor and the
Jacobian at the parameter, given those at the view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnj.jacobians.factor import Factor, Pairs, SumFactor, merge_uses
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.kron import Approx, Bias, Kron, KronSize
from nnj.jacobians.sample_index import SampleIndex


@dataclass(frozen=True)
class View:
    """Rows `start` to `stop` of a parameter p of `shape`, with their entries in another order:
    p[start:stop].reshape(split).permute(order).reshape(inner). Make it by `rows` or `permuted`.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    split: tuple[int, ...]
    order: tuple[int, ...]
    inner: tuple[int, ...]

    @classmethod
    def rows(cls, shape: Sequence[int], start: int, stop: int) -> View:
        """Rows start to stop, as they are."""
        inner = (stop - start, *shape[1:])
        return cls(tuple(shape), start, stop, inner, tuple(range(len(inner))), inner)

    @classmethod
    def permuted(
        cls,
        shape: Sequence[int],
        inner: Sequence[int],
        split: Sequence[int] | None = None,
        order: Sequence[int] = (1, 0),
    ) -> View:
        """All entries in another order: by default the transpose of a matrix.

        Args:
            shape: of the parameter.
            inner: of the view.
            split: `shape` with axes taken apart, such as groups; by default as it is.
            order: of the axes of `split`.
        """
        split = tuple(shape if split is None else split)
        return cls(tuple(shape), 0, shape[0], split, tuple(order), tuple(inner))

    @property
    def plain(self) -> bool:
        """Whether its entries are in the order of the parameter."""
        return self == View.rows(self.shape, self.start, self.stop)

    @property
    def whole(self) -> bool:
        """Whether it has all rows."""
        return (self.start, self.stop) == (0, self.shape[0])

    def put(self, t: Tensor) -> Tensor:
        """The view of t: (..., *shape) -> (..., *inner)."""
        lead = t.dim() - len(self.shape)
        t = t.narrow(lead, self.start, self.stop - self.start)
        t = t.reshape(*t.shape[:lead], *self.split)
        t = t.permute(*range(lead), *(lead + axis for axis in self.order))
        return t.reshape(*t.shape[:lead], *self.inner)

    def back(self, t: Tensor) -> Tensor:
        """The rows of which t is the view: (..., *inner) -> (..., stop - start, *shape[1:])."""
        lead = t.dim() - len(self.inner)
        t = t.reshape(*t.shape[:lead], *(self.split[axis] for axis in self.order))
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        t = t.permute(*range(lead), *(lead + axis for axis in inverse))
        return t.reshape(*t.shape[:lead], self.stop - self.start, *self.shape[1:])

    def padded(self, t: Tensor) -> Tensor:
        """The same with all other rows zero: (..., *inner) -> (..., *shape)."""
        rows = self.back(t)
        if self.whole:
            return rows
        return F.pad(rows, [0, 0] * (len(self.shape) - 1) + [self.start, self.shape[0] - self.stop])


class ViewFactor(Factor):
    """B at a parameter, given B at views of it, of which no two have a row in common; zero in all
    other rows.

    Args:
        parts: views of one parameter, each with the factor there, (K, N, *view.inner).
    """

    def __init__(self, parts: Sequence[tuple[View, Factor]]):
        self.parts = list(parts)
        view, first = self.parts[0]
        self.k, self.n, self.shape = first.k, first.n, view.shape
        self.device, self.dtype = first.device, first.dtype

    def _joined(self, found: Iterable[Tensor], *lead: int) -> Tensor:
        """(*lead, *shape), from (*lead, *view.inner) of each part."""
        first = self.parts[0][0]
        if len(self.parts) == 1 and first.whole:
            (only,) = found
            return first.back(only)
        out = torch.zeros(*lead, *self.shape, dtype=self.dtype, device=self.device)
        for (view, _), t in zip(self.parts, found, strict=True):
            out.narrow(len(lead), view.start, view.stop - view.start).copy_(view.back(t))
        return out

    def dense(self) -> Tensor:
        return self._joined((part.dense() for _, part in self.parts), self.k, self.n)

    def columns(self, which: slice) -> Factor:
        return ViewFactor([(view, part.columns(which)) for view, part in self.parts])

    def to(self, dtype: torch.dtype) -> Factor:
        return ViewFactor([(view, part.to(dtype)) for view, part in self.parts])

    def rmatvec(self, c: Tensor) -> Tensor:
        return self._joined(part.rmatvec(c) for _, part in self.parts)

    def square_sum(self, per_sample: bool = False) -> Tensor:
        lead = (self.n,) if per_sample else ()
        return self._joined((part.square_sum(per_sample) for _, part in self.parts), *lead)

    def inner(self, other: Factor, per_sample: bool = False) -> Tensor:
        theirs = self._theirs(other)
        if theirs is None:
            return super().inner(other, per_sample)
        pairs, lead = zip(self.parts, theirs, strict=True), (self.n,) if per_sample else ()
        return self._joined((mine.inner(part, per_sample) for (_, mine), part in pairs), *lead)

    def kernel(self, other: Factor, pairs: Pairs = "all") -> Tensor:
        theirs = self._theirs(other)
        if theirs is None:
            return super().kernel(other, pairs)
        both = zip(self.parts, theirs, strict=True)
        return torch.stack([mine.kernel(part, pairs) for (_, mine), part in both]).sum(0)

    def _theirs(self, other: Factor) -> list[Factor] | None:
        """The factors of another one at the views of this one; None where it has others."""
        if not isinstance(other, ViewFactor):
            return None
        same = [view for view, _ in self.parts] == [view for view, _ in other.parts]
        return [part for _, part in other.parts] if same else None

    def matvec(self, v: Tensor) -> Tensor:
        return torch.stack([part.matvec(view.put(v)) for view, part in self.parts]).sum(0)

    def scale(self, d: Tensor) -> Factor:
        return ViewFactor([(view, part.scale(view.put(d))) for view, part in self.parts])

    def kron(self, approx: Approx = "expand") -> list[Kron] | None:
        found: list[Kron] = []
        for view, part in self.parts:
            krons = part.kron(approx)
            if krons is None or any(kron.view is not None for kron in krons):
                return None
            for kron in krons:
                kron.view = view
            found += krons
        return found

    def biases(self) -> list[Bias]:
        every = [(view, bias) for view, part in self.parts for bias in part.biases()]
        return [bias._replace(view=view) for view, bias in every if bias.view is None]

    def rows(self, start: int, stop: int) -> Factor:
        for view, part in self.parts:
            if view.plain and view.start <= start and stop <= view.stop:
                return part.rows(start - view.start, stop - view.start)
        return super().rows(start, stop)

    def rotate(
        self, left: Tensor | None, right: Tensor | None, shape: Sequence[int] | None = None
    ) -> Factor:
        g, o, i = self.grid(left, right)
        view, part = self.parts[0]
        if g > 1 or self.shape != (o, i):
            return super().rotate(left, right, shape)
        if view == View.permuted((o, i), (i, o)):  # alone, and whole
            p, q = (
                size if side is None else side.shape[2] for side, size in ((left, o), (right, i))
            )
            turned = part.rotate(right, left, (q, p))
            return ViewFactor([(View.permuted(shape or (p, q), (q, p), (p, q)), turned)])
        if left is None or not all(v.plain for v, _ in self.parts):
            return super().rotate(left, right, shape)
        rows = [p.rotate(left[:, v.start : v.stop], right, shape) for v, p in self.parts]
        return merge_uses(rows)

    def scale_rows(self, c: Tensor) -> Factor:
        return ViewFactor([(view, part.scale_rows(c)) for view, part in self.parts])

    def gram(self, other: Factor) -> Tensor:
        # the rows of the block are those of the parts, put in the order of the parameter
        q = math.prod(other.shape)
        found = (part.gram(other).mT.reshape(q, *part.shape) for _, part in self.parts)
        return self._joined(found, q).flatten(1).mT

    def gram_from(self, first: Factor) -> Tensor:
        # the columns of the block are those of the parts, put in the order of the parameter
        p = math.prod(first.shape)
        found = (first.gram(part).reshape(p, *part.shape) for _, part in self.parts)
        return self._joined(found, p).flatten(1)

    def merge_key(self) -> Hashable:
        return ViewFactor

    def merge(self, uses: Sequence[ViewFactor]) -> Factor:
        groups: dict[View, list[Factor]] = {}
        for use in uses:
            for view, part in use.parts:
                groups.setdefault(view, []).append(part)
        ends = sorted((view.start, view.stop) for view in groups)
        if any(a[1] > b[0] for a, b in itertools.pairwise(ends)):
            return SumFactor(uses)
        return ViewFactor([(view, merge_uses(parts)) for view, parts in groups.items()])


class ViewJacobian(Jacobian):
    """J in a parameter, given `j`, that in a view of it: some rows, or the transpose of a matrix.

    Args:
        j: the operator in the entries as they are arranged, `j.inputs` is `view.inner`.
        view: of the parameter.
    """

    def __init__(self, j: Jacobian, view: View):
        super().__init__(view.shape, j.outputs, j.like)
        self.j, self.view = j, view
        self.same_for_rows, self.places = j.same_for_rows, j.places

    @property
    def column_entries(self) -> int:
        return self.j.column_entries

    @property
    def patch_entries(self) -> int:
        return self.j.patch_entries

    @property
    def kron_size(self) -> KronSize | None:
        return self.j.kron_size

    def jvp(self, v: Tensor) -> Tensor:
        return self.j.jvp(self.view.put(v))

    def vjp(self, u: Tensor) -> Tensor:
        return self.view.padded(self.j.vjp(u))

    def square(self) -> Jacobian:
        return ViewJacobian(self.j.square(), self.view)

    def times(self, other: Jacobian) -> Jacobian:
        if not isinstance(other, ViewJacobian) or other.view != self.view:
            return super().times(other)
        return ViewJacobian(self.j.times(other.j), self.view)

    def pullback(self, u: Tensor, sample_index: SampleIndex) -> Factor:
        return ViewFactor([(self.view, self.j.pullback(u, sample_index))])
