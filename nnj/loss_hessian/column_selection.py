"""Which columns of the loss's factor walk, and in what order: column k of a sample is one column of
one of its blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnj.loss_hessian.base import LossHessian


class AllColumns:
    """All columns of S as they are, where every sample has one block."""

    trace = dropped = 0.0

    def __init__(self, hessian: LossHessian):
        self.k, self.columns = hessian.rank, hessian.columns


class ColumnSelection:
    """The columns of all blocks, packed for each sample on its own, and those that carry nothing
    left out.

    Blocks of one sample (its rows, their places) have columns to themselves; a packed column holds
    one column of one block for each sample. Without a tolerance blocks that are zero are left out.
    With one, each sample's columns come by falling square sum, and packed columns are left out from
    the end while all that is lost over the batch is at most `tol` of the trace of H.

    Args:
        curvature: of the loss.
        whose: (R,) the sample of each row of the loss; negative where a row is nobody's.
        tol: between 0 and 1.

    Attributes:
        k: the number of packed columns.
        trace, dropped: of H over the batch, and what the columns that were left out have of it.
    """

    def __init__(self, hessian: LossHessian, whose: Tensor, tol: float = 0.0):
        self.hessian = hessian
        n = max(0, int(whose.max())) + 1 if len(whose) else 0
        self.sample = torch.where(whose < 0, n, whose)
        self.slot = _number_within(self.sample)
        table = (n + 1, int(self.slot.max()) + 1 if len(whose) else 1)
        rank, places = hessian.rank, hessian.places
        self.trace = self.dropped = 0.0
        if tol == 0:
            size = hessian.diagonal().sum(-1)  # (R, D)
            alive = (
                size.new_zeros(*table, places)
                .index_put((self.sample, self.slot), (size > 0).to(size.dtype))
                .flatten(1)
            )
            order = alive.argsort(dim=1, descending=True, stable=True)
            blocks = max(1, int(alive.sum(1).max())) if alive.numel() else 0
            self.index = (
                (order[:, :blocks, None] * rank + torch.arange(rank, device=order.device))
                .flatten(1)
                .mT
            )
            self.k = self.index.shape[0]
            return
        size = hessian.norms().movedim(0, -1).double()  # (R, D, rank)
        size = (
            size.new_zeros(*table, places, rank)
            .index_put((self.sample, self.slot), size)
            .flatten(1)
        )
        size, order = size.sort(dim=1, descending=True, stable=True)
        # what is lost without packed column k and those after it
        tail = size.sum(0).flip(0).cumsum(0).flip(0)
        self.trace = float(tail[0]) if len(tail) else 0.0
        self.k = min(len(tail), max(1, int((tail > tol * self.trace).sum())))
        self.dropped = float(tail[self.k]) if self.k < len(tail) else 0.0
        self.index = order[:, : self.k].mT

    def columns(self, start: int, stop: int) -> Tensor:
        """Packed columns start to stop, (k, R, D, B)."""
        c = self.hessian
        # (k, R): of the sample's column k, the place among all of its columns
        mine = self.index[start:stop, self.sample]
        j, block = mine % c.rank, mine // c.rank
        k, row = (block // c.places == self.slot).nonzero(as_tuple=True)
        place = block[k, row] % c.places
        out = torch.zeros(mine.shape[0], c.rows, c.places, c.block, dtype=c.dtype, device=c.device)
        out[k, row, place] = c.columns_at(row, place, j[k, row])
        return out


def _number_within(group: Tensor) -> Tensor:
    """The number of each entry among those of its group, in order."""
    found, order = group.sort(stable=True)
    place = torch.arange(len(group), device=group.device)
    return torch.empty_like(place).index_put((order,), place - torch.searchsorted(found, found))
