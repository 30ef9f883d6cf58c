"""Structures of H: a diagonal, small blocks, and the softmax's diag(p) - p p^T."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from nnj.checks import enough, number, refuse_unless
from nnj.errors import Indefinite, NNJError
from nnj.loss_hessian.base import WRITE_A_RULE, LossHessian, infinite

# With so many samples, and rows so short, a weighted Gram matrix is one product for all of them.
MANY, SHORT = 24, 64
MATRICES = 1 << 18  # entries of J_c J_c^T that are formed at a time
WEIGHTED = 1 << 20  # the same, of w_nc J_c
LEADING = 64  # classes that have a column of their own in a random combination


class DiagonalHessian(LossHessian):
    """H = diag(h), h >= 0 of the shape of the output: blocks of one entry.

    Args:
        h: the second derivatives, of the output's shape; of (R, entries of a row) with `shapes`.
        shapes: the shapes of several outputs.
        name: of the loss, for errors.
        scale: how large the terms are from which h is made; a negative entry far below it is
            rounding.
        dtype: of the result, by default that of h (which may be wider: sqrt(h) is in range where h
            is not).

    Errors: `NNJError` if an entry is negative.
    """

    closed_form = True

    def __init__(
        self,
        h: Tensor,
        shapes: Sequence[Sequence[int]] | None = None,
        name: str = "the loss",
        scale: float | Tensor = 0.0,
        dtype: torch.dtype | None = None,
    ):
        h = _wide(h)
        super().__init__(
            [h.shape] if shapes is None else shapes, h.new_empty(0, dtype=dtype or h.dtype), 1, 1
        )
        _refuse_negative(h, largest_of(h).clamp(min=scale), h.dtype, name)
        self.h = h.clamp(min=0).reshape(self.rows, self.places, 1)

    def columns(self, start: int, stop: int) -> Tensor:
        return self.h.sqrt().to(self.dtype)[None][start:stop]

    def diagonal(self) -> Tensor:
        return self.h.to(self.dtype)

    def norms(self) -> Tensor:
        return self.h[None, ..., 0]

    def columns_at(self, row: Tensor, place: Tensor, j: Tensor) -> Tensor:
        return self.h[row, place].sqrt().to(self.dtype)

    def product(self, v: Tensor) -> Tensor:
        return (self.h * v).to(v.dtype)

    def flat_factor(self) -> Tensor:
        return torch.diag_embed(self.columns(0, 1)[0, :, :, 0]).movedim(1, 0)

    def columns_through(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """sqrt(h_c) J_c."""
        weight = self.diagonal()[..., 0].sqrt().to(rows.dtype).mT
        for a in range(0, len(rows), size):
            yield rows[a : a + size, None] * weight[a : a + size, :, None]

    def gram_through(self, rows: Tensor) -> Tensor:
        return _weighted_gram(rows, self.diagonal()[..., 0].double())


class BlockHessian(LossHessian):
    """H given as symmetric positive semi-definite matrices, factorised by their eigenvectors: S = Q
    sqrt(lambda).

    Columns come by falling eigenvalue; those that are rounding noise in every block are left out.

    Args:
        matrix: (R, D, B, B).
        shapes: the shape of each output of the loss.
        name: of the loss, for errors.
        scale: how large the terms are from which the matrix is made; negative eigenvalues far below
            it are rounding.
        dtype: of the result, by default that of the matrix; also how exact its entries are.

    Errors: `NNJError` if a matrix has a negative eigenvalue.
    """

    def __init__(
        self,
        matrix: Tensor,
        shapes: Sequence[Sequence[int]],
        name: str = "the loss",
        scale: float | Tensor = 0.0,
        dtype: torch.dtype | None = None,
    ):
        matrix, dtype = _wide(matrix), dtype or _wide(matrix).dtype
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        b = matrix.shape[-1]
        size = largest_of(values).clamp(min=scale)
        _refuse_negative(values, size * b**0.5, dtype, name)
        noise = b * torch.finfo(matrix.dtype).eps * values.amax(-1, keepdim=True)
        count = (values > noise.clamp(min=0)).sum(-1)
        rank = max(1, enough(count.max(), b)) if values.numel() else 1
        s = (vectors * values.clamp(min=0).sqrt()[..., None, :])[..., -rank:].flip(-1)
        super().__init__(shapes, matrix.new_empty(0, dtype=dtype), b, rank, matrix.shape[0])
        self.s = s.movedim(-1, 0).to(dtype).contiguous()

    def columns(self, start: int, stop: int) -> Tensor:
        result: Tensor = self.s[start:stop]
        return result


class SoftmaxHessian(LossHessian):
    """H = a (diag(p) - p p^T) with p = softmax(z) over the classes: the Hessian of -a sum_c t_c log
    p_c, where sum_c t_c = 1.

    With p in falling order and q_j = p_{j+1} + ... + p_C, the factor has C - 1 columns in closed
    form, Cholesky's: S_jj = sqrt(a p_j q_j / q_{j-1}), S_ij = -p_i / q_j S_jj below. They are made
    when asked for, and none is kept. Those after the first k are the factor of what remains, of
    trace a (q_k - (p_{k+1}^2 + ... + p_C^2) / q_k).

    Args:
        z: logits, (N, C, *places), or (C,) for one sample.
        a: >= 0, a number for each row and place, (N, *places), or what broadcasts to it.
        name: of the loss, for errors.
        axis: of the classes, where it is not that after the batch.

    Errors: `NNJError` if an entry of a is negative.
    """

    def __init__(self, z: Tensor, a: Tensor | float = 1.0, name: str = "the loss", axis: int = 1):
        shape, z = z.shape, _wide(z.movedim(axis, 1) if axis > 1 else z)
        z = z[None] if z.dim() == 1 else z
        n, classes, places = z.shape[0], z.shape[1], z.shape[2:]
        super().__init__([shape], z, classes, max(1, classes - 1), n)
        self.axis, self.moved = axis, z.shape  # the output with its classes in axis 1
        self.closed_form = self.places == 1
        a = torch.as_tensor(a, dtype=z.dtype, device=z.device)
        a = a.expand(n, *places).reshape(n, self.places, 1)
        _refuse_negative(a, None, a.dtype, name)
        self.a = a.clamp(min=0)
        self.p = z.reshape(n, classes, self.places).mT.softmax(-1)

    def to_outputs(self, t: Tensor) -> tuple[Tensor, ...]:
        if self.axis <= 1:
            return super().to_outputs(t)
        return (t.mT.reshape(len(t), *self.moved).movedim(2, self.axis + 1),)

    def block_index(self) -> Tensor:
        if self.axis <= 1:
            return super().block_index()
        number = torch.arange(self.rows * self.places, device=self.device)
        return number.reshape(self.rows, *self.moved[2:]).unsqueeze(self.axis)

    def layout(self) -> Hashable:
        own, mine = type(self), SoftmaxHessian
        if own.block_index is not mine.block_index or own.to_outputs is not mine.to_outputs:
            return None
        return "classes", self.axis, self.rows, self.places, self.block, tuple(self.shapes[0])

    def at_rows(self, block: Tensor) -> SoftmaxHessian:
        other, there = copy.copy(self), block.clamp(min=0)
        for cached in ("_sorted", "_blocks", "_diagonal", "flat_diagonal"):
            other.__dict__.pop(cached, None)
        other.p = self.p.flatten(0, 1)[there][:, None]
        other.a = torch.where(block[:, None] < 0, 0.0, self.a.flatten(0, 1)[there])[:, None]
        other.rows, other.places, other.axis, other.closed_form = len(block), 1, 1, True
        other.shapes, other.moved = [(len(block), self.block)], torch.Size((len(block), self.block))
        other.sizes = [self.block]
        return other

    @staticmethod
    def axes(z: Tensor) -> list[int]:
        """The axes, but that of the batch, over which exp(z) sums to one, up to the rounding of z
        and of a log_softmax.
        """
        wide = _wide(z)
        p = wide.exp()
        rounding = torch.finfo(z.dtype).eps + 32 * torch.finfo(wide.dtype).eps
        size = p * (1 + wide.abs())
        return [
            axis
            for axis in (range(1, z.dim()) if z.dim() > 1 else range(z.dim()))
            if bool(((p.sum(axis) - 1).abs() <= (rounding * size.sum(axis)).clamp(max=0.5)).all())
        ]

    @functools.cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p in falling order, which classes they are, q
        (summed from the small end; 1 where it is 0), and S_jj.
        """
        p, order = self.p.sort(dim=-1, descending=True, stable=True)
        tails = p.flip(-1).cumsum(-1).flip(-1)  # q_{j-1}, counting j from 1
        q = torch.cat([tails[..., 1:], torch.zeros_like(p[..., :1])], -1)
        d = self.a * p * torch.where(tails > 0, q / tails, 0.0)
        return p, order, torch.where(q > 0, q, 1.0), d.sqrt()

    def columns(self, start: int, stop: int) -> Tensor:
        p, order, q, root = self._sorted
        i = torch.arange(self.block, device=self.device)
        j = i[start : min(stop, self.rank), None]
        own, q = (t[..., start : min(stop, self.rank)].movedim(-1, 0)[..., None] for t in (root, q))
        s = torch.where(
            (i > j)[:, None, None], -p / q * own, torch.where((i == j)[:, None, None], own, 0.0)
        )
        return torch.zeros_like(s).scatter_(-1, order.expand_as(s), s)

    def norms(self) -> Tensor:
        p, _, q, root = self._sorted
        below = torch.nn.functional.pad(p.square().flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))
        # q^2 may be zero where q is not
        return (root.square() + root / q * root * (below / q)).movedim(-1, 0)[: self.rank]

    def columns_at(self, row: Tensor, place: Tensor, j: Tensor) -> Tensor:
        p, order, q, root = (t[row, place] for t in self._sorted)
        i, at = torch.arange(self.block, device=self.device), j[:, None]
        own = root.gather(1, at)
        s = torch.where(i > at, -p / q.gather(1, at) * own, torch.where(i == at, own, 0.0))
        return torch.zeros_like(s).scatter_(1, order, s)

    def combine(self, c: Tensor) -> Tensor:
        p, order, q, root = self._sorted
        c = (
            torch.nn.functional.pad(c.to(self.dtype).movedim(1, -1), (0, self.block - c.shape[1]))
            * root
        )
        # of the columns before
        head = torch.nn.functional.pad((c / q).cumsum(-1)[..., :-1], (1, 0))
        s = c - p * head
        return torch.zeros_like(s).scatter_(-1, order.expand_as(s), s)

    @property
    def mixed(self) -> int:
        return self.block

    def mix(self, e: Tensor) -> Tensor:
        """T has a column for each class, and p need not be sorted.

        Those of the likeliest classes are the columns of S. For the others, of probabilities t
        and mass q, what remains of H is a (diag(t) - t t^T / q) = T' T'^T with
        T' = sqrt(a) (diag(sqrt t) - (t / q) sqrt(t)^T), whose columns have no order; random
        combinations of them vary more than those of Cholesky's.
        """
        e = e.movedim(1, -1).contiguous().to(self.dtype)
        p, (best, top) = self.p, self.p.topk(min(LEADING, max(self.block - 1, 0)), dim=-1)
        tail = p.scatter(-1, top, 0.0)
        mass = tail.sum(-1, keepdim=True)
        tails = torch.cat([best, mass], -1).flip(-1).cumsum(-1).flip(-1)  # q_{j-1}, from j = 1
        q = torch.where(tails > 0, tails, 1.0)
        root = (self.a * best * (tails[..., 1:] / q[..., :-1])).sqrt()
        top = top.expand(len(e), *top.shape[:-1], top.shape[-1])
        own = e.gather(-1, top) * root
        head = torch.nn.functional.pad((own / q[..., 1:]).cumsum(-1), (1, 0))  # of columns before
        size = tail.sqrt()
        swing = (size * e).sum(-1, keepdim=True) * self.a.sqrt() / torch.where(mass > 0, mass, 1.0)
        s = size * e * self.a.sqrt() - tail * (swing + head[..., -1:])
        return s.scatter_(-1, top, own - best * head[..., :-1])

    @functools.cached_property
    def _blocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """a and p of all blocks, (R D, 1) and (R D, C); the largest p, its class, and the sum of
        the others.
        """
        a, p = self.a.flatten(0, 1), self.p.flatten(0, 1)
        best, top = p.max(-1, keepdim=True)
        return a, p, best, top, p.scatter(-1, top, 0.0).sum(-1, keepdim=True)

    @functools.cached_property
    def _diagonal(self) -> Tensor:
        """That of all blocks, (R D, C)."""
        a, p, _, top, others = self._blocks
        # 1 - p of a sure class would be noise
        return a * p * (1 - p).scatter(-1, top, others)

    def diagonal(self) -> Tensor:
        result: Tensor = self._diagonal.unflatten(0, (self.rows, self.places))
        return result

    @functools.cached_property
    def flat_diagonal(self) -> Tensor:
        if self.places == 1:  # in the order of the output
            return self._diagonal
        return self.flat(self.diagonal()[None])[0]

    def product(self, v: Tensor) -> Tensor:
        p = self.p
        top = p.argmax(-1, keepdim=True).expand(*v.shape[:-1], 1)
        v = v - v.gather(-1, top)  # H 1 = 0, and so nothing large cancels where a class is sure
        return self.a * p * (v - (p * v).sum(-1, keepdim=True))

    def columns_through(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """sqrt(a p_c) (J_c - J_t - R / (1 + sqrt p_t)) for all classes c but the likeliest t, with
        R = sum_c p_c (J_c - J_t).

        With D_c = J_c - J_t the Hessian is a (sum_c p_c D_c D_c^T - R R^T). Columns D_c - k R in
        the place of D_c make it so if k^2 (1 - p_t) - 2 k + 1 = 0, and this k is
        1 / (1 + sqrt p_t). Where t is among the first C - 1 classes, the last class stands in its
        place.
        """
        if self.places > 1:
            yield from super().columns_through(rows, size)
            return
        a, p, best, top, mass = self._blocks
        last, likeliest = self.block - 1, top[:, 0]
        weight = (a * p).sqrt().to(rows.dtype)
        weight = weight.scatter(1, top, weight[:, last:]).mT
        p, best, mass = p.to(rows.dtype), best.to(rows.dtype), mass.to(rows.dtype)
        away = rows[likeliest]
        mean = torch.addcmul(p.scatter(1, top, 0.0) @ rows, mass, away, value=-1)
        shift = torch.addcdiv(away, mean, best.sqrt() + 1)
        sample = torch.arange(len(p), device=p.device)
        for start in range(0, self.rank, size):
            stop = min(start + size, self.rank)
            k, whole = stop - start, stop - start == last
            # behind these classes the last one, which stands in the place of t; without asking
            # which samples have t among these
            own = rows if whole else torch.cat([rows[start:stop], rows[last:]])
            v, at = own[:, None] - shift, likeliest
            if not whole:
                at = at - start
                at = torch.where((at < 0) | (at > k), k, at)
            v[at, sample] = v[k].clone()
            yield v[:k].mul_(weight[start:stop, :, None])

    def gram_through(self, rows: Tensor) -> Tensor:
        """a (sum_c p_c D_c D_c^T - R R^T), with D_c = J_c - J_t for the likeliest class t and
        R = sum_c p_c D_c: no term is larger than 1 - p_t.
        """
        if self.places > 1:
            return super().gram_through(rows)
        p = self.p[:, 0]
        top = p.argmax(1, keepdim=True)
        rest = p.scatter(1, top, 0.0).double()
        best, mass = rows[top[:, 0]].double(), rest.sum(1, keepdim=True)
        mean = torch.zeros_like(best)
        for at, part in _by_class(rows, WEIGHTED):
            mean.addmm_(rest[:, at], part)
        cross, r = mean[:, :, None] * best[:, None], mean - mass * best
        whole = (
            _weighted_gram(rows, rest)
            - cross
            - cross.mT
            + mass[:, :, None] * best[:, :, None] * best[:, None]
        )
        return (whole - r[:, :, None] * r[:, None]) * self.a[:, 0, :, None].double()


def _weighted_gram(rows: Tensor, weight: Tensor) -> Tensor:
    """sum_c w_nc J_c J_c^T of rows J (C, d): weights w of (N, C), in float64, give (N, d, d)."""
    n, d = len(weight), rows.shape[1]
    total = weight.new_zeros(n, d, d)
    if n < MANY or d > SHORT:
        for at, part in _by_class(rows, WEIGHTED):
            step = max(1, WEIGHTED // max(1, part.numel()))
            for sums, w in zip(total.split(step), weight[:, at].split(step), strict=True):
                sums += (part.mT * w[:, None]) @ part
        return total
    # w (J_c (x) J_c): the matrices of the rows serve all samples
    for at, part in _by_class(rows, MATRICES // max(1, d)):
        matrices = part[:, :, None] * part[:, None]
        total.view(n, d * d).addmm_(weight[:, at], matrices.flatten(1))
    return total


def _by_class(rows: Tensor, entries: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows (C, d) of some classes after the other, in float64, with about so many entries."""
    step = max(1, entries // max(1, rows.shape[1]))
    for a in range(0, len(rows), step):
        yield slice(a, a + step), rows[a : a + step].double()


def _wide(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def largest_of(t: Tensor) -> Tensor:
    """max |t|, a tensor without axes; 0 if there are no entries."""
    return t.abs().max() if t.numel() else t.new_zeros((), dtype=t.abs().dtype)


def _refuse_negative(values: Tensor, scale: Tensor | None, dtype: torch.dtype, name: str) -> None:
    """Errors: `NNJError` for a value that is negative, by more than the rounding of `scale`.

    Args:
        scale: by default the largest of the values.
    """
    if not values.numel():
        return
    smallest, largest = values.aminmax()
    sum_of_both = torch.add(smallest, largest if scale is None else scale, alpha=_noise(dtype))
    fine = (sum_of_both >= 0) & (largest < torch.inf)  # not for nan, which both are then

    def error() -> NNJError:
        if not bool((smallest + largest).isfinite()):
            return NNJError(infinite(name))
        return Indefinite(
            f"{name}: its Hessian in the output is not positive semi-definite (smallest eigenvalue "
            f"{number(smallest):.3g}), so it has no factor and no GGN. Use a loss that is convex "
            "in the output (the rest may be part of the model), collect with signed=True, or "
            f"{WRITE_A_RULE} that keeps a positive part"
        )

    refuse_unless(fine, error)


def _noise(dtype: torch.dtype) -> float:
    """How much of a sum may be rounding."""
    result: float = 32 * torch.finfo(dtype).eps
    return result
