"""The structures of J in a parameter, which all rows share: a weight, a factor or a shift, rows of
a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor, RowSparse
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.outer_product import OuterProduct, Patches, outer
from nnj.jacobians.sample_index import SampleIndex, is_cyclic


class _Fold:
    """(…, *outputs) <-> (…, G, O, L): the channels of an output in groups, its other axes in one
    axis of places.
    """

    def __init__(self, outputs: Sequence[int], channels: int, groups: int, last: bool):
        self.outputs, self.channels, self.groups, self.last = tuple(outputs), channels, groups, last

    def __call__(self, t: Tensor, lead: int = 2) -> Tensor:
        shape, o = t.shape[:lead], self.channels // self.groups
        if self.last:
            return t.reshape(*shape, -1, self.groups, o).movedim(lead, -1)
        return t.reshape(*shape, self.groups, o, -1)

    def undo(self, t: Tensor) -> Tensor:
        return (t.movedim(-1, 2) if self.last else t).reshape(*t.shape[:2], *self.outputs)


def _grouped(
    patches: Patches, v: Tensor, fold: _Fold, sample_index: SampleIndex, shape: Sequence[int]
) -> OuterProduct | None:
    """Rows (R) and places (L) regrouped as samples (n) and their places: U (R, G, I, L), v
    (K, R, G, O, L).
    """
    if sample_index.of is None:
        n, k = sample_index.n, patches.n // sample_index.n
        rows = lambda s: slice(s.start * k, s.stop * k) if s.start is not None else s
        of_sample = lambda s: patches(rows(s)).unflatten(0, (-1, k)).movedim(1, -2).flatten(-2)
        return OuterProduct(
            Patches(of_sample, n, patches.inputs),
            v.unflatten(1, (n, k)).movedim(2, -2).flatten(-2),
            shape,
        )
    u = patches()
    of = fold(sample_index.of.expand(u.shape[0], *fold.outputs), 1)  # (R, G, O, L)
    if not bool((of == of[:, :1, :1]).all()):
        return None
    flat = of[:, 0, 0].reshape(-1)
    if is_cyclic(flat, sample_index.n):  # then the samples are an axis
        u, v = u.movedim(-1, 1).flatten(0, 1), v.movedim(-1, 2).flatten(1, 2)
        return OuterProduct(
            u.unflatten(0, (-1, sample_index.n)).movedim(0, -1),
            v.unflatten(1, (-1, sample_index.n)).movedim(1, -1),
            shape,
        )
    order = torch.argsort(flat, stable=True)
    order = order[(flat < 0).sum() :]
    sample = flat[order]
    counts = torch.bincount(sample, minlength=sample_index.n)
    slot = torch.arange(len(order), device=flat.device) - (counts.cumsum(0) - counts)[sample]
    most = max(1, int(counts.max()) if len(order) else 1)
    # (R*L, G, I), (K, R*L, G, O)
    u, v = u.movedim(-1, 1).flatten(0, 1), v.movedim(-1, 2).flatten(1, 2)
    grouped_u = u.new_zeros(sample_index.n, most, *u.shape[1:]).index_put((sample, slot), u[order])
    grouped_v = v.new_zeros(v.shape[0], sample_index.n, most, *v.shape[2:])
    grouped_v[:, sample, slot] = v[:, order]
    return OuterProduct(grouped_u.movedim(1, -1), grouped_v.movedim(2, -1), shape)


class PatchMatmul(Jacobian):
    """A weight: y = W U, with the input of each row seen in patches U of (N, G, I, L).

    W.reshape(G, O, I) meets G groups of I inputs at L places. `patches` makes U when it is asked
    for, so that building the operator costs nothing, and for some rows at a time, since U is often
    the largest tensor there is.

    Args:
        patches: makes U for the rows in a slice of the batch, (rows, G, I, L).
        inputs: the shape of W, which reshapes to (G, O, I).
        outputs: the shape of one row's output: channels last (*places, G*O), or first
            (G*O, *places).
        like: a tensor with the batch in axis 0.
        groups: G.
        last: whether the channels of the output are its last axis.
        shared: y for one W that all rows share, where the layer itself is faster than its patches.
    """

    def __init__(
        self,
        patches: Callable[[slice], Tensor],
        inputs: Sequence[int],
        outputs: Sequence[int],
        like: Tensor,
        *,
        groups: int = 1,
        last: bool = True,
        shared: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(inputs, outputs, like)
        self.groups, self.shared = groups, shared
        self.fold = _Fold(outputs, self.outputs[-1 if last else 0], groups, last)
        self.matrix = (
            groups,
            self.fold.channels // groups,
            math.prod(self.inputs) // self.fold.channels,
        )
        self.patches = Patches(patches, self.n, self.matrix[2])
        self.places = math.prod(self.outputs) // self.fold.channels

    def jvp(self, v: Tensor) -> Tensor:
        if self.shared is not None and v.shape[1] == 1:
            return torch.stack([self.shared(w[0]) for w in v])
        return self.fold.undo(v.reshape(*v.shape[:2], *self.matrix) @ self.patches())

    def vjp(self, u: Tensor) -> Tensor:
        return outer(self.fold(u), self.patches().contiguous()).reshape(*u.shape[:2], *self.inputs)

    def square(self) -> Jacobian:
        return self._with(lambda rows: self.patches(rows).square())

    def times(self, other: Jacobian) -> Jacobian:
        if not isinstance(other, PatchMatmul):
            return super().times(other)
        return self._with(lambda rows: self.patches(rows) * other.patches(rows))

    def _with(self, patches: Callable[[slice], Tensor]) -> Jacobian:
        return PatchMatmul(
            patches, self.inputs, self.outputs, self.like, groups=self.groups, last=self.fold.last
        )

    def factor(self, u: Tensor, sample_index: SampleIndex) -> Factor | None:
        v = self.fold(u)
        if sample_index.of is None and sample_index.n == self.n:
            return OuterProduct(self.patches, v, self.inputs, u if v.shape[-1] == 1 else None)
        return _grouped(self.patches, v, self.fold, sample_index, self.inputs)

    def summed_vjp(self, u: Tensor) -> Tensor:
        # All rows are places of one sample: (K, G, O, R*L) (G, I, R*L)^T.
        v, p = self.fold(u), self.patches()
        return (v.movedim(1, -2).flatten(-2) @ p.movedim(0, -2).flatten(-2).mT).reshape(
            -1, *self.inputs
        )


class ScaleShift(Jacobian):
    """A factor that all places share: y = w * m + …, the affine parameters of a norm. Without m,
    J = 1: a bias.

    Args:
        inputs: the shape of the parameter.
        outputs: the shape of one row's output: (*places, *inputs), or with `last` false
            (*inputs, *places).
        like: a tensor with the batch in axis 0.
        m: makes the multiplier, (N, *outputs).
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        like: Tensor,
        *,
        m: Callable[[], Tensor] | None = None,
        last: bool = True,
    ):
        super().__init__(inputs, outputs, like)
        self.m = m
        self.fold = _Fold(outputs, math.prod(self.inputs), 1, last)

    def jvp(self, v: Tensor) -> Tensor:
        places = math.prod(self.outputs) // self.fold.channels
        spread = v.reshape(*v.shape[:2], 1, -1, 1).expand(
            v.shape[0], self.n, 1, self.fold.channels, places
        )
        out = self.fold.undo(spread)
        return out if self.m is None else out * self.m()

    def vjp(self, u: Tensor) -> Tensor:
        return self._weighted(u).sum(-1).reshape(*u.shape[:2], *self.inputs)

    def _weighted(self, u: Tensor) -> Tensor:
        return self.fold(u if self.m is None else u * self.m())

    def square(self) -> Jacobian:
        return self.times(self)

    def times(self, other: Jacobian) -> Jacobian:
        m, n = self.m, getattr(other, "m", None)
        if not isinstance(other, ScaleShift) or (m is None) != (n is None):
            return super().times(other)
        both = None if m is None or n is None else (lambda: m() * n())
        return ScaleShift(self.inputs, self.outputs, self.like, m=both, last=self.fold.last)

    def factor(self, u: Tensor, sample_index: SampleIndex) -> Factor | None:
        # A place of width one that holds 1; the sum over a sample's places can be taken at once.
        v = self._weighted(u)
        if sample_index.of is None:
            one = v.shape[-1] == 1
            total: Tensor | None = sample_index.sum(v[..., 0] if one else v.sum(-1))
        else:
            of = self.fold(sample_index.of.expand(u.shape[1], *self.outputs), 1)  # (R, 1, D, L)
            if not bool((of == of[:, :, :1]).all()):
                return None
            whose = SampleIndex(sample_index.n, of[:, 0, 0].reshape(-1))
            total = whose.sum(v.movedim(-1, 2).flatten(1, 2))
        if total is None:
            return None
        origin = (
            u
            if sample_index.of is None and one and self.m is None and sample_index.n == self.n
            else None
        )
        return OuterProduct(
            total.new_ones(sample_index.n, 1, 1, 1), total[..., None], self.inputs, origin
        )


