"""Which columns of the loss's factor S walk, and in what order: column k of a sample is one column
of one of its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nnj.checks import enough
from nnj.loss_hessian.base import LossHessian

FEWER = 0.9  # of the samples of a part, below which the next column may begin another one


class ColumnSelection:
    """Columns that walk, k of them. A subclass must define `columns`.

    Attributes:
        k: how many there are.
        trace, dropped: of H over the batch, and what the columns that were left out have of it;
            both 0 where none is left out.
        counts: (N,), how many columns each sample has before zeros alone; None where all have k.
    """

    trace = dropped = 0.0
    counts: Tensor | None = None

    def __init__(self, hessian: LossHessian, k: int):
        self.hessian, self.k = hessian, k

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start to stop, (stop - start, R, D, B)."""
        raise NotImplementedError(f"{type(self).__name__} must define columns")

    def columns_through(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """The columns behind a linear map J that all rows share, as
        `LossHessian.columns_through`: (k, R, d) from J of (B * D, d).
        """
        for a in range(0, self.k, size):
            yield self.through(rows, a, min(a + size, self.k))

    def through(self, rows: Tensor, start: int, stop: int, of: Tensor | None = None) -> Tensor:
        """Columns start to stop behind J, (stop - start, R, d); at some of the rows of the loss
        alone, if `of` gives their numbers.
        """
        s = self.hessian.flat(self.columns(start, stop))
        return (s if of is None else s.index_select(1, of)).to(rows.dtype) @ rows


class AllColumns(ColumnSelection):
    """All columns of S as they are, where every sample has one block."""

    def __init__(self, hessian: LossHessian):
        super().__init__(hessian, hessian.rank)

    def columns(self, start: int, stop: int) -> Tensor:
        return self.hessian.columns(start, stop)


class PackedColumns(ColumnSelection):
    """The columns of all blocks, packed for each sample on its own, and those that carry nothing
    left out.

    Blocks of one sample (its rows, their places) have columns to themselves; a packed column holds
    one column of one block for each sample. Without a tolerance blocks that are zero are left out.
    With one, each sample's columns come by falling square sum, and packed columns are left out from
    the end while all that is lost over the batch is at most `tol` of the trace of H.

    Args:
        hessian: of the loss.
        sample: (R,) the sample of each row of the loss, or (R, D) that of each place; negative
            where it is nobody's.
        tol: between 0 and 1.
    """

    def __init__(self, hessian: LossHessian, sample: Tensor, tol: float = 0.0):
        # places that are of several samples are taken for rows
        self.split = hessian.places if sample.dim() > 1 else 1
        self.places = hessian.places // self.split
        sample = sample.flatten()
        n = max(0, int(sample.max())) + 1 if len(sample) else 0
        self.sample = torch.where(sample < 0, n, sample)  # rows of nobody are those of one more
        self.slot = numbered(self.sample)  # which row of its sample a row is
        # a table (n + 1, slots): where a sample has fewer rows than others, slots are empty
        self.table = (n + 1, int(self.slot.max()) + 1 if len(sample) else 1)
        super().__init__(hessian, 0)
        # which row has a slot; one behind the last where none has
        number = torch.arange(len(sample), device=sample.device)
        empty = torch.full(self.table, len(sample), device=sample.device)
        self.row = empty.index_put((self.sample, self.slot), number)
        # (k, n + 1): of each packed column and sample, the number of one of the sample's columns,
        # which are counted by slot, place and column of the block
        self.index = self._largest(tol) if tol > 0 else self._nonzero()
        self.k = self.index.shape[0]

    def _by_sample(self, values: Tensor) -> Tensor:
        """(R, D, ...) -> (n + 1, slots * ...), zero in empty slots."""
        values = values.reshape(len(self.sample), self.places, *values.shape[2:])
        table = values.new_zeros(*self.table, *values.shape[1:])
        return table.index_put((self.sample, self.slot), values).flatten(1)

    def _nonzero(self) -> Tensor:
        """The index of all columns of the blocks that are not zero."""
        size, rank = self.hessian.diagonal().sum(-1), self.hessian.rank  # (R, D)
        alive = self._by_sample((size > 0).long())
        order = alive.argsort(dim=1, descending=True, stable=True)  # blocks, those not zero first
        count = alive.sum(1)
        blocks = max(1, enough(count.max(), alive.shape[1])) if alive.numel() else 0
        columns = torch.arange(rank, device=order.device)
        return (order[:, :blocks, None] * rank + columns).flatten(1).mT

    def _by_size(self) -> tuple[Tensor, Tensor]:
        """The square sums of each sample's columns, the largest first, and which these are."""
        size = self._by_sample(self.hessian.norms().movedim(0, -1).double())  # of (R, D, rank)
        return size.sort(dim=1, descending=True, stable=True)

    def _largest(self, tol: float) -> Tensor:
        """The index of the largest columns of each sample, so many that at most `tol` is lost."""
        size, order = self._by_size()
        # what is lost without packed column k and those after it
        tail = size.sum(0).flip(0).cumsum(0).flip(0)
        self.trace = float(tail[0]) if len(tail) else 0.0
        k = min(len(tail), max(1, int((tail > tol * self.trace).sum())))
        self.dropped = float(tail[k]) if k < len(tail) else 0.0
        return order[:, :k].mT

    def columns(self, start: int, stop: int) -> Tensor:
        h, number = self.hessian, self.index[start:stop]  # among all columns of a sample
        j, block = number % h.rank, number // h.rank
        slot, place = block // self.places, block % self.places
        sample = torch.arange(number.shape[1], device=h.device)
        row, k = self.row[sample, slot], torch.arange(len(number), device=h.device)[:, None]
        # a sample that has no such row writes behind the last entry
        size, missing = len(number) * h.rows * h.places, row >= len(self.sample)
        row = row.clamp(max=len(self.sample) - 1)
        row, place = row // self.split, place + row % self.split
        at = torch.where(missing, size, (k * h.rows + row) * h.places + place).flatten()
        found = h.columns_at(row.flatten(), place.flatten(), j.flatten())
        out = torch.zeros(size + 1, h.block, dtype=h.dtype, device=h.device)
        return out.index_put_((at,), found)[:size].view(len(number), h.rows, h.places, h.block)


class RaggedColumns(PackedColumns):
    """The largest columns over all samples, so many that at most `tol` of the trace of H is lost:
    each sample keeps as many as its share of H needs, and has zeros behind them.

    Args:
        hessian: of the loss, whose row i is sample i.
        tol: above 0.

    Attributes:
        counts: (N,), how many each sample keeps.
        packed: how many `PackedColumns` would walk for the same tolerance.
    """

    counts: Tensor
    packed: int

    def __init__(self, hessian: LossHessian, tol: float):
        super().__init__(hessian, torch.arange(hessian.rows, device=hessian.device), tol)
        self.k = max(1, int(self.counts.max())) if len(self.counts) else 0

    def _largest(self, tol: float) -> Tensor:
        size, order = self._by_size()
        lost = size.sum(0).flip(0).cumsum(0).flip(0)
        self.trace = float(lost[0]) if len(lost) else 0.0
        self.packed = min(len(lost), max(1, int((lost > tol * self.trace).sum())))
        self._lost = float(lost[self.packed]) if self.packed < len(lost) else 0.0
        flat, place = size.flatten().sort(descending=True, stable=True)
        tail = flat.flip(0).cumsum(0).flip(0)  # what is lost without an entry and all smaller ones
        kept = int((tail > tol * self.trace).sum())
        self.dropped = float(tail[kept]) if kept < len(tail) else 0.0
        counts = torch.bincount(place[:kept] // max(1, size.shape[1]), minlength=len(size))
        self.counts = counts[: self.hessian.rows]
        return order[:, : max(self.packed, int(counts.max()))].mT.clone()

    def as_packed(self) -> PackedColumns:
        """As many columns for all samples, within the same tolerance."""
        other = PackedColumns.__new__(PackedColumns)
        other.__dict__.update(vars(self))
        other.k, other.dropped, other.counts = self.packed, self._lost, None
        return other

    def columns(self, start: int, stop: int) -> Tensor:
        number = torch.arange(start, stop, device=self.counts.device)
        alive = number[:, None] < self.counts
        return super().columns(start, stop) * alive[:, :, None, None]

    def parts(self, fixed: float) -> list[tuple[int, int, int]]:
        """The columns in parts (start, stop, samples), of which each goes through the samples that
        have its first column, at the least cost.

        Args:
            fixed: what a part costs beside its columns, in columns of one sample.
        """
        sizes = torch.bincount(self.counts, minlength=self.k + 1)
        alive = [*(sizes.sum() - sizes.cumsum(0))[: self.k].tolist(), 0]  # samples with column k
        cuts = [0]
        for k in range(1, self.k + 1):
            if alive[k] < FEWER * alive[cuts[-1]]:
                cuts.append(k)
        # from a cut on, the least that the rest costs, and the cut at which its first part ends
        best: dict[int, tuple[float, int]] = {cuts[-1]: (0.0, cuts[-1])}
        for i in reversed(range(len(cuts) - 1)):
            start = cuts[i]
            best[start] = min(
                (fixed + (stop - start + 1) * alive[start] + best[stop][0], stop)
                for stop in cuts[i + 1 :]
            )
        found, start = list[tuple[int, int, int]](), 0
        while start < cuts[-1]:
            stop = best[start][1]
            found.append((start, stop, alive[start]))
            start = stop
        return found


def numbered(group: Tensor) -> Tensor:
    """The number of each entry among those of its group, in order."""
    found, order = group.sort(stable=True)
    position = torch.arange(len(group), device=group.device)
    number = position - torch.searchsorted(found, found)
    return torch.empty_like(position).index_put((order,), number)
