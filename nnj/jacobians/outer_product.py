"""B = V U^T: the factor at a weight, whose input is seen in patches U, kept as its two thin
factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nnj.jacobians.factor import CHUNK, Factor, Pairs
from nnj.jacobians.kron import Approx, Bias, Columns, Kron
from nnj.jacobians.outer_kernels import Thin, kernel_of_all
from nnj.jacobians.outer_kernels_within import kernel_within
from nnj.jacobians.outer_kron import OuterKron, square
from nnj.jacobians.outer_squares import KernelSum, explicit_squares, kernel_squares
from nnj.jacobians.patches import Patches, outer
from nnj.jacobians.square_sum import SquareSum

# entries of all kernels of one parameter: a chunk that adds to more goes through main memory
KERNELS = 1 << 22


class Scale(Protocol):
    """A scale and shift, of which J is a diagonal at each place."""

    def of_same_call(self, other: Any) -> bool:
        """Whether both are of one call of a layer."""
        ...

    def products(self, other: Any, dtype: torch.dtype) -> Tensor | None:
        """J * J' summed over rows and places in a dtype, (P,); None where J^T J' is no diagonal."""
        ...


class OuterProduct(Factor):
    """B = V U^T: sum over places l of v[.., o, l] u[.., i, l], for each column, sample and group.

    Linear layers, convolutions and biases are of this form. Two uses of one weight are more places.

    Args:
        u: U, (N, G, I, L), or the patches that make it.
        v: V, (K, N, G, O, L).
        shape: of the parameter, (G * O, ...).
        origin: the columns of which v is another view, or what stands for them, so that what
            several parameters ask of them is computed once.

    Attributes:
        of: the columns of which each place of V is a view, or of whose places it is a sum, where
            they are known.
        is_bias: whether it is a sum over places of columns, and U is one.
        scales: the scales and shifts that it comes from, one for each use.
        of_one: makes the factor of one column that has the squares of all, if there is one.
    """

    v: Tensor
    origin: object | None = None
    of: Columns = ()
    is_bias: bool = False
    scales: Sequence[Scale] = ()
    of_one: Callable[[], OuterProduct] | None = None

    def __init__(
        self, u: Patches | Tensor, v: Tensor, shape: Sequence[int], origin: object | None = None
    ):
        self.patches = Patches.of(u) if isinstance(u, Tensor) else u
        self.v, self.shape, self.origin = v, tuple(shape), origin
        self.k, self.n, g, o, places = v.shape
        self.form = g, o, places
        self.device, self.dtype = v.device, v.dtype

    @property
    def u(self) -> Tensor:
        """U, (N, G, I, L)."""
        return self.patches()

    def dense(self) -> Tensor:
        if self.patches.is_one:  # a copy: V is a view of columns that others see, too
            return self.v.clone().reshape(self.k, self.n, *self.shape)
        return outer(self.v, self.u).reshape(self.k, self.n, *self.shape)

    def columns(self, which: slice) -> Factor:
        if which == slice(0, self.k):
            return self
        found = OuterProduct(self.patches, self.v[which], self.shape)
        found.of = [(u, a + which.start, a + which.stop) for u, a, _ in self.of]
        found.is_bias, found.scales = self.is_bias, self.scales
        return found

    def made_of(self, u: object, is_bias: bool = False) -> OuterProduct:
        """The same, of which it is known of what columns it is made."""
        self.of, self.is_bias = [(u, 0, self.k)], is_bias
        return self

    def to(self, dtype: torch.dtype) -> Factor:
        found = OuterProduct(self.patches.to(dtype), self.v.to(dtype), self.shape)
        found.of, found.is_bias, found.scales = self.of, self.is_bias, self.scales
        return found

    def write(self, out: Tensor, more: bool) -> None:
        (g, o, l), i = self.form, self.patches.inputs
        if out.dtype != self.dtype or out.stride(2) != 1 or (g > 1 and l > 1):
            super().write(out, more)
            return
        # large, so formed where it is wanted
        target, u = out.unflatten(2, (g, o, i)), self.u.mT
        if l == 1:
            target.addcmul_(self.v, u) if more else torch.mul(self.v, u, out=target)
            return
        for place, v in zip(target[:, :, 0], self.v[:, :, 0], strict=True):
            place.baddbmm_(v, u[:, 0]) if more else torch.bmm(v, u[:, 0], out=place)

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        g, o, _ = self.form
        if self.shape != (o, self.patches.inputs) or g != 1:
            return super().entries(sample, index)
        return torch.einsum("kml,mil->kmi", self.v[:, sample, 0, index], self.u[sample, 0])

    def matvec(self, v: Tensor) -> Tensor:
        g, o, _ = self.form
        there = v.reshape(*self._lead(v), g, o, self.patches.inputs) @ self.u
        return torch.einsum("kngol,ngol->kn", self.v, there)

    def rmatvec(self, c: Tensor) -> Tensor:
        (g, o, places), i = self.form, self.patches.inputs
        total = torch.zeros(g, o, i, dtype=self.dtype, device=self.device)
        for rows in self.patches.parts(g * i * places):
            v = torch.einsum("kn,kngol->ngol", c[:, rows], self.v[:, rows])
            total += torch.einsum("ngol,ngil->goi", v, self.patches(rows))
        return total.reshape(self.shape)

    def scale_rows(self, c: Tensor) -> Factor:
        return OuterProduct(self.patches, self.v * c[..., None, None, None], self.shape)

    def kron(self, approx: Approx = "expand") -> list[Kron] | None:
        g, o, _ = self.form
        if len(self.shape) < 2 or self.shape[0] != g * o or self.scales:
            return None
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        outer_v = self.outer_v if g == self.form[2] == 1 else None
        kron = OuterKron(self.patches, lambda: self.v, self.form, like, approx, outer_v)
        kron.columns = self.of
        return [kron]

    def output_squares(self, other: Factor) -> Tensor | None:
        if not isinstance(other, OuterProduct) or not self.scales or not other.scales:
            return None
        total = torch.zeros(math.prod(self.shape), dtype=self.dtype, device=self.device)
        for one in self.scales:
            for two in other.scales:
                share = one.products(two, self.dtype) if one.of_same_call(two) else 0.0
                if share is None:
                    return None
                total += share
        return total

    def biases(self) -> list[Bias]:
        return [Bias(self.of)] if self.is_bias and len(self.shape) == 1 else []

    def rows(self, start: int, stop: int) -> Factor:
        if self.form[0] > 1 or self.shape[0] != self.form[1]:
            return super().rows(start, stop)
        shape = (stop - start, *self.shape[1:])
        found = OuterProduct(self.patches, self.v[:, :, :, start:stop], shape)
        found.of, found.is_bias = self.of, self.is_bias
        return found

    def rotate(
        self, left: Tensor | None, right: Tensor | None, shape: Sequence[int] | None = None
    ) -> Factor:
        g, o, i = self.grid(left, right, self.form[0])
        there = self._in_groups(g)
        if there is None or there[1].shape[3] != o or there[0].inputs != i:
            return super().rotate(left, right, shape)
        patches, v = there
        if left is not None:
            v = _times(left.mT, v)
        if right is not None:
            make, back = patches, right.mT
            patches = Patches(lambda rows: _times(back, make(rows)), self.n, right.shape[2])
            if self.n * g * right.shape[2] * self.form[2] <= CHUNK:
                patches = Patches.of(patches())  # made once
        return OuterProduct(patches, v, shape or (g * v.shape[3], patches.inputs))

    def _in_groups(self, groups: int) -> tuple[Patches, Tensor] | None:
        """U and V in some number of groups: a bias has one input, which is the same for all."""
        (g, o, _), make = self.form, self.patches
        if g == groups:
            return make, self.v
        if g != 1 or o % groups:
            return None
        spread = lambda rows: make(rows).expand(-1, groups, -1, -1)
        v = self.v.unflatten(3, (groups, o // groups)).squeeze(2)
        return Patches(spread, self.n, make.inputs), v

    def beside(self, other: Factor) -> Factor | None:
        if not isinstance(other, OuterProduct) or not self.same_v(other):
            return None
        there = other._in_groups(self.form[0])
        if there is None:
            return None
        mine, theirs = self.patches, there[0]
        join = lambda rows: torch.cat([mine(rows), theirs(rows)], 2)
        patches = Patches(join, self.n, mine.inputs + theirs.inputs)
        return self.with_patches(patches, (self.form[0] * self.form[1], patches.inputs))

    def same_v(self, other: OuterProduct) -> bool:
        """Whether both are known to have the same V, but for its groups."""
        return self.origin is not None and self.origin is other.origin

    def with_patches(self, patches: Patches, shape: Sequence[int]) -> OuterProduct:
        """V with another U."""
        return OuterProduct(patches, self.v, shape, self.origin)

    def merge_key(self) -> Hashable:
        return (OuterProduct, *self.form[:2], self.patches.inputs)

    def merge(self, uses: Sequence[OuterProduct]) -> Factor:
        made = [use.patches for use in uses]  # without their columns, which may go
        join = lambda rows: torch.cat([patches(rows) for patches in made], -1)
        patches = Patches(join, self.n, self.patches.inputs)
        found = OuterProduct(patches, torch.cat([use.v for use in uses], -1), self.shape)
        if all(use.of for use in uses):
            found.of = [columns for use in uses for columns in use.of]
        found.is_bias = all(use.is_bias for use in uses)
        if all(use.scales for use in uses):
            found.scales = [scale for use in uses for scale in use.scales]
        return found

    # -- squares -----------------------------------------------------------------------------------

    def square_sum(self, per_sample: bool = False) -> Tensor:
        if self.form[0] == self.form[2] == 1 and not per_sample:
            found = self._one_place()
            return found if found.shape == self.shape else found.reshape(self.shape)
        if self.of_one is not None and self.k > 1:
            return self.of_one().square_sum(per_sample)
        if self.by_gram(self.k):
            found = self._by_kernels(per_sample)
        else:
            found = explicit_squares(self.v, self.patches, per_sample)
        return found.reshape(self.n, *self.shape) if per_sample else found.reshape(self.shape)

    def squares(self, total_columns: int | None = None) -> SquareSum:
        total = total_columns or self.k
        if total <= self.k or self.of_one is not None:  # nothing comes later that would be merged
            return SquareSum(self.square_sum())
        if self.by_gram(total) and (self.may_keep or self.form[2] == 1):
            return SquareSum(later=KernelSum(self.kernels(), self.patches, self.shape, self.dtype))
        return SquareSum(explicit_squares(self.v, self.patches).reshape(self.shape))

    def kept(self, total_columns: int) -> int:
        (g, o, l), one = self.form, self.form[2] == 1 or self.of_one is not None
        keeps = total_columns > self.k and not one and self.by_gram(total_columns)
        return 8 * self.n * g * o * l * l if keeps else 0

    def by_gram(self, total_columns: int) -> bool:
        """Whether the kernels V^T V over all columns cost less than to form B for each column.

        In multiply-adds of single precision, for each output channel and sample. With kernels 2 L^2
        for each column, as they are in float64, and 32 L^2 to add them up in each later chunk;
        for each of P = L (L + 1) / 2 pairs of places 3 I in their product with pairs of inputs, and
        96 I to make these, which serve all O channels. Without, K I (L + 16), as B is also written,
        read and squared. The numbers are of measurements on a CPU (I to 1152, L to 100, K to 99),
        of which none took more than 1.1 times the shorter time. With one place kernels always cost
        less. Those of all samples are kept where later columns are to be added to them.
        """
        (g, o, l), i, k = self.form, self.patches.inputs, total_columns
        if l == 1:
            return True
        chunks = max(1, k / max(1, self.k))
        pairs = l * (l + 1) / 2
        kernels = 2 * l * l * (k + 16 * (chunks - 1)) + 3 * pairs * i * (1 + 32 / max(1, o))
        fits = chunks == 1 or self.n * g * o * l * l <= KERNELS
        return fits and kernels < k * i * (l + 16)

    def _by_kernels(self, per_sample: bool) -> Tensor:
        """The squares of all columns there are, by the kernels of some samples after the other."""
        (g, o, l), found = self.form, []
        step = max(1, KERNELS // max(1, g * o * l * l))
        for start in range(0, max(1, self.n), step):
            rows = slice(start, min(start + step, self.n))
            kernels, patches = self.kernels(rows), self.patches.of_rows(rows)
            found.append(kernel_squares(kernels, patches, per_sample))
        if len(found) > 1:
            found = [torch.cat(found) if per_sample else torch.stack(found).sum(0)]
        return found[0].to(self.dtype)

    def kernels(self, rows: slice = slice(None)) -> Tensor:
        """V^T V over the columns for each output channel of some samples, (n, G, O, L, L)."""
        if self.form[2] == 1:  # they are added to in place
            v = self.squared_columns()[rows]
            return v.reshape(len(v), *self.form[:2], 1, 1).clone()
        # entries of B are differences of kernels: single precision would leave noise, even below
        # zero
        v = self.v[:, rows].double()
        return v.permute(1, 2, 3, 4, 0) @ v.permute(1, 2, 3, 0, 4)

    def squared_columns(self) -> Tensor:
        """sum_k V^2 where there is one place, (N, G * O), which is not to be written to."""
        return self._of_columns("nnj_squares", lambda: self.v.square().sum(0).flatten(1))

    def _one_place(self) -> Tensor:
        """sum_n (sum_k v_no^2) u_ni^2, (O, I), or (O,) where U is one."""
        v = self.squared_columns()
        if self.patches.is_one:
            return v.sum(0)
        return v.mT @ self.patches().flatten(1).square()

    def outer_v(self) -> Tensor:
        """sum over k and n of v v^T, (O, O), of one place and one group: not to be changed."""
        flat = self.v.reshape(-1, self.form[1])
        return self._of_columns("nnj_outer", lambda: square(flat.mT))

    def _of_columns(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What several parameters ask of the same columns, made once."""
        if self.origin is None:
            return make()
        known: Tensor | None = getattr(self.origin, name, None)
        if known is None:
            known = make()
            setattr(self.origin, name, known)
        return known

    # -- two factors at one parameter --------------------------------------------------------------

    def inner(self, other: Factor, per_sample: bool = False) -> Tensor:
        if not isinstance(other, OuterProduct) or other.merge_key() != self.merge_key():
            return super().inner(other, per_sample)
        if self.form[2] == other.form[2] == 1:
            v = (self.v * other.v).sum(0)  # (N, G, O, 1)
            u = self.u * other.u  # (N, G, I, 1)
            if per_sample:
                every: Tensor = (v * u.mT).reshape(self.n, *self.shape)
                return every
            found = v[..., 0].permute(1, 2, 0) @ u[..., 0].transpose(0, 1)
            return found.reshape(self.shape)
        total = self._zeros(per_sample)
        for rows, a, b in self._both(other):
            products = (a * b).sum(0).reshape(b.shape[1], *self.shape)
            if per_sample:
                total[rows] = products
            else:
                total += products.sum(0)
        return total

    def kernel(self, other: Factor, pairs: Pairs = "all") -> Tensor:
        base, d = other.unscaled()
        if not isinstance(base, OuterProduct) or base.merge_key() != self.merge_key():
            return super().kernel(other, pairs)
        one_place = self.form[2] == base.form[2] == 1
        if pairs == "all":
            found = self._kernel_of_all(base, one_place) if d is None else None
            return super().kernel(other, pairs) if found is None else found
        if pairs == "row" and base is self and d is None:
            return self._square_norms()
        if d is not None:
            d = d.reshape(*(self._lead(d) or (1,)), *self.form[:2], self.patches.inputs)
        found = self._kernel_within(base, d, pairs, one_place)
        return found if pairs == "sample" else found.mT

    def _kernel_within(
        self, other: OuterProduct, d: Tensor | None, pairs: Pairs, one_place: bool
    ) -> Tensor:
        """Within each sample (N, K, K'), or of each row with the same one (N, K)."""
        if one_place:
            return self._kernel_of_vectors(other, d, pairs)
        mine = Thin(self.v, self.patches)
        theirs = mine if other is self else Thin(other.v, other.patches)
        return kernel_within(mine, theirs, d, pairs).to(self.dtype)

    def _kernel_of_all(self, other: OuterProduct, one_place: bool) -> Tensor | None:
        """Of every two rows; None where dense chunks are as good."""
        if one_place and self._is_row:
            return self._kernel_of_rows(other)
        mine, theirs = Thin(self.v, self.patches), Thin(other.v, other.patches)
        return kernel_of_all(mine, mine if other is self else theirs)

    def _kernel_of_rows(self, other: OuterProduct) -> Tensor:
        """(V V'^T) o (U U'^T): no entry of B is formed."""
        v, w = self.v[:, :, 0, :, 0], other.v[:, :, 0, :, 0]
        if other is not self:
            found: Tensor = torch.tensordot(v, w, ([2], [2])) * self._dots(other)
            return found
        found = self._of_columns("nnj_kernel", lambda: torch.tensordot(v, v, ([2], [2])))
        return found.clone() if self.is_bias else found * self._dots(self)

    def _dots(self, other: OuterProduct) -> Tensor:
        """u u', (N, 1, N'), of one place and one group."""
        return (self.u[:, 0, :, 0] @ other.u[:, 0, :, 0].mT)[:, None]

    def _square_norms(self) -> Tensor:
        """The squared norm of each row, (K, N)."""
        if self.form[2] != 1:
            return self._kernel_within(self, None, "row", False).mT
        # |v|^2 |u|^2; a bias has one group where its weight may have several
        name = f"nnj_norms_{self.form[0]}"
        v = self._of_columns(name, lambda: self.v.square().sum((3, 4)))  # (K, N, G)
        every = v if self.is_bias else v * self.u.square().sum((2, 3))
        return every.sum(2)

    def _kernel_of_vectors(self, other: OuterProduct, d: Tensor | None, pairs: Pairs) -> Tensor:
        """sum_o v_ko v'_k'o (sum_i d_oi u_i u'_i), for d of (N or 1, G, O, I)."""
        u = self.u * other.u  # (N, G, I, 1)
        if d is None:
            weight = u.sum(2, keepdim=True)
        elif len(d) == 1:
            weight = (u[..., 0].transpose(0, 1) @ d[0].mT).transpose(0, 1)[..., None]
        else:
            weight = d @ u
        return _contracted(self.v * weight, other.v, pairs)

    def _both(self, other: OuterProduct) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """B and B' of some samples at a time, (K, rows, G, O, I)."""
        g, o, _ = self.form
        for rows in self.patches.parts((self.k + other.k) * g * o * self.patches.inputs):
            b = outer(self.v[:, rows], self.patches(rows))
            yield rows, b, b if other is self else outer(other.v[:, rows], other.patches(rows))

    # -- blocks ------------------------------------------------------------------------------------

    def gram(self, other: Factor) -> Tensor:
        if isinstance(other, OuterProduct) and self._is_row and other._is_row:
            if self is other and self.is_bias:
                return self.outer_v().clone()
            if self.k > 1:
                return self._gram_of_rows(other)
        return super().gram(other)

    @property
    def _is_row(self) -> bool:
        """Whether a sample has one place and one group: then B is an outer product of vectors."""
        return self.form[0] == self.form[2] == 1

    def _gram_of_rows(self, other: OuterProduct) -> Tensor:
        """The block is sum_n (V^T V')_n (x) u_n u'_n^T, without B."""
        a, b = self.v[:, :, 0, :, 0], other.v[:, :, 0, :, 0]
        x, y = self.u[:, 0, :, 0], other.u[:, 0, :, 0]
        o, q, i, j = a.shape[2], b.shape[2], x.shape[1], y.shape[1]
        if i == j == 1:
            return (a * x).flatten(0, 1).mT @ (b * y).flatten(0, 1)
        total = torch.zeros(o * q, i * j, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // max(1, o * q + i * j))
        for s in range(0, self.n, step):
            left = a[:, s : s + step].permute(1, 2, 0) @ b[:, s : s + step].permute(1, 0, 2)
            right = x[s : s + step, :, None] * y[s : s + step, None, :]
            total.addmm_(left.flatten(1).mT, right.flatten(1))
        return total.reshape(o, q, i, j).transpose(1, 2).reshape(o * i, q * j)


def _times(m: Tensor, t: Tensor) -> Tensor:
    """m t for m of (G, A, B) and t of (..., G, B, L): one product for all of few places."""
    if t.shape[-1] >= 8:
        return m @ t
    (g, b, l), lead = t.shape[-3:], math.prod(t.shape[:-3])
    found = m @ t.reshape(lead, g, b, l).permute(1, 2, 0, 3).reshape(g, b, lead * l)
    result = found.reshape(g, m.shape[1], lead, l).permute(2, 0, 1, 3)
    return result.reshape(*t.shape[:-2], m.shape[1], l)


def _contracted(a: Tensor, b: Tensor, pairs: Pairs) -> Tensor:
    """The kernel of rows a (K, N, ...) and b (K', N, ...): within each sample (N, K, K'), or of
    each row with the same one (N, K).
    """
    if pairs == "row":
        # over the last axis without all products in memory; over more axes at once it is less exact
        found = a * b if a.shape[-1] == 1 else torch.einsum("kngoi,kngoi->kngo", a, b)
        return found.flatten(2).sum(-1).mT
    return a.flatten(2).transpose(0, 1) @ b.flatten(2).permute(1, 2, 0)
