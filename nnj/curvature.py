"""H = S S^T: the Hessian of a loss in its outputs, a positive semi-definite block for each row and each place of it."""
from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from nnj.errors import NNJError

LIMIT = 4096  # entries of a row, above which `twice` refuses to build its block
ENTRIES = 2**29  # of all blocks together
_CHUNK = 64  # columns that are made at a time where all are summed
_WRITE = "write a loss rule (nnj_register_losses in nnj.hookspecs)"


class Curvature:
    """Hessian of a loss in its outputs: for each row r of R and each place d of D a block of B x B, and zero between blocks.

    Subclasses define `columns`; the rest follows, and may be overridden for speed. It is the Hessian of exactly the
    scalar that is differentiated, so factors before the loss and its reduction are in it.

    Args:
        shapes: the shape of each output of the loss (usually one). An output's row is its axes (B, *places), flattened; if
            there are several outputs, a block is their flattened rows one after the other, and there is one place.
        like: a tensor of the dtype and on the device of the blocks.
        block, rank: B, and the number of columns of S, the same for every block and at least 1.
        rows: R, by default the length of axis 0 where all outputs share it, else 1.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], like: Tensor, block: int, rank: int, rows: int | None = None):
        self.shapes = [tuple(shape) for shape in shapes]
        self.rows = rows_of(self.shapes) if rows is None else rows
        self.sizes = [_per_row(shape, self.rows) for shape in self.shapes]
        self.block, self.rank, self.places = block, rank, sum(self.sizes) // max(block, 1)
        self.dtype, self.device = like.dtype, like.device

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start to stop of the factor S of every block, (stop - start, R, D, B)."""
        raise NotImplementedError

    def place(self, t: Tensor) -> tuple[Tensor, ...]:
        """From (k, R, D, B) to a tensor (k, *shape) for each output of the loss."""
        rows = t.mT.reshape(*t.shape[:2], self.block * self.places).split(self.sizes, -1)
        return tuple(part.reshape(t.shape[0], *shape) for part, shape in zip(rows, self.shapes, strict=True))

    def signs(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random signs, (count, rank, R, D), of the default generator of the device or another one."""
        shape = (count, self.rank, self.rows, self.places)
        device = self.device if generator is None else generator.device
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device=device).to(self.device) * 2 - 1

    def combine(self, c: Tensor) -> Tensor:
        """sum_j c_j S_j with coefficients (k, rank, R, D) for the columns of each block: (k, R, D, B)."""
        parts = c.to(self.dtype).split(_CHUNK, 1)
        return _sum(torch.einsum("kjrd,jrdb->krdb", c, s) for c, s in zip(parts, self._chunks(), strict=True))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Vectors s, (count, R, D, B), with E[s s^T] = H: the columns with random signs, summed. Not divided by count."""
        return self.combine(self.signs(count, generator))

    def diagonal(self) -> Tensor:
        """diag(H), (R, D, B)."""
        return _sum(s.square().sum(0) for s in self._chunks())

    def product(self, v: Tensor) -> Tensor:
        """H v for v and the result of shape (k, R, D, B)."""
        return _sum(torch.einsum("jrdb,jkrd->krdb", s, torch.einsum("jrdb,krdb->jkrd", s, v)) for s in self._chunks())

    def _chunks(self) -> Iterator[Tensor]:
        for a in range(0, self.rank, _CHUNK):
            yield self.columns(a, min(a + _CHUNK, self.rank))


class DiagonalCurvature(Curvature):
    """H = diag(h), h >= 0 of the shape of the output: blocks of one entry.

    Args:
        h: the second derivatives, of the output's shape; of (R, entries of a row) with `shapes`.
        shapes: the shapes of several outputs.
        name: of the loss, for errors.
        scale: how large the terms are from which h is made; a negative entry far below it is rounding.

    Errors: `NNJError` if an entry is negative.
    """

    def __init__(self, h: Tensor, shapes: Sequence[Sequence[int]] | None = None, name: str = "the loss", scale: float = 0.0):
        h = _wide(h)
        super().__init__([h.shape] if shapes is None else shapes, h, 1, 1)
        _refuse_negative(h, max(scale, _largest(h)), h.dtype, name)
        self.h = h.clamp(min=0).reshape(self.rows, self.places, 1)

    def columns(self, start: int, stop: int) -> Tensor:
        return self.h.sqrt()[None][start:stop]

    def diagonal(self) -> Tensor:
        return self.h

    def product(self, v: Tensor) -> Tensor:
        return self.h * v


class BlockCurvature(Curvature):
    """H given as symmetric positive semi-definite matrices, factorised by their eigenvectors: S = Q sqrt(lambda).

    Columns come by falling eigenvalue; those that are rounding noise in every block are left out.

    Args:
        matrix: (R, D, B, B).
        shapes: the shape of each output of the loss.
        name: of the loss, for errors.
        scale: how large the terms are from which the matrix is made; negative eigenvalues far below it are rounding.
        dtype: of the result, by default that of the matrix; also how exact its entries are.

    Errors: `NNJError` if a matrix has a negative eigenvalue.
    """

    def __init__(self, matrix: Tensor, shapes: Sequence[Sequence[int]], name: str = "the loss", scale: float = 0.0,
                 dtype: torch.dtype | None = None):
        matrix, dtype = _wide(matrix), dtype or _wide(matrix).dtype
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        b = matrix.shape[-1]
        _refuse_negative(values, max(scale, _largest(values)) * math.sqrt(b), dtype, name)
        noise = b * torch.finfo(matrix.dtype).eps * values.amax(-1, keepdim=True)
        rank = max(1, int((values > noise.clamp(min=0)).sum(-1).max())) if values.numel() else 1
        s = (vectors * values.clamp(min=0).sqrt()[..., None, :])[..., -rank:].flip(-1)
        super().__init__(shapes, matrix.new_empty(0, dtype=dtype), b, rank, matrix.shape[0])
        self.s = s.movedim(-1, 0).to(dtype).contiguous()

    def columns(self, start: int, stop: int) -> Tensor:
        return self.s[start:stop]


class SoftmaxCurvature(Curvature):
    """H = a (diag(p) - p p^T) with p = softmax(z) over the classes: the Hessian of -a sum_c t_c log p_c, where sum_c t_c = 1.

    With p in falling order and q_j = p_{j+1} + ... + p_C, the factor has C - 1 columns in closed form, Cholesky's:
    S_jj = sqrt(a p_j q_j / q_{j-1}), S_ij = -p_i / q_j S_jj below. They are made when asked for, and none is kept. Those after
    the first k are the factor of what remains, of trace a (q_k - (p_{k+1}^2 + ... + p_C^2) / q_k).

    Args:
        z: logits, (N, C, *places), or (C,) for one sample.
        a: >= 0, a number for each row and place, (N, *places), or what broadcasts to it.
        name: of the loss, for errors.

    Errors: `NNJError` if an entry of a is negative.
    """

    def __init__(self, z: Tensor, a: Tensor | float = 1.0, name: str = "the loss"):
        shape, z = z.shape, _wide(z)
        z = z[None] if z.dim() == 1 else z
        n, classes, places = z.shape[0], z.shape[1], z.shape[2:]
        super().__init__([shape], z, classes, max(1, classes - 1), n)
        a = torch.as_tensor(a, dtype=z.dtype, device=z.device).expand(n, *places).reshape(n, self.places, 1)
        _refuse_negative(a, _largest(a), a.dtype, name)
        self.a = a.clamp(min=0)
        self.p = z.reshape(n, classes, self.places).mT.softmax(-1)

    @functools.cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p in falling order, which classes they are, q (summed from the small end; 1 where it is 0), and S_jj."""
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
        s = torch.where((i > j)[:, None, None], -p / q * own, torch.where((i == j)[:, None, None], own, 0.0))
        return torch.zeros_like(s).scatter_(-1, order.expand_as(s), s)

    def combine(self, c: Tensor) -> Tensor:
        p, order, q, root = self._sorted
        c = torch.nn.functional.pad(c.to(self.dtype).movedim(1, -1), (0, self.block - c.shape[1])) * root
        head = torch.nn.functional.pad((c / q).cumsum(-1)[..., :-1], (1, 0))  # of the columns before
        s = c - p * head
        return torch.zeros_like(s).scatter_(-1, order.expand_as(s), s)

    def diagonal(self) -> Tensor:
        p = self.p
        top = p.argmax(-1, keepdim=True)
        others = p.scatter(-1, top, 0.0).sum(-1, keepdim=True)  # 1 - p of a sure class would be noise
        return self.a * p * (1 - p).scatter(-1, top, others)

    def product(self, v: Tensor) -> Tensor:
        p = self.p
        top = p.argmax(-1, keepdim=True).expand(*v.shape[:-1], 1)
        v = v - v.gather(-1, top)  # H 1 = 0, and so nothing large cancels where a class is sure
        return self.a * p * (v - (p * v).sum(-1, keepdim=True))


# -- any loss, by autograd ------------------------------------------------------------------------------------------------


def twice(call: Callable[..., Tensor], outputs: Sequence[Tensor], name: str = "the loss") -> Curvature:
    """The Hessian of any loss, differentiated twice by autograd; in float64 where the loss can be had in it.

    It is diagonal where the loss works on each entry for itself, else a block for each whole row over all outputs, by as
    many Hessian-vector products as a row has entries. Random vectors verify that rows do not influence one another.

    Args:
        call: `call(*outputs)` is the scalar that is differentiated, all factors included.
        outputs: detached. Rows are axis 0 where all share it; otherwise, and for a 0-d output, there is one row.
        name: of the loss, for errors.

    Errors: `NNJError` for outputs that are not real or finite; a loss that is not convex in the outputs, couples rows of the
    batch, draws random numbers, cannot be differentiated twice, or couples more than 4096 entries in a row.
    """
    outputs = tuple(outputs)
    check_outputs(name, outputs)
    shapes = [t.shape for t in outputs]
    own = functools.reduce(torch.promote_types, [t.dtype for t in outputs], torch.float32)
    n = rows_of(shapes)
    size = sum(_per_row(shape, n) for shape in shapes)
    if n * size == 0:
        return DiagonalCurvature(torch.zeros(n, size, dtype=own, device=outputs[0].device), shapes, name)
    generator = torch.Generator("cpu").manual_seed(0)  # its own, and the same on every device
    z = torch.randn(n, size, generator=generator, dtype=torch.float64, device="cpu")
    hessian, hz = _differentiate(call, outputs, own, name, z)
    if not bool(torch.isfinite(hz).all()):
        raise NNJError(_infinite(name))
    z, scale = z.to(hz), max(_largest(hz), _moderate(call, outputs, hessian, z))
    strict, loose = (1e-9, 1e-6) if hz.dtype == torch.float64 else (2e-5, 2e-4)
    signs = torch.randint(0, 2, (n, size), generator=generator, device="cpu").to(z) * 2 - 1
    h = signs * hessian.product(signs[None])[0]
    if _agree(h * z, hz, scale, strict):
        return DiagonalCurvature(h.to(own), shapes, name, scale)
    if size > LIMIT or n * size * size > ENTRIES:
        raise NNJError(f"{name}: its Hessian has {n} blocks of {size} x {size}. Differentiated twice, a row may have {LIMIT} "
                       f"entries, and all blocks {ENTRIES}. Take a smaller batch, or {_WRITE} that gives a structure")
    matrix = hessian.blocks(signs[:, :1])
    if not _agree((matrix @ z[..., None])[..., 0], hz, scale, loose):
        raise NNJError(f"{name} couples rows of the batch: its Hessian has entries between outputs of different rows, so that no "
                       f"row has a curvature of its own. Use a loss that is a sum over rows")
    return BlockCurvature(matrix[:, None], shapes, name, scale, own)


class _Hessian:
    """Hessian-vector products of `call` at outputs of `dtype`; tangents are (k, rows, entries of a row)."""

    def __init__(self, call: Callable[..., Tensor], outputs: Sequence[Tensor], dtype: torch.dtype, n: int, everything: bool):
        with torch.enable_grad(), _Cast(dtype) if everything else contextlib.nullcontext():
            self.leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in outputs]
            self.value, again = (call(*[t.clone() for t in self.leaves]) for _ in range(2))
        self.same = torch.allclose(self.value, again, rtol=1e-3, equal_nan=True)
        self.n, self.batched = n, True
        with torch.enable_grad():
            self.gradient = self._flat(self._grad(self.value, None, create_graph=True), ())

    def _grad(self, of: Tensor, v: Tensor | None, **options: bool) -> Sequence[Tensor | None]:
        if not of.requires_grad:
            return [None] * len(self.leaves)
        return torch.autograd.grad(of, self.leaves, v, allow_unused=True, **options)

    def _flat(self, parts: Sequence[Tensor | None], k: tuple[int, ...]) -> Tensor:
        full = [t.new_zeros(*k, *t.shape) if g is None else g for g, t in zip(parts, self.leaves, strict=True)]
        return torch.cat([g.reshape(*k, self.n, -1) for g in full], -1)

    def product(self, v: Tensor) -> Tensor:
        """H v, all at once; one after the other where torch.vmap cannot."""
        k, v = (v.shape[0],), v.to(self.gradient)
        if self.batched and len(v) > 1:
            try:
                return self._flat(self._grad(self.gradient, v, retain_graph=True, is_grads_batched=True), k)
            except RuntimeError:
                self.batched = False
        return torch.stack([self._flat(self._grad(self.gradient, t, retain_graph=True), ()) for t in v])

    def blocks(self, signs: Tensor) -> Tensor:
        """H[r, :, r, :] for each row, (n, size, size): rows are asked together, each under its sign."""
        n, size = self.gradient.shape
        eye, chunk = torch.eye(size, dtype=signs.dtype, device=signs.device), max(1, 2**22 // (n * size))
        parts = [self.product(eye[a : a + chunk, None] * signs) * signs for a in range(0, size, chunk)]
        return torch.cat(parts).movedim(0, -1)


class _Cast(TorchFunctionMode):
    """Every real tensor that a function is given is cast to a dtype: a loss has targets, weights and constants of its own."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
        if in_place or name in ("__get__", "__set__") or (kwargs and "out" in kwargs):
            return function(*args, **(kwargs or {}))
        cast = lambda t: t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
        args, kwargs = tree_map(cast, (args, kwargs or {}))
        return function(*args, **kwargs)


def _differentiate(call: Callable[..., Tensor], outputs: Sequence[Tensor], own: torch.dtype, name: str,
                   z: Tensor) -> tuple[_Hessian, Tensor]:
    """The Hessian and H z in the widest dtype in which the loss can be had, and is what it was."""
    n, failure = z.shape[0], None
    with torch.no_grad():
        value = call(*[t.clone() for t in outputs])
    for dtype, everything in dict.fromkeys([(torch.float64, True), (own, True), (own, False)]):
        try:
            hessian = _Hessian(call, outputs, dtype, n, everything)
            if everything and not _same_value(hessian.value, value):
                continue
            hz = hessian.product(z.to(outputs[0].device, dtype)[None])[0]
        except NNJError:
            raise
        except Exception as error:
            failure = error
            continue
        if not hessian.same:
            raise NNJError(f"{name} gives another value each time it is called, so the call that was made has no Hessian that "
                           f"nnj could compute. Draw random numbers outside of the loss, and give them as an argument")
        return hessian, hz
    raise NNJError(f"{name} cannot be differentiated twice by autograd: {type(failure).__name__}: {failure}. Remedy: "
                   f"{_WRITE}") from failure


def _same_value(found: Tensor, value: Tensor) -> bool:
    rtol = 4 * torch.finfo(value.dtype).eps ** 0.5
    return not bool(torch.isfinite(value)) or torch.allclose(found, value.to(found.dtype), rtol=rtol, atol=0.0)


def _moderate(call: Callable[..., Tensor], outputs: Sequence[Tensor], hessian: _Hessian, z: Tensor) -> float:
    """How large H z is where outputs are at most 1: a saturated loss is the rounding of terms of that size."""
    largest = max(map(_largest, outputs))
    if largest <= 1:
        return 0.0
    try:
        found = _Hessian(call, [t / largest for t in outputs], z.dtype, hessian.n, True).product(z[None])
    except Exception:
        return 0.0
    size = _largest(found)
    return size if math.isfinite(size) else 0.0


def _agree(found: Tensor, expected: Tensor, scale: float, tolerance: float) -> bool:
    """Whether rows are equal, up to `tolerance` of each row and to the rounding of terms as large as `scale`."""
    floor = 1e3 * torch.finfo(expected.dtype).eps * scale
    return bool(((found - expected).abs() <= tolerance * expected.abs().amax(-1, keepdim=True) + floor).all())


# -- checks ---------------------------------------------------------------------------------------------------------------


def check_outputs(name: str, outputs: Sequence[Tensor]) -> None:
    """Errors: `NNJError` if an output of a model that is given to the loss is not real, not floating or not finite."""
    for t in outputs:
        if not t.is_floating_point():
            kind = "complex" if t.is_complex() else "not of floating point"
            raise NNJError(f"{name}: the output of the model is {kind} ({t.dtype}), but curvature is that in a real output. "
                           f"Give the loss a real tensor (torch.view_as_real makes one of a complex one)")
        if not bool(torch.isfinite(t).all()):
            raise NNJError(f"{name}: the output of the model has entries that are not finite, where no loss has curvature. "
                           f"Check the model's input and weights; instead of -inf, mask with a large negative number")


def rows_of(shapes: Sequence[Sequence[int]]) -> int:
    """The length of axis 0 where all outputs share it, else 1."""
    lengths = {shape[0] if len(shape) else 1 for shape in shapes}
    return lengths.pop() if len(lengths) == 1 else 1


def _per_row(shape: Sequence[int], rows: int) -> int:
    return math.prod(shape[1:]) if rows == 0 else math.prod(shape) // rows


def _wide(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _refuse_negative(values: Tensor, scale: float, dtype: torch.dtype, name: str) -> None:
    smallest, largest = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    if not math.isfinite(smallest + largest):
        raise NNJError(_infinite(name))
    if not smallest >= -32 * torch.finfo(dtype).eps * scale:
        raise NNJError(f"{name}: its Hessian in the output is not positive semi-definite (smallest eigenvalue "
                       f"{smallest:.3g}), so it has no factor and no GGN. Use a loss that is convex in the output (the rest "
                       f"may be part of the model), or {_WRITE} that keeps a positive semi-definite part")


def _infinite(name: str) -> str:
    return (f"{name}: its Hessian is not finite at this output. Avoid what is singular there (a division by zero, a logarithm "
            f"or a root at zero), or {_WRITE}")
