"""B = V J: what columns V of the loss become at a parameter, one (N, *p) for each column, kept as lazily as J allows.

A GGN is sum over columns k and samples n of B[k, n]^T B[k, n]. Its diagonal and its blocks are asked of the *structure* of B,
which mostly never stands in memory: `Places` holds the two thin factors of B, `Lookup` its few rows that are not zero.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22  # entries of B that may stand in memory at once while it is being reduced
CACHE = 1 << 18  # entries of B that are formed and squared before the next ones are
KERNELS = 1 << 25  # entries of all kernels of one parameter


class Owner:
    """Which of `n` samples each entry of a tangent (K, R, *outputs) belongs to.

    `of` is None when rows are sample-major, R / n for each sample; otherwise a long tensor that broadcasts against
    (R, *outputs), -1 where an entry belongs to nobody. With `explicit`, axis 0 of the tangent is (K * n): every column
    is that of one sample, and all its entries are that sample's.
    """

    def __init__(self, n: int, of: Tensor | None = None, explicit: bool = False):
        self.n, self.of, self.explicit = n, of, explicit

    def rows(self, count: int, device: torch.device) -> Tensor | None:
        """The owner of each row (R,), or None where a row holds entries of several samples."""
        if self.of is None:
            return torch.arange(count, device=device) // (count // self.n)
        flat = self.of.reshape(self.of.shape[0], -1)
        if not bool((flat == flat[:, :1]).all()):
            return None
        return flat[:, 0].expand(count)

    def tidy(self) -> Owner:
        """The same with nobody's entries given to the owner of the others in their row, and plain where it is sample-major."""
        of = self.of
        if of is None or self.explicit:
            return self
        for axis in range(of.dim() - 1, 0, -1):
            one = of.amax(axis, keepdim=True)
            if bool(((of == one) | (of < 0)).all()):
                of = one
        if of.shape[0] % self.n == 0:
            rows = torch.arange(of.shape[0], device=of.device) // (of.shape[0] // self.n)
            if bool(((of == rows.reshape(-1, *[1] * (of.dim() - 1))) | (of < 0)).all()):
                return Owner(self.n)
        return Owner(self.n, of)

    def sum(self, t: Tensor) -> Tensor | None:
        """(K, R, *s) -> (K, n, *s), rows of one sample added; None where rows are not of one sample."""
        if self.of is None:
            r = t.shape[1]
            return t if r == self.n else t.unflatten(1, (self.n, r // self.n)).sum(2)
        rows = self.rows(t.shape[1], t.device)
        if rows is None:
            return None
        alive = (rows >= 0).nonzero()[:, 0]
        out = t.new_zeros(t.shape[0], self.n, *t.shape[2:])
        return out.index_add_(1, rows[alive], t[:, alive])

    def split(self, v: Tensor) -> Tensor:
        """(K, R, *outputs) -> (K * n, R, *outputs): each column once for each sample, all other samples' entries zero."""
        of = self.of
        if of is None:
            of = self.rows(v.shape[1], v.device)
            of = of.reshape(-1, *[1] * (v.dim() - 2))  # type: ignore[union-attr]
        sample = torch.arange(self.n, device=v.device).reshape(-1, *[1] * (v.dim() - 1))
        return (v[:, None] * (of == sample)).flatten(0, 1)


class Factor:
    """B of shape (K, N, *shape). Must define `dense` and `columns`; may override the rest, for speed alone."""

    k: int
    n: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """B itself, (K, N, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} must define dense")

    def write(self, out: Tensor, more: bool) -> None:
        """Put the only column into `out` of (N, P), or with `more` add it to what is there."""
        flat = self.dense()[0].reshape(out.shape)
        out.add_(flat) if more else out.copy_(flat)

    def columns(self, which: slice) -> Factor:
        """The same for some of the columns."""
        raise NotImplementedError(f"{type(self).__name__} must define columns")

    def to(self, dtype: torch.dtype) -> Factor:
        """The same in another precision."""
        return Explicit(self.dense().to(dtype))

    def chunks(self) -> list[Factor]:
        """Groups of columns of which the dense form is small."""
        step = max(1, CHUNK // max(1, self.n * math.prod(self.shape)))
        return [self.columns(slice(i, min(i + step, self.k))) for i in range(0, self.k, step)]

    def inner(self, other: Factor) -> Tensor:
        """sum over k and n of B * B', entry by entry: (*shape)."""
        if isinstance(other, Lookup):
            return other.inner(self)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // max(1, self.n * math.prod(self.shape)))
        for i in range(0, self.k, step):
            part = slice(i, min(i + step, self.k))
            total += (self.columns(part).dense() * other.columns(part).dense()).sum((0, 1))
        return total

    def square_sum(self) -> Tensor:
        """sum over k and n of B^2: the diagonal of the GGN, (*shape)."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for part in self.chunks():
            total += part.dense().square().sum((0, 1))
        return total

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        """B[:, sample, index] for paired samples and indices of the first axis: (K, M, *shape[1:])."""
        return self.dense()[:, sample, index]

    def gram(self, other: Factor) -> Tensor:
        """sum over k and n of the outer products of B and B': the block of the GGN, (P, P')."""
        p, q = math.prod(self.shape), math.prod(other.shape)
        total = torch.zeros(p, q, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // max(1, self.n * (p + q)))
        for i in range(0, self.k, step):
            part = slice(i, min(i + step, self.k))
            a = self.columns(part).dense().reshape(-1, p)
            b = a if other is self else other.columns(part).dense().reshape(-1, q)
            total.addmm_(a.mT, b)
        return total


def outer(v: Tensor, u: Tensor) -> Tensor:
    """V U^T for each column, (K, N, G, O, I); by column, since a broadcast product would copy U for each."""
    return (v[0] @ u.mT)[None] if len(v) == 1 else torch.stack([column @ u.mT for column in v])


class Explicit(Factor):
    """B as it stands, b of (K, N, *shape)."""

    def __init__(self, b: Tensor):
        self.b = b
        self.k, self.n, self.shape = b.shape[0], b.shape[1], tuple(b.shape[2:])
        self.device, self.dtype = b.device, b.dtype

    def dense(self) -> Tensor:
        return self.b

    def columns(self, which: slice) -> Factor:
        return Explicit(self.b[which])


class Places(Factor):
    """B = V U^T: sum over places l of v[.., o, l] u[.., i, l], with v of (K, N, G, O, L) and u of (N, G, I, L).

    Linear, convolutions and biases are of this form. Two uses of one weight are more places.
    """

    def __init__(self, u: Tensor, v: Tensor, shape: Sequence[int]):
        self.u, self.v, self.shape = u, v, tuple(shape)
        self.k, self.n = v.shape[0], v.shape[1]
        self.device, self.dtype = v.device, v.dtype

    def dense(self) -> Tensor:
        return outer(self.v, self.u).reshape(self.k, self.n, *self.shape)

    def write(self, out: Tensor, more: bool) -> None:
        g, o, i = *self.v.shape[2:4], self.u.shape[2]
        if g != 1 or out.dtype != self.dtype or out.stride(1) != 1:
            super().write(out, more)
            return
        target, v, u = out.view(-1, o, i), self.v[0, :, 0], self.u[:, 0].mT  # large, so formed where it is wanted
        target.baddbmm_(v, u) if more else torch.bmm(v, u, out=target)

    def columns(self, which: slice) -> Factor:
        return Places(self.u, self.v[which], self.shape)

    def to(self, dtype: torch.dtype) -> Factor:
        return Places(self.u.to(dtype), self.v.to(dtype), self.shape)

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        g, o = self.v.shape[2:4]
        i = self.u.shape[2]
        if self.shape != (o, i) or g != 1:
            return super().entries(sample, index)
        return torch.einsum("kml,mil->kmi", self.v[:, sample, 0, index], self.u[sample, 0])

    def square_sum(self) -> Tensor:
        return SquareSum(self).value()

    def by_gram(self, in_all: int) -> bool:
        """Whether the kernels V^T V over `in_all` columns cost less than to form B for each column.

        Multiply-adds for each output channel and sample: 2 L^2 (K + I / 2) with kernels (in float64), K L I without, where B also
        writes and reads K I squares (8: what a square costs beside a multiply-add).
        """
        n, g, o, l = self.v.shape[1:]
        i = self.u.shape[2]
        return l > 1 and 2 * l * l * (in_all + i / 2) < in_all * i * (l + 8) and n * g * o * l * l <= KERNELS

    def explicit_squares(self) -> Tensor:
        """The sum over columns of B^2, each B formed: (G, O, I)."""
        k, n, g, o, l = self.v.shape
        i = self.u.shape[2]
        if l == 1:
            v2 = self.v.square().sum(0)[..., 0].permute(1, 2, 0)
            return v2 @ self.u.square()[..., 0].transpose(0, 1)
        total = torch.zeros(g, o, i, dtype=self.dtype, device=self.device)
        u = self.u.contiguous()
        step = max(1, CACHE // (g * o * i))
        for a in range(0, n, step):
            ut = u[a : a + step].mT
            for c in range(k):  # by column: a product over all columns at once would copy U for each of them
                b = self.v[c, a : a + step] @ ut
                if len(b) == 1:
                    total.addcmul_(b[0], b[0])
                else:
                    total += b.square_().sum(0)
        return total

    def kernels(self) -> Tensor:
        """V^T V over the columns for each output channel, (N, G, O, L, L)."""
        v = self.v.double()  # entries of B are differences of kernels: single precision would leave noise, even below zero
        return v.permute(1, 2, 3, 4, 0) @ v.permute(1, 2, 3, 0, 4)

    def gram(self, other: Factor) -> Tensor:
        one = isinstance(other, Places) and self.v.shape[4] == other.v.shape[4] == self.v.shape[2] == other.v.shape[2] == 1
        if not one or self.k == 1:
            return super().gram(other)
        # One place: the block is sum_n (V^T V)_n (x) u_n u'_n^T, without B.
        a, b = self.v[:, :, 0, :, 0], other.v[:, :, 0, :, 0]  # type: ignore[attr-defined]
        x, y = self.u[:, 0, :, 0], other.u[:, 0, :, 0]  # type: ignore[attr-defined]
        o, q, i, j = a.shape[2], b.shape[2], x.shape[1], y.shape[1]
        total = torch.zeros(o * q, i * j, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // (o * q + i * j))
        for s in range(0, self.n, step):
            left = a[:, s : s + step].permute(1, 2, 0) @ b[:, s : s + step].permute(1, 0, 2)
            right = x[s : s + step, :, None] * y[s : s + step, None, :]
            total.addmm_(left.flatten(1).mT, right.flatten(1))
        return total.reshape(o, q, i, j).transpose(1, 2).reshape(o * i, q * j)


class SquareSum:
    """sum over columns and samples of B^2, of columns that come in turns. Turns add up with +, and `value` is the sum.

    Where kernels are cheaper they add up over the turns, and meet U only once: diag(U (V^T V) U^T), no entry of B is formed.
    """

    def __init__(self, factor: Factor, in_all: int | None = None):
        self.shape, self.total, self.kernel = factor.shape, None, None
        if isinstance(factor, Places) and factor.by_gram(in_all or factor.k):
            self.kernel, self.u, self.dtype = factor.kernels(), factor.u.double(), factor.dtype
        elif isinstance(factor, Places):
            self.total = factor.explicit_squares().reshape(self.shape)
        else:
            self.total = factor.square_sum()

    def __add__(self, other: SquareSum) -> SquareSum:
        for name in ("total", "kernel"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                setattr(self, name, theirs if mine is None else mine.add_(theirs))
                if name == "kernel":
                    self.u, self.dtype = other.u, other.dtype
        return self

    def value(self) -> Tensor:
        """(*shape)."""
        if self.kernel is None:
            assert self.total is not None
            return self.total
        n, g, o, l = self.kernel.shape[:4]
        i = self.u.shape[2]
        left, right = torch.triu_indices(l, l, device=self.u.device)
        twice = torch.where(left == right, 1.0, 2.0).to(self.u.dtype)  # kernels are symmetric: half of them, twice
        found = torch.zeros(g, o, i, dtype=self.u.dtype, device=self.u.device)
        step = max(1, CHUNK // (g * l * l * (o + i)))
        for a in range(0, n, step):
            kernel, u = self.kernel[a : a + step], self.u[a : a + step]
            kernel = (kernel[..., left, right] * twice).permute(1, 2, 0, 3).flatten(2)
            pairs = (u[..., left] * u[..., right]).permute(1, 0, 3, 2).flatten(1, 2)
            found += kernel @ pairs
        found = found.clamp_(min=0).to(self.dtype).reshape(self.shape)
        return found if self.total is None else found + self.total


class Lookup(Factor):
    """Rows of B that are not zero: v[k, m] stands at B[k, sample[m], row[m]]; every pair (sample, row) occurs once."""

    def __init__(self, v: Tensor, sample: Tensor, row: Tensor, n: int, shape: Sequence[int]):
        self.v, self.sample, self.row = v, sample, row
        self.k, self.n, self.shape = v.shape[0], n, tuple(shape)
        self.device, self.dtype = v.device, v.dtype

    @classmethod
    def build(cls, v: Tensor, sample: Tensor, row: Tensor, n: int, shape: Sequence[int]) -> Lookup:
        """From v of (K, M, *shape[1:]) in which pairs may repeat, and a negative sample means nobody's."""
        keep = (sample >= 0).nonzero()[:, 0]
        pair, where = torch.unique(sample[keep] * shape[0] + row[keep], return_inverse=True)
        total = v.new_zeros(v.shape[0], len(pair), *v.shape[2:]).index_add_(1, where, v[:, keep])
        return cls(total, pair // shape[0], pair % shape[0], n, shape)

    def dense(self) -> Tensor:
        out = self.v.new_zeros(self.k, self.n, *self.shape)
        out[:, self.sample, self.row] = self.v
        return out

    def columns(self, which: slice) -> Factor:
        return Lookup(self.v[which], self.sample, self.row, self.n, self.shape)

    def to(self, dtype: torch.dtype) -> Factor:
        return Lookup(self.v.to(dtype), self.sample, self.row, self.n, self.shape)

    def inner(self, other: Factor) -> Tensor:
        theirs = self.v if other is self else other.entries(self.sample, self.row)
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return total.index_add_(0, self.row, (self.v * theirs).sum(0))

    def square_sum(self) -> Tensor:
        return self.inner(self)


class Sum(Factor):
    """B1 + B2 + ...: the uses of one parameter. They are added before anything is squared."""

    def __init__(self, parts: Sequence[Factor]):
        self.parts = list(parts)
        first = self.parts[0]
        self.k, self.n, self.shape, self.device, self.dtype = first.k, first.n, first.shape, first.device, first.dtype

    def dense(self) -> Tensor:
        return torch.stack([part.dense() for part in self.parts]).sum(0)

    def columns(self, which: slice) -> Factor:
        return Sum([part.columns(which) for part in self.parts])

    def entries(self, sample: Tensor, index: Tensor) -> Tensor:
        return torch.stack([part.entries(sample, index) for part in self.parts]).sum(0)

    def square_sum(self) -> Tensor:
        if not any(isinstance(part, Lookup) for part in self.parts):
            return super().square_sum()
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for a, first in enumerate(self.parts):
            total += first.square_sum()
            for second in self.parts[a + 1 :]:
                total += 2 * first.inner(second)
        return total


def add(parts: Sequence[Factor]) -> Factor:
    """One factor for all uses of a parameter."""
    if len(parts) == 1:
        return parts[0]
    forms = {(p.v.shape[2], p.v.shape[3], p.u.shape[2]) if isinstance(p, Places) else None for p in parts}
    if len(forms) == 1 and None not in forms:
        places = [p for p in parts if isinstance(p, Places)]
        u, v = torch.cat([p.u for p in places], -1), torch.cat([p.v for p in places], -1)
        return Places(u, v, parts[0].shape)
    if all(isinstance(p, Lookup) for p in parts):
        found = [p for p in parts if isinstance(p, Lookup)]
        v, sample, row = (torch.cat([getattr(p, name) for p in found], d) for name, d in (("v", 1), ("sample", 0), ("row", 0)))
        return Lookup.build(v, sample, row, parts[0].n, parts[0].shape)
    sparse = [p for p in parts if isinstance(p, Lookup)]
    rest = [p for p in parts if not isinstance(p, Lookup)]
    if not sparse or not rest:
        return Sum(parts)
    return Sum([add(rest), add(sparse)])