class TableRows(Jacobian):
    """Rows of a table: y = W[index], with `index` of (N, *places); no row is touched where `keep`
    is false (padding).

    The whole of one row of the table stands in y, so J is a matrix of zeros and ones.
    """

    def __init__(
        self, index: Tensor, inputs: Sequence[int], like: Tensor, *, keep: Tensor | None = None
    ):
        super().__init__(inputs, (*index.shape[1:], *inputs[1:]), like)
        self.index, self.keep = index, keep

    def jvp(self, v: Tensor) -> Tensor:
        if v.shape[1] == 1:
            out = v[:, 0][:, self.index]
        else:
            out = v[
                :,
                torch.arange(self.n, device=v.device).reshape(-1, *[1] * (self.index.dim() - 1)),
                self.index,
            ]
        return out if self.keep is None else out * self._mask(out)

    def _mask(self, t: Tensor) -> Tensor:
        assert self.keep is not None
        return self.keep.reshape(*self.keep.shape, *[1] * (t.dim() - 1 - self.keep.dim()))

    def _pairs(self, u: Tensor, sample_index: SampleIndex) -> Factor | None:
        """u (K, R, *outputs) as the rows of a table for each of owner.n samples."""
        u = u if self.keep is None else u * self._mask(u)
        places = self.index.dim()
        if sample_index.of is None:
            whose = sample_index.rows(u.shape[1], u.device).reshape(-1, *[1] * (places - 1))  # type: ignore[union-attr]
        else:
            whole = (
                sample_index.of.expand(u.shape[1], *self.outputs).flatten(places)
                if len(self.inputs) > 1
                else sample_index.of.expand(u.shape[1], *self.outputs)[..., None]
            )
            if not bool((whole == whole[..., :1]).all()):
                return None
            whose = whole[..., 0]
        sample = whose.expand(self.index.shape).reshape(-1)
        return RowSparse.build(
            u.flatten(1, places), sample, self.index.reshape(-1), sample_index.n, self.inputs
        )

    def vjp(self, u: Tensor) -> Tensor:
        found = self._pairs(u, SampleIndex(u.shape[1]))
        assert found is not None
        return found.dense()

    def factor(self, u: Tensor, sample_index: SampleIndex) -> Factor | None:
        return self._pairs(u, sample_index)

    def summed_vjp(self, u: Tensor) -> Tensor:
        found = self._pairs(u, SampleIndex(1))
        assert found is not None
        return found.dense()[:, 0]

    def square(self) -> Jacobian:
        return self

    def times(self, other: Jacobian) -> Jacobian:
        if not isinstance(other, TableRows):
            return super().times(other)
        keep = self.index == other.index
        for kept in (self.keep, other.keep):
            keep = keep if kept is None else keep & kept
        return TableRows(self.index, self.inputs, self.like, keep=keep)
