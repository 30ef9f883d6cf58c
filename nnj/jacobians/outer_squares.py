"""sum over columns of B^2 for B = V U^T: with every B formed, or from the kernels V^T V."""

from __future__ import annotations

import torch
from torch import Tensor

from nnj.checks import being_traced
from nnj.jacobians.patches import Patches

# Entries of B that are formed and squared at a time: what the caches of a CPU serve, and enough
# for a GPU to be busy.
SQUARED = 1 << 19
SQUARED_ON_GPU = 1 << 24
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
    total = torch.zeros(*lead, g, o, i, dtype=v.dtype, device=v.device)
    if v.device.type == "cpu" and g * o * i >= LARGE and not being_traced():
        _one_by_one(v, patches, total, per_sample)
    else:
        _together(v, patches, total, per_sample)
    return total


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
    left, right = torch.triu_indices(l, l, device=kernel.device)
    # kernels are symmetric: half of them, twice
    twice = torch.where(left == right, 1.0, 2.0).to(kernel.dtype)
    lead = (patches.n,) if per_sample else ()
    found = torch.zeros(*lead, g, o, i, dtype=kernel.dtype, device=kernel.device)
    for rows in patches.parts(g * l * l * (o + i)):
        u = patches(rows).to(kernel.dtype)
        half, both = kernel[rows][..., left, right].mul_(twice), u[..., left]
        both.mul_(u[..., right])
        if per_sample:
            found[rows] = half @ both.mT
        else:
            pairs = both.permute(1, 0, 3, 2).flatten(1, 2)
            found += half.permute(1, 2, 0, 3).flatten(2) @ pairs
            del pairs
        del u, half, both  # lest they stand beside those of the next samples
    return found.clamp_(min=0)


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
