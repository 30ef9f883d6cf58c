"""Whether two ranks have read the same samples: sums over what each has read, which change with any
sample and not with their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nnj.errors import NNJError

_NEAR = 1e-9  # of sums in another order


class Sums(NamedTuple):
    """Over the samples that a rank has read, each seen as one number a.

    Attributes:
        samples: how many there are.
        total, square, wave: the sums of a, a^2 and sin a.
    """

    samples: int
    total: float
    square: float
    wave: float

    def same(self, other: Sums) -> bool:
        """Whether they are of the same samples, and not all of these are one."""
        near = [abs(a - b) <= _NEAR * max(1.0, abs(a)) for a, b in zip(self, other, strict=True)]
        spread = self.samples * self.square - self.total**2
        return all(near) and spread > 1e-6 * self.samples * self.square


class Seen:
    """What has been read so far."""

    def __init__(self) -> None:
        self._samples, self._sums = 0, torch.zeros(3, dtype=torch.float64)

    def add(self, inputs: Any, target: Any, n: int, axis: int) -> None:
        """A batch of n samples, which are in an axis of the inputs."""
        leaves = [(t, axis) for t in tree_leaves(inputs)] + [(t, 0) for t in tree_leaves(target)]
        rows = [_rows(t, n, at) for t, at in leaves if isinstance(t, Tensor)]
        one = sum(_along(t, i) for i, t in enumerate(rows) if t is not None)
        if isinstance(one, Tensor):
            sums = torch.stack([one.sum(), one.square().sum(), one.sin().sum()])
            self._sums = self._sums.to(sums) + sums
        self._samples += n

    def sums(self) -> Sums:
        return Sums(self._samples, *self._sums.tolist())


def _rows(t: Tensor, n: int, axis: int) -> Tensor | None:
    """The entries of each sample, (n, ...); None where nobody knows which they are."""
    if t.layout != torch.strided or t.is_nested or t.device.type == "mps" or t.dim() <= axis:
        return None
    if t.shape[axis] != n:
        return None
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return t.movedim(axis, 0).unsqueeze(-1).flatten(1).double()


def _along(rows: Tensor, number: int) -> Tensor:
    """Each sample as a number: a sum of its entries by weights of which few add up to others."""
    places = torch.arange(2, rows.shape[1] + 2, device=rows.device, dtype=rows.dtype)
    found: Tensor = rows @ (0.5 + 618.03398875 * (places + number).sqrt() % 1)
    return found


def check_apart(every: Sequence[Sums]) -> None:
    """Errors: `NNJError` for two ranks that have read the same."""
    for (rank, one), (other, two) in itertools.combinations(enumerate(every), 2):
        if one.same(two):
            raise NNJError(
                f"ranks {rank} and {other} have read the same {one.samples} samples, each of which "
                "counts twice then. Give each rank a part of the data: torch.utils.data.Subset("
                "data, range(rank, len(data), world_size)); or say group=False"
            )
