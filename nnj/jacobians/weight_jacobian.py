"""The structures of J in a parameter that all rows share: y = W U, a matrix product with patches;
y = w * m, scale and shift; y = W[index], rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.kron import Arrived, KronSize
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.patches import Patches, outer
from nnj.jacobians.row_sparse import RowSparse
from nnj.jacobians.sample_index import SampleIndex, is_cyclic
from nnj.jacobians.separable import separable


class _Fold:
    """(…, *outputs) <-> (…, G, O, L): the channels of an output in groups, its other axes in one
    axis of places.
    """

    def __init__(self, outputs: Sequence[int], channels: int, groups: int, last: bool):
        self.outputs, self.channels, self.groups, self.last = tuple(outputs), channels, groups, last
        self.key = self.outputs, channels, groups, last
        self._moves = last and len(self.outputs) > 1  # with one place, both are the same

    def __call__(self, t: Tensor, lead: int = 2) -> Tensor:
        shape, o = t.shape[:lead], self.channels // self.groups
        if self._moves:
            return t.reshape(*shape, -1, self.groups, o).movedim(lead, -1)
        return t.reshape(*shape, self.groups, o, -1)

    def undo(self, t: Tensor) -> Tensor:
        return (t.movedim(-1, 2) if self._moves else t).reshape(*t.shape[:2], *self.outputs)


def _regrouped(
    patches: Patches, v: Tensor, fold: _Fold, sample_index: SampleIndex, shape: Sequence[int]
) -> OuterProduct | None:
    """V U^T of samples, from that of rows: the rows (R) of a sample and their places (L) become
    its places. None where a row, or a place of it, holds entries of several samples.

    Args:
        patches: U, (R, G, I, L).
        v: V, (K, R, G, O, L).
        fold: of the outputs into (G, O, L).
        sample_index: of which sample the entries of the rows are.
        shape: of the parameter.
    """
    if sample_index.of is None:
        return _from_blocks(patches, v, sample_index.n, shape)
    of = fold(sample_index.of.expand(patches.n, *fold.outputs), 1)  # (R, G, O, L)
    key = patches.n, fold.key
    if not sample_index.answer(key, lambda: bool((of == of[:, :1, :1]).all())):
        return None
    sample, u = of[:, 0, 0].reshape(-1), patches()
    # rows and places as one axis: (R L, G, I) and (K, R L, G, O)
    u, v = u.movedim(-1, 1).flatten(0, 1), v.movedim(-1, 2).flatten(1, 2)
    cyclic = lambda: is_cyclic(sample, sample_index.n)
    if sample_index.answer(("cyclic", key), cyclic):  # then the samples are an axis
        u = u.unflatten(0, (-1, sample_index.n)).movedim(0, -1)
        v = v.unflatten(1, (-1, sample_index.n)).movedim(1, -1)
        return OuterProduct(u, v, shape)
    return _from_any_order(u, v, sample, sample_index.n, shape)


def _from_blocks(patches: Patches, v: Tensor, n: int, shape: Sequence[int]) -> OuterProduct:
    """Where the rows are sample-major, R / n for each of n samples, U is still made in parts."""
    k = patches.n // n

    def of_samples(s: slice) -> Tensor:
        rows = s if s.start is None else slice(s.start * k, s.stop * k)
        result: Tensor = patches(rows).unflatten(0, (-1, k)).movedim(1, -2).flatten(-2)
        return result

    v = v.unflatten(1, (n, k)).movedim(2, -2).flatten(-2)
    return OuterProduct(Patches(of_samples, n, patches.inputs), v, shape)


def _from_any_order(
    u: Tensor, v: Tensor, sample: Tensor, n: int, shape: Sequence[int]
) -> OuterProduct:
    """From u of (M, G, I) and v of (K, M, G, O), where entry m is of `sample[m]` (negative:
    nobody's): as many places as the longest sample has, and zeros where others have none.
    """
    order = torch.argsort(sample, stable=True)
    order = order[(sample < 0).sum() :]
    sample = sample[order]
    counts = torch.bincount(sample, minlength=n)
    # the number of an entry among those of its sample
    slot = torch.arange(len(order), device=sample.device) - (counts.cumsum(0) - counts)[sample]
    most = max(1, int(counts.max()) if len(order) else 1)
    grouped_u = u.new_zeros(n, most, *u.shape[1:]).index_put((sample, slot), u[order])
    grouped_v = v.new_zeros(v.shape[0], n, most, *v.shape[2:])
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
        channels = outputs[-1 if last else 0]
        self.groups, self.shared = groups, shared
        self.fold = _Fold(outputs, channels, groups, last)
        self.matrix = (groups, channels // groups, math.prod(inputs) // channels)
        self.patches = Patches(patches, like.shape[0], self.matrix[2])
        super().__init__(inputs, outputs, like)
        self.places = math.prod(self.outputs) // channels

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
            found = OuterProduct(self.patches, v, self.inputs, u if v.shape[-1] == 1 else None)
            known = None if self.fold.last else separable(u)
            if known is not None:
                one = known.one_column
                found.of_one = lambda: OuterProduct(self.patches, self.fold(one()), self.inputs)
            return found.made_of(Arrived(u, self.fold.last))
        regrouped = _regrouped(self.patches, v, self.fold, sample_index, self.inputs)
        return None if regrouped is None else regrouped.made_of(Arrived(u, self.fold.last))

    def summed_vjp(self, u: Tensor) -> Tensor:
        # All rows are places of one sample: (K, G, O, R*L) (G, I, R*L)^T.
        v, p = self.fold(u), self.patches()
        return (v.movedim(1, -2).flatten(-2) @ p.movedim(0, -2).flatten(-2).mT).reshape(
            -1, *self.inputs
        )

    def outer_patches(self) -> Patches | None:
        return self.patches if self.groups == 1 and len(self.outputs) == 1 else None

    @property
    def column_entries(self) -> int:
        return 0  # V is a view of the columns

    @property
    def kron_size(self) -> KronSize | None:
        return KronSize(*self.matrix)

    @property
    def patch_entries(self) -> int:
        g, _, i = self.matrix
        return self.n * self.places * g * i if self.places > 1 else 0


class ScaleShift(Jacobian):
    """A scale that all places share: y = w * m + …, the affine parameters of a norm. Without m a
    shift, J = 1: a bias.

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
        self.m = m
        self.fold = _Fold(outputs, math.prod(inputs), 1, last)
        super().__init__(inputs, outputs, like)

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
        if not isinstance(other, ScaleShift):
            return super().times(other)
        m, n = self.m, other.m
        if m is None and n is None:
            return ScaleShift(self.inputs, self.outputs, self.like, last=self.fold.last)
        if m is None or n is None:
            return super().times(other)
        both = lambda: m() * n()
        return ScaleShift(self.inputs, self.outputs, self.like, m=both, last=self.fold.last)

    def factor(self, u: Tensor, sample_index: SampleIndex) -> Factor | None:
        # V U^T with one place of width one that holds 1: a sample's places are summed at once
        v = self._weighted(u)
        total = self._summed_places(v, sample_index)
        if total is None:
            return None
        plain = sample_index.of is None and sample_index.n == self.n
        same = plain and v.shape[-1] == 1 and self.m is None  # total is another view of u
        ones = Patches.ones(sample_index.n, self.like)
        found = OuterProduct(
            ones.to(total.dtype), total[..., None], self.inputs, u if same else None
        )
        found.scales = [self]
        return found if self.m is not None else found.made_of(Arrived(u, self.fold.last), True)

    def of_same_call(self, other: ScaleShift) -> bool:
        """Whether both are of one call of a layer."""
        return self.like is other.like

    def products(self, other: ScaleShift, dtype: torch.dtype) -> Tensor | None:
        """J * J' summed over rows and places in a dtype, (P,); None where they go along other axes,
        so that J^T J' is no diagonal.
        """
        m, n = self.m, other.m
        if self.fold.key != other.fold.key:
            return None
        if m is None and n is None:
            places = math.prod(self.outputs) // self.fold.channels
            return self.like.new_full((self.fold.channels,), self.n * places, dtype=dtype)
        made = [j.m().to(dtype) for j in (self, other) if j.m is not None]
        both = made[0] * made[-1] if len(made) == 2 else made[0]
        return self.fold(both, 1).sum((0, 1, 3))

    def _summed_places(self, v: Tensor, sample_index: SampleIndex) -> Tensor | None:
        """v of (K, R, 1, D, L), summed over all places of each sample, (K, n, 1, D); None where a
        place holds entries of several samples.
        """
        if sample_index.of is None:
            return sample_index.sum(v[..., 0] if v.shape[-1] == 1 else v.sum(-1))
        of = self.fold(sample_index.of.expand(v.shape[1], *self.outputs), 1)  # (R, 1, D, L)
        key: Hashable = len(of), self.fold.key
        if not sample_index.answer(key, lambda: bool((of == of[:, :, :1]).all())):
            return None
        key = None if sample_index.key is None else (sample_index.key, key)
        of_places = SampleIndex(sample_index.n, of[:, 0, 0].reshape(-1), key=key)
        return of_places.sum(v.movedim(-1, 2).flatten(1, 2))

    def outer_patches(self) -> Patches | None:
        plain = self.m is None and self.inputs == self.outputs and len(self.outputs) == 1
        return Patches.ones(self.n, self.like) if plain else None

    @property
    def column_entries(self) -> int:
        return 0  # the columns themselves, or their sums


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
        if v.shape[1] == 1:  # a direction that all rows share
            out = v[:, 0][:, self.index]
        else:
            row = torch.arange(self.n, device=v.device).reshape(-1, *[1] * (self.index.dim() - 1))
            out = v[:, row, self.index]
        return out if self.keep is None else out * self._mask(out)

    def _mask(self, t: Tensor) -> Tensor:
        assert self.keep is not None
        return self.keep.reshape(*self.keep.shape, *[1] * (t.dim() - 1 - self.keep.dim()))

    def _rows(self, u: Tensor, sample_index: SampleIndex) -> RowSparse | None:
        """u (K, R, *outputs) as rows of the table for each of n samples; None where a row of the
        table holds entries of several samples.
        """
        sample = self._samples(u, sample_index)
        if sample is None:
            return None
        sample = sample.expand(self.index.shape)
        if self.keep is not None:  # padding reads no row: it is nobody's
            sample = torch.where(self.keep, sample, -1)
        v, sample = u.flatten(1, self.index.dim()), sample.reshape(-1)
        return RowSparse.build(v, sample, self.index.reshape(-1), sample_index.n, self.inputs)

    def _samples(self, u: Tensor, sample_index: SampleIndex) -> Tensor | None:
        """Of which sample each entry of `index` is, of a shape that broadcasts to it."""
        places = self.index.dim()
        if sample_index.of is None:
            rows = sample_index.rows(u.shape[1], u.device)
            assert rows is not None
            return rows.reshape(-1, *[1] * (places - 1))
        of = sample_index.of.expand(u.shape[1], *self.outputs)
        whole = of.flatten(places) if len(self.inputs) > 1 else of[..., None]  # (R, *places, row)
        alike = lambda: bool((whole == whole[..., :1]).all())
        question = "table", u.shape[1], self.outputs, places, len(self.inputs)
        return whole[..., 0] if sample_index.answer(question, alike) else None

    def vjp(self, u: Tensor) -> Tensor:
        found = self._rows(u, SampleIndex(u.shape[1]))
        assert found is not None
        return found.dense()

    def factor(self, u: Tensor, sample_index: SampleIndex) -> Factor | None:
        return self._rows(u, sample_index)

    def summed_vjp(self, u: Tensor) -> Tensor:
        found = self._rows(u, SampleIndex(1))
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

    @property
    def kron_size(self) -> KronSize | None:
        return KronSize(1, math.prod(self.inputs[1:]), self.inputs[0], diagonal=True)

    @property
    def column_entries(self) -> int:
        return 0  # the columns themselves, and their sums where an index repeats
