"""Whose the blocks of a loss's Hessian are, and which samples they take together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnj.errors import Coupled
from nnj.jacobians.sample_index import SampleIndex
from nnj.loss_hessian.base import LossHessian
from nnj.propagation.glue import entries_of
from nnj.propagation.plan_search import Planned
from nnj.recording.records import Edge


def samples_of(
    hessian: LossHessian, edges: Sequence[Edge], planned: Planned
) -> tuple[Tensor | None, Tensor | None]:
    """The sample (or the group of samples) of each row of a loss, (R,), or of each place, (R, D);
    None where row i is sample i.

    Args:
        edges: of the outputs that the loss is given.

    Returns:
        That, and where blocks have entries of several samples, of each sample the number of the
        group with which it is taken together.

    Errors: `Coupled` if all samples are taken together by several rows.
    """
    n, rows = planned.sweep.n, hessian.rows
    found = [planned.roots.get(edge) for edge in edges]
    in_order = all(index is not None and index.of is None for index in found)
    if rows == 0 or (in_order and n == rows):
        return None, None
    by_row = [_by_row(i, shape, hessian) for i, shape in zip(found, hessian.shapes, strict=True)]
    first = by_row[0]
    if first is not None and all(of is not None and torch.equal(of, first) for of in by_row[1:]):
        return first, None
    return _by_block(hessian, found, n)


def _by_row(
    index: SampleIndex | None, shape: tuple[int, ...], hessian: LossHessian
) -> Tensor | None:
    """The sample of each row of an output, where all its entries are of one."""
    if index is None or shape[:1] != (hessian.rows,):
        return None
    of = entries_of(index, shape, hessian.device)
    return of.flatten() if of.numel() == len(of) else None


def _by_block(
    hessian: LossHessian, found: Sequence[SampleIndex | None], n: int
) -> tuple[Tensor | None, Tensor | None]:
    """`samples_of`, entry by entry."""
    h, count = hessian, hessian.rows * hessian.places
    numbers = torch.arange(count, device=h.device).reshape(1, h.rows, h.places, 1)
    blocks = h.to_outputs(numbers.expand(1, h.rows, h.places, h.block))
    samples = []
    for index, shape in zip(found, h.shapes, strict=True):
        of = torch.tensor(n, device=h.device)  # nobody's, where nothing wanted is behind
        if index is not None:
            of = entries_of(index, shape, h.device)
        samples.append(torch.where(of < 0, n, of).expand(shape).flatten())
    block, sample = torch.cat([t.flatten() for t in blocks]), torch.cat(samples)
    block, sample = block[sample < n], sample[sample < n]
    lowest = torch.full((count,), n, device=h.device).scatter_reduce(0, block, sample, "amin")
    if not torch.equal(lowest[block], sample):
        return None, _groups(block, sample, lowest, n, h.rows)
    mine = torch.where(lowest == n, -1, lowest).reshape(h.rows, h.places)
    largest = mine.amax(1)
    one_each = bool(((mine == largest[:, None]) | (mine < 0)).all())
    return (largest if one_each else mine), None


def _groups(block: Tensor, sample: Tensor, of_block: Tensor, n: int, rows: int) -> Tensor:
    """The numbers, from 0 on, of the groups of samples that have blocks in common: (n,)."""
    number = torch.arange(n, device=sample.device)
    while True:
        after = number.scatter_reduce(0, sample, of_block[block], "amin")
        if torch.equal(after, number):
            break
        number = after
        of_block = of_block.scatter_reduce(0, block, number[sample], "amin")
    group: Tensor = number.unique(return_inverse=True)[1]
    if rows > 1 and not bool(group.any()):
        raise Coupled(
            "the loss couples samples: each row of what it is given (an entry of axis 0) holds "
            "entries of several samples, which its Hessian connects. Give it the samples in axis "
            "0, such as output.transpose(0, 1)"
        )
    return group
