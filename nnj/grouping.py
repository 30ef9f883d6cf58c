"""Which rows of the loss belong to which sample: readings are tried, likeliest first, until one in which samples are independent.

A sample is what stands at one place of the batch axis of the model's input. Where the loss has as many rows, each is a sample;
where it has k times as many, k rows in order (or every N-th); otherwise each row is asked which sample it touches.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.factors import Owner
from nnj.graph import Graph, Unit
from nnj.nodes import edge_dtype, edge_shape
from nnj.records import CallMark, Edge
from nnj.samples import Coupled
from nnj.sweep import Sweep


def plan(graph: Graph, rows: int, device: torch.device) -> tuple[Sweep, Owner]:
    """The sweep and the owners of the loss's rows. Errors: `NNJError` if samples influence one another in every reading."""
    mark = max(graph.marks, key=lambda m: m.order, default=None)
    refusal: NNJError | None = None
    for n, owner in _readings(graph, rows, mark, device):
        for probed, cut in ((False, False), (True, False), (False, True)):
            try:
                sweep = Sweep(graph, n, _on_roots(graph, owner), probed, cut)
            except Coupled as error:
                refusal = refusal or error
                continue
            if n == rows or mark is None or _in_order(sweep, mark):
                return sweep, owner
            break
    assert refusal is not None
    raise refusal


def _on_roots(graph: Graph, owner: Owner) -> dict[Edge, Owner]:
    owners = {}
    for edge in graph.roots:
        dims = len(edge_shape(edge))
        owners[edge] = owner if owner.of is None else Owner(owner.n, owner.of.reshape(-1, *[1] * (dims - 1)))
    return owners


def _readings(graph: Graph, rows: int, mark: CallMark | None, device: torch.device) -> Iterator[tuple[int, Owner]]:
    n = None if mark is None else _samples(mark, rows)
    if mark is not None and n and rows != n:
        if rows % n == 0:
            order = [Owner(n), Owner(n, torch.arange(rows, device=device) % n)]
            for owner in order if mark.batch_axis == 0 else order[::-1]:
                yield n, owner
        touched = _touched(graph, rows, mark, n)
        if touched is not None:
            yield n, Owner(n, touched)
    yield rows, Owner(rows)


def _samples(mark: CallMark, rows: int) -> int | None:
    """The number of samples of a call; None if its arguments do not agree about it."""
    if rows in mark.sizes or len(mark.sizes) < 2:
        return rows if rows in mark.sizes else next(iter(mark.sizes), None)
    fit = [n for n in mark.sizes if n > 1 and rows % n == 0]
    return fit[0] if len(fit) == 1 else None


def _first(unit: Unit, mark: CallMark, n: int) -> bool:
    """Whether a unit is a layer on what the user gave to the model, in whose rows the samples stand as they were given."""
    record = unit.record
    if record is None or record.edge is not None or not unit.params:
        return False
    axis, shape = mark.batch_axis, record.x.shape
    if record.x.place not in mark.inputs:
        return False
    return len(shape) > axis and shape[axis] == n and record.y.shape[: axis + 1] == shape[: axis + 1]


def _in_order(sweep: Sweep, mark: CallMark) -> bool:
    """Whether the first layers see sample i at place i of the batch axis."""
    for unit in sweep.graph.units:
        if sweep.n == 1 or not _first(unit, mark, sweep.n):
            continue
        owner = sweep.state[unit.into[0]]
        if owner is sweep.plain and mark.batch_axis == 0:
            continue
        if owner is None or owner.explicit or owner.of is None:
            return False
        shape = [1] * owner.of.dim()
        shape[mark.batch_axis] = sweep.n
        right = torch.arange(sweep.n, device=owner.of.device).reshape(shape)
        if not bool(((owner.of == right) | (owner.of < 0)).all()):
            return False
    return True


def _touched(graph: Graph, rows: int, mark: CallMark, n: int) -> Tensor | None:
    """The one sample that each row of the loss touches at the first layers, or None if a row touches none or several."""
    firsts = [unit for unit in graph.units if _first(unit, mark, n)]
    if not firsts or len(graph.roots) > 1 or edge_shape(graph.roots[0])[0] != rows:
        return None
    (root,) = graph.roots
    shape, dtype = edge_shape(root), edge_dtype(root)
    device = root[0]._input_metadata[root[1]].device
    sweep = Sweep(graph, 1, {root: Owner(1)})
    generator = torch.Generator().manual_seed(0x6E6E6A)
    cotangent = (torch.rand(shape, generator=generator) + 0.5).to(device, dtype)
    found = torch.zeros(rows, n, dtype=torch.bool, device=device)
    step = 64
    for start in range(0, rows, step):
        number = torch.arange(start, min(start + step, rows), device=device)
        columns = cotangent.new_zeros(len(number), *shape)
        columns[number - start, number] = cotangent[number]

        for _, v in sweep.watch({root: columns}, len(number), firsts):
            axes = tuple(i for i in range(1, v.dim()) if i != mark.batch_axis + 1)
            found[number] |= (v != 0).any(axes) if axes else v != 0
    return found.int().argmax(1) if bool((found.sum(1) == 1).all()) else None
