"""B = V U^T where all samples have the same columns V, and one place: at the last layer, of the
unit cotangents, or of others that do not depend on the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor, Pairs
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.patches import Patches


class Unit(NamedTuple):
    """Rows start to start + k of the identity of size o, which is not made where none is needed."""

    start: int
    k: int
    o: int


class SharedColumns(OuterProduct):
    """B[k, n] = v_k u_n^T. Nothing of it has both axes, of columns and of samples.

    Args:
        patches: U, (N, 1, I, 1).
        columns: V, (K, O), or some rows of the identity.
        shape: of the parameter.
        like: a tensor of the dtype and on the device of B.
    """

    def __init__(
        self, patches: Patches, columns: Tensor | Unit, shape: Sequence[int], like: Tensor
    ):
        self.patches, self.shape, self.like = patches, tuple(shape), like
        self.unit = columns if isinstance(columns, Unit) else None
        self.given = columns
        self.k, o = (columns.k, columns.o) if isinstance(columns, Unit) else columns.shape
        self.n, self.form = patches.n, (1, o, 1)
        self.device, self.dtype = like.device, like.dtype

    @cached_property
    def shared(self) -> Tensor:
        """V, (K, O)."""
        if isinstance(self.given, Tensor):
            return self.given
        start, k, o = self.given
        found = self.like.new_zeros(k, o)
        found.diagonal(start).fill_(1)
        return found

    @cached_property
    def v(self) -> Tensor:  # type: ignore[override]
        return self.shared[:, None, None, :, None].expand(self.k, self.n, 1, -1, 1)

    def _with(
        self, patches: Patches, columns: Tensor | Unit, shape: Sequence[int]
    ) -> SharedColumns:
        return SharedColumns(patches, columns, shape, self.like)

    def columns(self, which: slice) -> Factor:
        if self.unit is None:
            return self._with(self.patches, self.shared[which], self.shape)
        some = Unit(self.unit.start + which.start, which.stop - which.start, self.unit.o)
        return self._with(self.patches, some, self.shape)

    def to(self, dtype: torch.dtype) -> Factor:
        columns = self.shared.to(dtype) if self.unit is None else self.unit
        return SharedColumns(self.patches.to(dtype), columns, self.shape, self.like.to(dtype))

    def same_v(self, other: OuterProduct) -> bool:
        return isinstance(other, SharedColumns) and (
            self.unit == other.unit if self.unit is not None else other.given is self.given
        )

    def with_patches(self, patches: Patches, shape: Sequence[int]) -> OuterProduct:
        return self._with(patches, self.given, shape)

    def rotate(
        self, left: Tensor | None, right: Tensor | None, shape: Sequence[int] | None = None
    ) -> Factor:
        g, o, i = self.grid(left, right)
        if g > 1 or (o, i) != (self.form[1], self.patches.inputs):
            return super().rotate(left, right, shape)
        v = self.given if left is None else left[0] if self._is_whole else self.shared @ left[0]
        patches = self.patches
        if right is not None:
            turned = lambda rows: (right[0].mT @ self.patches(rows)[:, 0])[:, None]
            patches = Patches(turned, self.n, right.shape[2])
        outputs = o if left is None else left.shape[2]
        return self._with(patches, v, shape or (outputs, patches.inputs))

    @property
    def _is_whole(self) -> bool:
        """Whether V is all of the identity."""
        return self.unit is not None and self.unit.start == 0 and self.unit.k == self.unit.o

    def _kernel_of_vectors(self, other: OuterProduct, d: Tensor | None, pairs: Pairs) -> Tensor:
        if not isinstance(other, SharedColumns):
            return super()._kernel_of_vectors(other, d, pairs)
        w = self._weight(other, d)  # (N, O)
        if self.unit is not None and self.same_v(other):
            start, k, o = self.unit
            w = w.expand(-1, o)[:, start : start + k]
            return w.contiguous() if pairs == "row" else torch.diag_embed(w)
        if pairs == "row":
            both = self.shared * other.shared
            return w @ both.mT if w.shape[1] > 1 else w * both.sum(1)
        return (self.shared * w[:, None]) @ other.shared.mT

    def _square_norms(self) -> Tensor:
        return self._kernel_of_vectors(self, None, "row").mT

    def _weight(self, other: OuterProduct, d: Tensor | None) -> Tensor:
        """sum_i d_oi u_i u'_i, (N, O), or (N, 1) where it is the same for all outputs."""
        u = (self.u * other.u)[:, 0, :, 0]
        if d is None:
            return u.sum(1, keepdim=True)
        return u @ d[0, 0].mT if len(d) == 1 else (d[:, 0] @ u[..., None])[..., 0]

    def _kernel_of_rows(self, other: OuterProduct) -> Tensor:
        if not isinstance(other, SharedColumns):
            return super()._kernel_of_rows(other)
        u = self.u[:, 0, :, 0] @ other.u[:, 0, :, 0].mT
        every: Tensor = (self.shared @ other.shared.mT)[:, None, :, None] * u[None, :, None]
        return every
