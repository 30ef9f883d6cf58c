"""U: the patches in which a weight sees its input, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnj.jacobians.factor import CHUNK


def outer(v: Tensor, u: Tensor) -> Tensor:
    """V U^T, (K, N, G, O, I); by column, since a broadcast product would copy U for each."""
    if v.shape[-1] == 1:
        return v * u.mT
    if len(v) < 2:
        return (v[0] @ u.mT)[None] if len(v) else v @ u.mT
    return torch.stack([column @ u.mT for column in v])


class Patches:
    """U of (N, G, I, L), made for some samples when it is asked for: of all of a batch it is often
    the largest tensor there is.

    Args:
        make: U of the samples in a slice.
        n, inputs: N and I.

    Attributes:
        is_one: whether U is one, with one input and one place: that of a bias.
    """

    is_one: bool = False

    def __init__(self, make: Callable[[slice], Tensor], n: int, inputs: int):
        self.make, self.n, self.inputs = make, n, inputs

    @classmethod
    def of(cls, u: Tensor) -> Patches:
        """Those that stand in memory already."""
        return cls(lambda rows: u[rows], u.shape[0], u.shape[2])

    @classmethod
    def ones(cls, n: int, like: Tensor) -> Patches:
        """Those of a bias, (N, 1, 1, 1), of the dtype and device of a tensor."""
        found = cls(lambda rows: like.new_ones(n, 1, 1, 1)[rows], n, 1)
        found.is_one = True
        return found

    def __call__(self, rows: slice = slice(None)) -> Tensor:
        return self.make(rows)

    def of_rows(self, rows: slice) -> Patches:
        """Those of the samples in a slice with both ends."""
        start, count = rows.start, rows.stop - rows.start
        if count == self.n:
            return self
        make = lambda some: self.make(slice(*(start + at for at in some.indices(count)[:2])))
        return Patches(make, count, self.inputs)

    def to(self, dtype: torch.dtype) -> Patches:
        found = Patches(lambda rows: self.make(rows).to(dtype), self.n, self.inputs)
        found.is_one = self.is_one
        return found

    def parts(self, entries: int) -> list[slice]:
        """All samples in parts of which a tensor of so many entries for each sample is small."""
        step = max(1, CHUNK // max(1, entries))
        return [slice(a, min(a + step, self.n)) for a in range(0, self.n, step)]
