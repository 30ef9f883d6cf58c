"""sum over columns of B^2 for B = V U^T: with every B formed, or from the kernels V^T V."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nnj.checks import being_traced
from nnj.jacobians.patches import Patches

# Entries of B that are formed and squared at a time: what the caches of a CPU serve, and enough
# for a GPU to be busy.
SQUARED = 1 << 19
SQUARED_ON_GPU = 1 << 24
# Products of two places that are formed at a time, in float64: what the caches serve.
PAIRS = 1 << 18
# From so many entries of one column of one sample on, a CPU is busy with them alone.
LARGE = 1 << 14


def explicit_squares(v: Tensor, patches: Patches, per_sample: bool = False) -> Tensor:
    """The squares of V U^T, summed over columns and samples (G, O, I), or over the columns of each
    sample (N, G, O, I).

    Args:
        v: V, (K, N, G, O, L).
        patches: U, (N, G, I, L).
    """
    (_, n, g, o, _), i = v.shape, patches.inputs
    lead = (n,) if per_sample else ()
    fused = _fused(v)
    if fused is not None:
        return _by_kernel(fused, v, patches, per_sample)
    total = torch.zeros(*lead, g, o, i, dtype=v.dtype, device=v.device)
    if v.device.type == "cpu" and g * o * i >= LARGE and not being_traced():
        _one_by_one(v, patches, total, per_sample)
    else:
        _together(v, patches, total, per_sample)
    return total


Fused = Callable[[Tensor, Tensor, bool], Tensor]
# whether the kernel of Triton gave on a device what products of torch give; asked once
_right: dict[torch.device, bool] = {}


def _fused(v: Tensor) -> Fused | None:
    """The kernel that squares products while they are in registers, where one can take V: on a GPU,
    if Triton is installed, in single precision.
    """
    if v.device.type != "cuda" or v.dtype != torch.float32 or being_traced():
        return None
    try:
        from nnj.extras.triton_squares import squares
    except ImportError:
        return None
    if v.device not in _right:
        _right[v.device] = _is_right(squares, v.device)
    return squares if _right[v.device] else None


def _is_right(squares: Fused, device: torch.device) -> bool:
    """Whether a kernel runs on a device and is right there, on two tiles and a bit; else products
    of torch stay, which need no compiler.
    """
    v = torch.linspace(-1, 1, 2 * 3 * 70 * 40, device=device).reshape(2, 3, 1, 70, 40)
    u = torch.linspace(-1, 2, 3 * 80 * 40, device=device).reshape(3, 1, 80, 40)
    try:
        found = squares(v, u, True)
    except Exception as error:  # of Triton's compiler, or the driver's
        warnings.warn(
            f"nnj takes products of torch on {device}, since a kernel of Triton fails there with "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    expected = (v.double() @ u.double().mT).square().sum(0)
    return bool(((found - expected).abs() <= 1e-5 * expected.abs().max()).all())


def _by_kernel(squares: Fused, v: Tensor, patches: Patches, per_sample: bool) -> Tensor:
    """The squares by a kernel, for some samples after the other, as U may be large."""
    _, n, g, _, l = v.shape
    step = max(1, SQUARED_ON_GPU // max(1, g * patches.inputs * l))
    parts = []
    for start in range(0, max(1, n), step):
        rows = slice(start, min(start + step, n))
        found = squares(v[:, rows], patches(rows), per_sample)
        parts.append(found)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if per_sample else torch.stack(parts).sum(0)


def _one_by_one(v: Tensor, patches: Patches, total: Tensor, per_sample: bool) -> None:
    """Add the squares of one column of one sample after another: no copy of V, and B does not leave
    the caches.
    """
    room = torch.empty_like(total[0, 0] if per_sample else total[0])
    for s in range(v.shape[1]):
        for group, u in enumerate(patches(slice(s, s + 1))[0].mT):
            into = total[s, group] if per_sample else total[group]
            for column in v[:, s, group]:
                b = torch.mm(column, u, out=room)
                into.addcmul_(b, b)


def _together(v: Tensor, patches: Patches, total: Tensor, per_sample: bool) -> None:
    """Add the squares in few products, each of several samples and columns."""
    (k, n, g, o, l), i = v.shape, patches.inputs
    fits = max(1, (SQUARED if v.device.type == "cpu" else SQUARED_ON_GPU) // max(1, g * o * i))
    columns = max(1, min(k, fits))
    for a in range(0, n, fits // columns):
        rows = slice(a, min(a + fits // columns, n))
        samples = rows.stop - a
        u = patches(rows).mT
        for part in v[:, rows].split(columns):
            # (samples, G, columns O, L) (samples, G, L, I)
            b = part.permute(1, 2, 0, 3, 4).reshape(samples, g, len(part) * o, l) @ u
            squares = b.square_().unflatten(2, (len(part), o))
            if per_sample:
                total[rows] += squares.sum(2)
            else:
                total += squares.sum((0, 2))


def kernel_squares(kernel: Tensor, patches: Patches, per_sample: bool = False) -> Tensor:
    """diag(U (V^T V) U^T): kernels (N, G, O, L, L) of one factor give the squares of its B, summed
    over the samples (G, O, I), or of each (N, G, O, I).
    """
    g, o, l = kernel.shape[1:4]
    i = patches.inputs
    if l == 1:
        if g == 1 and not per_sample:  # one product of matrices, and few views
            n, u = patches.n, patches().reshape(patches.n, i)
            return (kernel.reshape(n, o).mT @ u.square())[None]
        v, u = kernel[..., 0, 0], patches()[..., 0].square()
        if per_sample:
            return v[..., None] * u[..., None, :]
        return v.permute(1, 2, 0) @ u.transpose(0, 1)
    lead = (patches.n,) if per_sample else ()
    found = torch.zeros(*lead, g, o, i, dtype=kernel.dtype, device=kernel.device)
    step = max(1, PAIRS // max(1, g * i * l))
    for start in range(0, patches.n, step):
        rows = slice(start, min(start + step, patches.n))
        u = patches(rows).to(kernel.dtype)
        into = found[rows] if per_sample else found
        for half, pairs in _by_pairs(kernel[rows], u):
            if per_sample:
                into += half.permute(2, 0, 1, 3) @ pairs.transpose(0, 1)
            else:
                into.baddbmm_(half.flatten(2), pairs.flatten(1, 2))
    return found.clamp_(min=0)


def _by_pairs(kernel: Tensor, u: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Kernels are symmetric: half of the entries of each, twice (G, O, n, pairs), and beside them
    the products u_l u_m (G, n, pairs, I), some diagonals after the other.

    Args:
        kernel: (n, G, O, L, L), of n samples.
        u: U, (n, G, I, L).
    """
    (n, g, o, l, _), i = kernel.shape, u.shape[2]
    kernel, u = kernel.permute(1, 2, 0, 3, 4), u.transpose(0, 1).mT.contiguous()
    if being_traced():  # a loop over diagonals would be a graph as long as they are many
        left, right = torch.triu_indices(l, l, device=kernel.device)
        twice = torch.where(left == right, 1.0, 2.0).to(kernel.dtype)
        yield kernel[..., left, right] * twice, u[:, :, left] * u[:, :, right]
        return
    at_once = max(1, PAIRS // max(1, g * n * i * l))
    for first in range(0, l, at_once):
        diagonals = range(first, min(first + at_once, l))
        count = sum(l - d for d in diagonals)
        half, pairs = kernel.new_empty(g, o, n, count), u.new_empty(g, n, count, i)
        a = 0
        for d in diagonals:
            b = a + l - d
            torch.mul(kernel.diagonal(d, -2, -1), 2 if d else 1, out=half[..., a:b])
            torch.mul(u[:, :, : l - d], u[:, :, d:], out=pairs[:, :, a:b])
            a = b
        yield half, pairs


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
