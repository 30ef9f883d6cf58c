"""v[k, n, c, ...] = a[k, n, c] m[n, c, ...]: columns that differ at the places of a channel only by
a factor which they all share, as behind a global pooling.

Over the places of a channel sum_k v v^T is (sum_k a^2) m m^T. So at a weight that sees these
channels, the sum of the squares of all columns is that of one, sqrt(sum_k a^2) m."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnj.jacobians.jacobian import Jacobian


class Separable:
    """What is known of columns (K, N, C, *places).

    Args:
        a: (K, N, C).
        mask: makes m, (N, C, *places).
        version: that of the columns, which are others when something was written over them.
    """

    def __init__(self, a: Tensor, mask: Callable[[], Tensor], version: int):
        self.a, self.mask, self.version = a, mask, version

    def one_column(self) -> Tensor:
        """(1, N, C, *places), with the squares of all columns."""
        m = self.mask()
        size = self.a.square().sum(0).sqrt()
        return (m * size.reshape(*size.shape, *[1] * (m.dim() - 2)))[None]


def separable(v: Tensor) -> Separable | None:
    """What is known of some columns; nothing of what was made of them otherwise than by `note`."""
    known: Separable | None = getattr(v, "nnj_separable", None)
    return None if known is None or known.version != v._version else known


def note(j: Jacobian, u: Tensor, back: Tensor) -> None:
    """Note on `back`, which is u J, in what it is separable because of J, or as u is.

    Args:
        u: (K, N, *outputs).
    """
    if j.spreads:
        a = u.flatten(2)
        mask = lambda: j.vjp(torch.ones_like(u[:1]))[0]
    elif j.entrywise and (known := separable(u)) is not None:
        a, before = known.a, known.mask
        mask = lambda: j.vjp(before()[None])[0]
    else:
        return
    back.nnj_separable = Separable(a, mask, back._version)  # type: ignore[attr-defined]
