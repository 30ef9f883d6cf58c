"""B = V U^T: the factor at a weight, whose input is seen in patches U, kept as its two thin
factors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from nnj.jacobians.factor import CHUNK, Factor, SquareSum

# entries of all kernels of one parameter: a chunk that adds to more goes through main memory
KERNELS = 1 << 22
SQUARED = 1 << 22  # entries of B that are formed and squared at a time
SMALL = 1 << 12  # entries of B of one sample and column, below which samples are taken together


def outer(v: Tensor, u: Tensor) -> Tensor:
    """V U^T, (K, N, G, O, I); by column, since a broadcast product would copy U for each."""
    if len(v) < 2:
        return (v[0] @ u.mT)[None] if len(v) else v @ u.mT
    return torch.stack([column @ u.mT for column in v])


class Patches:
    """U of (N, G, I, L), made for some samples when it is asked for: of all of a batch it is often
    the largest tensor there is.

    Args:
        make: U of the samples in a slice.
        n, inputs: N and I.
    """

    def __init__(self, make: Callable[[slice], Tensor], n: int, inputs: int):
        self.make, self.n, self.inputs = make, n, inputs

    @classmethod
    def of(cls, u: Tensor) -> Patches:
        """Those that stand in memory already."""
        return cls(lambda rows: u[rows], u.shape[0], u.shape[2])

    def __call__(self, rows: slice = slice(None)) -> Tensor:
        return self.make(rows)

    def to(self, dtype: torch.dtype) -> Patches:
        return Patches(lambda rows: self.make(rows).to(dtype), self.n, self.inputs)

    def parts(self, entries: int) -> list[slice]:
        """All samples in parts of which a tensor of so many entries for each sample is small."""
        step = max(1, CHUNK // max(1, entries))
        return [slice(a, min(a + step, self.n)) for a in range(0, self.n, step)]


class OuterProduct(Factor):
    """B = V U^T: sum over places l of v[.., o, l] u[.., i, l], for each column, sample and group.

    Linear layers, convolutions and biases are of this form. Two uses of one weight are more places.

    Args:
        u: U, (N, G, I, L), or the patches that make it.
        v: V, (K, N, G, O, L).
        shape: of the parameter, (G * O, ...).
        origin: the columns of which v is another view, so that what several parameters ask of
            them is computed once.
    """

    v: Tensor

    def __init__(
        self, u: Patches | Tensor, v: Tensor, shape: Sequence[int], origin: Tensor | None = None
    ):
        self.patches = Patches.of(u) if isinstance(u, Tensor) else u
        self.v, self.shape, self.origin = v, tuple(shape), origin
        self.k, self.n, self.form = v.shape[0], v.shape[1], tuple(v.shape[2:])  # (G, O, L)
        self.device, self.dtype = v.device, v.dtype

    @property
    def u(self) -> Tensor:
        """U, (N, G, I, L)."""
        return self.patches()

    def dense(self) -> Tensor:
        return outer(self.v, self.u).reshape(self.k, self.n, *self.shape)

    def columns(self, which: slice) -> Factor:
        whole = which == slice(0, self.k)
        return self if whole else OuterProduct(self.patches, self.v[which], self.shape)

    def to(self, dtype: torch.dtype) -> Factor:
        return OuterProduct(self.patches.to(dtype), self.v.to(dtype), self.shape)

    def write(self, out: Tensor, more: bool) -> None:
        (g, o, _), i = self.form, self.patches.inputs
        if g != 1 or out.dtype != self.dtype or out.stride(1) != 1:
            super().write(out, more)
            return
        # large, so formed where it is wanted
        target, v, u = out.view(-1, o, i), self.v[0, :, 0], self.u[:, 0].mT
        target.baddbmm_(v, u) if more else torch.bmm(v, u, out=target)

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        g, o, _ = self.form
        if self.shape != (o, self.patches.inputs) or g != 1:
            return super().entries(sample, index)
        return torch.einsum("kml,mil->kmi", self.v[:, sample, 0, index], self.u[sample, 0])

    def rmatvec(self, c: Tensor) -> Tensor:
        (g, o, places), i = self.form, self.patches.inputs
        total = torch.zeros(g, o, i, dtype=self.dtype, device=self.device)
        for rows in self.patches.parts(g * i * places):
            v = torch.einsum("kn,kngol->ngol", c[:, rows], self.v[:, rows])
            total += torch.einsum("ngol,ngil->goi", v, self.patches(rows))
        return total.reshape(self.shape)

    def merge_key(self) -> Hashable:
        return (OuterProduct, *self.form[:2], self.patches.inputs)

    def merge(self, uses: Sequence[OuterProduct]) -> Factor:
        join = lambda rows: torch.cat([use.patches(rows) for use in uses], -1)
        patches = Patches(join, self.n, self.patches.inputs)
        return OuterProduct(patches, torch.cat([use.v for use in uses], -1), self.shape)

    # -- squares -----------------------------------------------------------------------------------

    def square_sum(self) -> Tensor:
        if self.by_gram(self.k):
            return kernel_squares(self.kernels(), self.patches).to(self.dtype).reshape(self.shape)
        return self.squares_by_column()

    def squares(self, total_columns: int | None = None) -> SquareSum:
        if self.by_gram(total_columns or self.k):
            return SquareSum(later=KernelSum(self.kernels(), self.patches, self.shape, self.dtype))
        return SquareSum(self.squares_by_column())

    def by_gram(self, total_columns: int) -> bool:
        """Whether the kernels V^T V over all columns cost less than to form B for each column.

        Multiply-adds for each output channel and sample: 2 L^2 (K + I / 2) with kernels (in
        float64), and 32 L^2 to add them up in each chunk; K L I without, where B also writes and
        reads K I squares (8: what a square costs beside a multiply-add). With one place they always
        do.
        """
        (g, o, l), i = self.form, self.patches.inputs
        chunks = max(1, total_columns / max(1, self.k))
        kernels = 2 * l * l * (total_columns + i / 2 + 16 * (chunks - 1))
        fits = self.n * g * o * l * l <= KERNELS
        return l == 1 or (kernels < total_columns * i * (l + 8) and fits)

    def kernels(self) -> Tensor:
        """V^T V over the columns for each output channel, (N, G, O, L, L)."""
        if self.form[2] == 1:
            return self._one_place()
        # entries of B are differences of kernels: single precision would leave noise, even below
        # zero
        v = self.v.double()
        return v.permute(1, 2, 3, 4, 0) @ v.permute(1, 2, 3, 0, 4)

    def _one_place(self) -> Tensor:
        if self.origin is None:
            return self.v.square().sum(0)[..., None]
        known = getattr(self.origin, "nnj_squares", None)
        if known is None:
            known = self.origin.nnj_squares = self.v.square().sum(0)  # type: ignore[attr-defined]
        return known.reshape(*self.v.shape[1:], 1).clone()  # kernels are added to in place

    def squares_by_column(self) -> Tensor:
        """The sum over columns of B^2, each B formed, (*shape): by sample, in products as large as
        caches like them.
        """
        (g, o, l), i = self.form, self.patches.inputs
        total = torch.zeros(g, o, i, dtype=self.dtype, device=self.device)
        if g * o * i <= SMALL:
            for rows in self.patches.parts(g * (o + l) * i):
                u = self.patches(rows).mT
                for column in self.v[:, rows]:
                    total += (column @ u).square_().sum(0)
            return total.reshape(self.shape)
        step = max(1, SQUARED // (g * o * i))
        for s in range(self.n):
            u = self.patches(slice(s, s + 1))[0].mT
            for a in range(0, self.k, step):
                for b in _each(self.v[a : a + step, s], u):
                    total.addcmul_(b, b)
        return total.reshape(self.shape)

    # -- blocks ------------------------------------------------------------------------------------

    def gram(self, other: Factor) -> Tensor:
        if isinstance(other, OuterProduct) and self.k > 1 and self._is_row and other._is_row:
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
        total = torch.zeros(o * q, i * j, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // max(1, o * q + i * j))
        for s in range(0, self.n, step):
            left = a[:, s : s + step].permute(1, 2, 0) @ b[:, s : s + step].permute(1, 0, 2)
            right = x[s : s + step, :, None] * y[s : s + step, None, :]
            total.addmm_(left.flatten(1).mT, right.flatten(1))
        return total.reshape(o, q, i, j).transpose(1, 2).reshape(o * i, q * j)


class KernelSum:
    """Kernels V^T V of one factor, (N, G, O, L, L), which add up over chunks of columns and meet U
    only once: diag(U (V^T V) U^T), where no entry of B is formed.
    """

    def __init__(
        self, kernels: Tensor, patches: Patches, shape: tuple[int, ...], dtype: torch.dtype
    ):
        self.kernels, self.patches, self.shape, self.dtype = kernels, patches, shape, dtype

    def add_(self, other: KernelSum) -> KernelSum:
        self.kernels.add_(other.kernels)
        return self

    def value(self) -> Tensor:
        """(*shape)."""
        return kernel_squares(self.kernels, self.patches).to(self.dtype).reshape(self.shape)


def _each(v: Tensor, u: Tensor) -> Iterable[Tensor]:
    """v (K, G, O, L) times u (G, L, I) for each of the K, one to be used before the next is asked
    for.
    """
    k, g, o, l = v.shape
    i = u.shape[2]
    if g > 1 or v.stride(2) != 1 or o < i:
        result: Iterable[Tensor] = (
            (v.transpose(0, 1).reshape(g, -1, l) @ u).unflatten(1, (-1, o)).unbind(1)
        )
        return result
    # v is as a linear layer on sequences has it: a copy would cost as much
    if v.device.type != "cpu" or o * i < 1 << 15:
        return (v[:, 0] @ u.expand(k, -1, -1))[:, None].unbind(0)
    room = v.new_empty(o, i)  # stays in the caches
    return (torch.mm(column[0], u[0], out=room)[None] for column in v)


def kernel_squares(kernel: Tensor, patches: Patches) -> Tensor:
    """diag(U (V^T V) U^T), summed over the samples: kernels (N, G, O, L, L) of one factor give the
    squares (G, O, I) of its B.
    """
    g, o, l = kernel.shape[1:4]
    i = patches.inputs
    if l == 1:
        return kernel[..., 0, 0].permute(1, 2, 0) @ patches()[..., 0].square().transpose(0, 1)
    left, right = torch.triu_indices(l, l, device=kernel.device)
    # kernels are symmetric: half of them, twice
    twice = torch.where(left == right, 1.0, 2.0).to(kernel.dtype)
    found = torch.zeros(g, o, i, dtype=kernel.dtype, device=kernel.device)
    for rows in patches.parts(g * l * l * (o + i)):
        u = patches(rows).to(kernel.dtype)
        half = (kernel[rows][..., left, right] * twice).permute(1, 2, 0, 3).flatten(2)
        pairs = (u[..., left] * u[..., right]).permute(1, 0, 3, 2).flatten(1, 2)
        found += half @ pairs
    return found.clamp_(min=0)
