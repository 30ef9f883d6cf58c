"""The Kronecker factors of B = V U^T: S = sum v v^T, A = sum u u^T."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnj.jacobians.kron import Approx, Kron
from nnj.jacobians.patches import Patches


class OuterKron(Kron):
    """Of B = V U^T.

    Args:
        patches: U, (N, G, I, L).
        v: makes V, (K, N, G, O, L).
        form: G, O and L.
        outer_v: makes S, (O, O), where that is known to be of one place and one group.
    """

    def __init__(
        self,
        patches: Patches,
        v: Callable[[], Tensor],
        form: tuple[int, int, int],
        like: Tensor,
        approx: Approx,
        outer_v: Callable[[], Tensor] | None = None,
    ):
        self.patches, self.v, self.form, self.like = patches, v, form, like
        self.reduce, self.known = approx == "reduce", outer_v

    def forget_columns(self) -> None:
        super().forget_columns()
        self.v, self.known = _forgotten, None

    def outer_v(self) -> Tensor:
        if self.known is not None:
            return self.known()[None]
        g, o, _ = self.form
        v = self.v()
        if self.reduce:
            v = v.sum(-1, keepdim=True)
        if g == v.shape[-1] == 1:
            rows = v.reshape(-1, o)
            return (rows.mT @ rows)[None]
        flat = v.permute(2, 3, 0, 1, 4).reshape(g, o, -1)
        return flat @ flat.mT

    def outer_u(self, alive: Tensor | None = None, ones: bool = False) -> Tensor:
        g, _, l = self.form
        i = self.patches.inputs + ones
        total: Tensor | None = None
        for rows in self.patches.parts(g * i * l):
            u = self.patches(rows).to(self.like.dtype)
            if ones:
                u = torch.cat([u, u.new_ones(len(u), g, 1, l)], 2)
            u = self._counted(u, None if alive is None else alive[rows])
            flat = u.permute(1, 2, 0, 3).reshape(g, i, -1)
            total = flat @ flat.mT if total is None else total.baddbmm_(flat, flat.mT)
        return self.like.new_zeros(g, i, i) if total is None else total

    def _counted(self, u: Tensor, alive: Tensor | None) -> Tensor:
        """u at the places that count, or their mean."""
        if alive is not None:
            u = u * alive[:, None, None]
        if not self.reduce:
            return u
        places: Tensor | int = u.shape[-1] if alive is None else alive.sum(-1)[:, None, None, None]
        return u.sum(-1, keepdim=True) / (
            places.clamp(min=1) if isinstance(places, Tensor) else max(places, 1)
        )

    def count(self, alive: Tensor | None = None) -> Tensor:
        if alive is not None:
            return (alive.any(-1) if self.reduce else alive).sum().to(self.like.dtype)
        terms = self.patches.n * (1 if self.reduce else self.form[2])
        return self.like.new_full((), terms)

    def alive(self) -> Tensor:
        found: Tensor = (self.v() != 0).flatten(2, 3).any(2).any(0)
        return found


def _forgotten() -> Tensor:
    raise RuntimeError("the columns of these factors were let go of")
