"""The Kronecker factors of B = V U^T: S = sum v v^T, A = sum u u^T."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nnj.jacobians.kron import Approx, Kron
from nnj.jacobians.patches import Patches

BLOCK = 192  # rows of a product that is symmetric


def sum_of_squares(parts: Iterable[Tensor], scale: float = 1) -> Tensor | None:
    """The sum of x x^T over parts x of (B, G, I, L), and over B, (G, I, I), times a number; None of
    no parts.

    Where L is long each of B is a product of its own, so that x is not copied. Else, on a CPU, what
    is below the blocks of the diagonal is copied, where half of the products is worth more than one
    large one."""
    total: Tensor | None = None
    halved = False
    for x in parts:
        b, g, i, l = x.shape
        if l >= 2 * i and b > 1:
            found = (x @ x.mT).sum(0)
            found = found if scale == 1 else found.mul_(scale)
            total = found if total is None else total.add_(found)
            continue
        flat = x.permute(1, 2, 0, 3).reshape(g, i, -1)
        if total is None:
            halved = x.device.type == "cpu" and i > 2 * BLOCK and b * l > 2 * i
            total = flat.new_zeros(g, i, i) if halved else _scaled(flat, scale)
            if not halved:
                continue
        if halved:
            _add_above(total, flat, scale)
        else:
            total.baddbmm_(flat, flat.mT, alpha=scale)
    if total is not None and halved:
        for a in range(0, total.shape[1], BLOCK):
            total[:, a + BLOCK :, a : a + BLOCK] = total[:, a : a + BLOCK, a + BLOCK :].mT
    return total


def square(x: Tensor) -> Tensor:
    """x x^T for x of (I, M), (I, I)."""
    found = sum_of_squares([x[None, None]])
    assert found is not None
    return found[0]


def _scaled(x: Tensor, scale: float) -> Tensor:
    """x x^T times a number, without a pass over the result."""
    if scale == 1:
        return x @ x.mT
    # with beta=0 what is given first is not read
    return torch.baddbmm(x.new_empty(1, 1, 1), x, x.mT, beta=0, alpha=scale)


def _add_above(total: Tensor, x: Tensor, scale: float) -> None:
    """Add x x^T times a number in the blocks of the diagonal, and above them."""
    for one, rows in zip(total, x, strict=True):
        for a in range(0, len(rows), BLOCK):
            one[a : a + BLOCK, a:].addmm_(rows[a : a + BLOCK], rows[a:].mT, alpha=scale)


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
            return square(v.reshape(-1, o).mT)[None]
        found = sum_of_squares([v.flatten(0, 1)])
        return self.like.new_zeros(g, o, o) if found is None else found

    def outer_u(self, alive: Tensor | None = None, ones: bool = False) -> Tensor:
        return self._outer_u(alive, ones, 1)

    def mean_u(self, alive: Tensor | None = None, ones: bool = False) -> Tensor:
        if alive is not None:
            return super().mean_u(alive, ones)
        return self._outer_u(None, ones, 1 / max(1, self._terms))

    @property
    def _terms(self) -> int:
        """The count where all places are in it."""
        return self.patches.n * (1 if self.reduce else self.form[2])

    def _outer_u(self, alive: Tensor | None, ones: bool, scale: float) -> Tensor:
        g, _, l = self.form
        i = self.patches.inputs + ones
        parts = self.patches.parts(g * i * l)
        found = sum_of_squares((self._inputs(rows, alive, ones) for rows in parts), scale)
        return self.like.new_zeros(g, i, i) if found is None else found

    def _inputs(self, rows: slice, alive: Tensor | None, ones: bool) -> Tensor:
        """u of some samples at the places that count, (N, G, I, L), or their mean."""
        u = self.patches(rows).to(self.like.dtype)
        if ones:
            u = torch.cat([u, u.new_ones(len(u), self.form[0], 1, self.form[2])], 2)
        return self._counted(u, None if alive is None else alive[rows])

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
        return self.like.new_full((), self._terms)

    def alive(self) -> Tensor:
        found: Tensor = (self.v() != 0).flatten(2, 3).any(2).any(0)
        return found


def _forgotten() -> Tensor:
    raise RuntimeError("the columns of these factors were let go of")
