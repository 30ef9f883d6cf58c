"""Which rows of the loss belong to which sample: readings are tried, likeliest first, until one in
which samples are independent.

A sample is what stands at one place of the batch axis of the model's input. Where the loss has as
many rows, each is a sample; where it has k times as many, k rows in order (or every N-th);
otherwise each row is asked which sample it touches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nnj.errors import Coupled, NNJError
from nnj.graph.builder import Graph
from nnj.graph.nodes import edge_dtype, edge_shape
from nnj.graph.step import Step, describe
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Sweep
from nnj.recording.records import CallMark, Edge, place_of


def plan(graph: Graph, rows: int, device: torch.device) -> tuple[Sweep, SampleIndex, bool]:
    """The sweep, the owners of the loss's rows, and whether samples are known to be those that were
    given to the model.

    Where they are not known (what the model did to its input before its first layer leaves no
    trace), any grouping of rows in which samples are independent gives the same GGN, but not the
    same gradient for each sample.

    Errors: `NNJError` if samples influence one another in every reading.
    """
    mark = max(graph.marks, key=lambda m: m.order, default=None)
    refusal: NNJError | None = None
    out_of_order: list[SampleIndex] = []
    for n, sample_index, options in _attempts(graph, rows, mark, device):
        given = None if mark is None else _samples(mark, rows)
        if any(sample_index is other for other in out_of_order):
            continue
        try:
            sweep = Sweep(graph, n, _on_roots(graph, sample_index), **options)
            in_order = mark is None or given is None or _check_apart(sweep, mark, given)
        except Coupled as error:
            refusal = refusal or error
            continue
        if mark is None or given is None or rows == given:
            return sweep, sample_index, True
        if n == rows or in_order:
            evidence = _evidence(graph, mark, given)
            known = (
                all(bool((e.sample_indices >= 0).all()) for e in evidence)
                if evidence
                else _alone(graph, rows, mark, n, sample_index)
            )
            return sweep, sample_index, known
        out_of_order.append(sample_index)
    assert refusal is not None
    raise refusal


def plans(graph: Graph) -> list[dict[str, bool]]:
    """What a sweep may take for granted, the cheapest first; the rows that bare parameters meet may
    not be those of samples.
    """
    found = [
        {"probed": probed, "cut": cut, "bare": False}
        for probed, cut in ((False, False), (True, False), (False, True))
    ]
    return [{**found[0], "bare": True}, *found] if any(step.bare for step in graph.steps) else found


def _alone(graph: Graph, rows: int, mark: CallMark, n: int, sample_index: SampleIndex) -> bool:
    """Whether samples influence one another in the other order of rows, so that this one needs no
    evidence of first layers.

    The layers before the first wanted parameter (frozen ones) leave no trace; behind them, rows
    that mix are of one sample."""
    if n == rows or rows % n:
        return False
    other = (
        SampleIndex(n)
        if sample_index.of is not None
        else SampleIndex(n, torch.arange(rows, device=mark.inputs[0].device) % n)
    )
    for options in plans(graph):
        if options["cut"]:
            continue
        try:
            Sweep(graph, n, _on_roots(graph, other), **options)
        except Coupled:
            continue
        return False
    return True


def _on_roots(graph: Graph, sample_index: SampleIndex) -> dict[Edge, SampleIndex]:
    sample_indices = {}
    for edge in graph.roots:
        dims = len(edge_shape(edge))
        sample_indices[edge] = (
            sample_index
            if sample_index.of is None
            else SampleIndex(sample_index.n, sample_index.of.reshape(-1, *[1] * (dims - 1)))
        )
    return sample_indices


def _attempts(
    graph: Graph, rows: int, mark: CallMark | None, device: torch.device
) -> Iterator[tuple[int, SampleIndex, dict[str, bool]]]:
    """(n, owners of the rows, a plan) of sweeps that may do; operands without samples (`cut`) only
    where all else fails.
    """
    n, ways = None if mark is None else _samples(mark, rows), plans(graph)
    if mark is not None and n and rows != n:
        if rows % n == 0:
            order = [SampleIndex(n), SampleIndex(n, torch.arange(rows, device=device) % n)]
            order = order if mark.batch_axis == 0 else order[::-1]
            for cut in (False, True):
                yield from (
                    (n, sample_index, way)
                    for sample_index in order
                    for way in ways
                    if way["cut"] == cut
                )
        touched = _touched(graph, rows, mark, n)
        if touched is not None:
            yield from (
                (n, sample_index, way) for sample_index in [SampleIndex(n, touched)] for way in ways
            )
    yield from ((rows, sample_index, way) for sample_index in [SampleIndex(rows)] for way in ways)


def _samples(mark: CallMark, rows: int) -> int | None:
    """The number of samples of a call; None if its arguments do not agree about it."""
    if rows in mark.sizes or len(mark.sizes) < 2:
        return rows if rows in mark.sizes else next(iter(mark.sizes), None)
    fit = [n for n in mark.sizes if n > 1 and rows % n == 0]
    return fit[0] if len(fit) == 1 else None


class _Evidence(NamedTuple):
    """Whose the rows of a first layer are: `owners` along one axis of its input and output, -1
    where it cannot be told.
    """

    step: Step
    axis: int
    sample_indices: Tensor


def _evidence(graph: Graph, mark: CallMark, n: int) -> list[_Evidence]:
    """What is known of layers on what the user gave to the model: as it was given, or rows of it in
    another order.
    """
    found = []
    for step in graph.steps:
        record = step.record
        if record is None or record.edge is not None or not step.params:
            continue
        axis, shape = mark.batch_axis, record.x.shape  # axis is 0 or 1
        if record.x.place in [place_of(t) for t in mark.inputs]:
            if (
                len(shape) > axis
                and shape[axis] == n
                and record.y.shape[: axis + 1] == shape[: axis + 1]
            ):
                found.append(_Evidence(step, axis, torch.arange(n)))
        elif axis < 2 and any(
            t.dim() > 1 and record.x.place == place_of(t.transpose(0, 1)) for t in mark.inputs
        ):
            if shape[1 - axis] == n and record.y.shape[:2] == shape[:2]:
                found.append(_Evidence(step, 1 - axis, torch.arange(n)))
        elif record.x.value is not None and record.x.value.device.type != "meta":
            sample_indices = _rows_of_inputs(record.x.value, mark, n)
            if sample_indices is not None:
                found.append(_Evidence(step, 0, sample_indices))
    return found


def _rows_of_inputs(x: Tensor, mark: CallMark, n: int) -> Tensor | None:
    """The sample of each row of x, if every row is found among the rows of the model's inputs; None
    if some are not.
    """
    rows, size = x.reshape(len(x), -1), x[0].numel()
    pool, sample_indices = [], []
    for t in mark.inputs:
        if (
            t.dim() > mark.batch_axis
            and t.shape[mark.batch_axis] == n
            and t.dtype == x.dtype
            and t.numel() % (n * size) == 0
        ):
            pool.append(t.movedim(mark.batch_axis, 0).reshape(-1, size))
            sample_indices.append(torch.arange(n).repeat_interleave(len(pool[-1]) // n))
    if not pool or (not x.is_floating_point() and x.numel() != sum(t.numel() for t in pool)):
        # numbers that merely count, such as positions, are found among tokens by chance
        return None
    mix = torch.rand(
        size, generator=torch.Generator().manual_seed(0x6E6E6A), dtype=torch.float64
    ).to(x.device)
    known, order = (torch.cat(pool).to(torch.float64) * mix).sum(1).sort()
    mine, sample_index = (
        (rows.to(torch.float64) * mix).sum(1),
        torch.cat(sample_indices)[order.cpu()],
    )
    slack = 1e-12 * (1 + known.abs())
    first = torch.searchsorted(known - slack, mine, right=True).clamp(max=len(known)) - 1
    low = torch.searchsorted(known + slack, mine).cpu()
    high = first.cpu()
    if bool((low > high).any()):
        return None
    # equal rows of several samples tell nothing
    return torch.where(sample_index[low] == sample_index[high], sample_index[low], -1)


def _check_apart(sweep: Sweep, mark: CallMark, n: int) -> bool:
    """Whether sample i of the sweep is what was given to the model at place i, as far as first
    layers tell.

    Errors: `Coupled` if what was given at one place reaches the loss in two samples.
    """
    in_order, to = True, torch.full((n,), -1)
    for step, axis, sample_indices in _evidence(sweep.graph, mark, n) if sweep.n > 1 else []:
        state, shape = sweep.state[step.into[0]], edge_shape(step.into[0])
        if state is None:
            return False
        if state.by_column:
            raise Coupled.at(describe(step, sweep.graph.paths))
        of = torch.arange(shape[0]) // (shape[0] // sweep.n) if state.of is None else state.of.cpu()
        of = of.reshape(*of.shape, *[1] * (len(shape) - of.dim()))
        of = (
            of.expand(*(shape[i] if i == axis else s for i, s in enumerate(of.shape)))
            .movedim(axis, 0)
            .flatten(1)
        )
        told = (of >= 0) & (sample_indices[:, None] >= 0)
        given, whose = sample_indices[:, None].expand(of.shape)[told], of[told]
        unknown = to[given] < 0
        to[given[unknown]] = whose[unknown]
        if bool((to[given] != whose).any()):
            raise Coupled.at(describe(step, sweep.graph.paths))
        in_order = in_order and bool((given == whose).all())
    return in_order


def _touched(graph: Graph, rows: int, mark: CallMark, n: int) -> Tensor | None:
    """The one sample that each row of the loss touches at the first layers, or None if a row
    touches none or several.
    """
    evidence = {e.step: e for e in _evidence(graph, mark, n) if bool((e.sample_indices >= 0).all())}
    if not evidence or len(graph.roots) > 1 or edge_shape(graph.roots[0])[:1] != (rows,):
        return None
    (root,) = graph.roots
    shape, dtype = edge_shape(root), edge_dtype(root)
    device = root[0]._input_metadata[root[1]].device
    sweep = Sweep(graph, 1, {root: SampleIndex(1)})
    generator = torch.Generator().manual_seed(0x6E6E6A)
    cotangent = (torch.rand(shape, generator=generator) + 0.5).to(device, dtype)
    found = torch.zeros(rows, n, dtype=torch.long, device=device)
    stride = 64
    for start in range(0, rows, stride):
        number = torch.arange(start, min(start + stride, rows), device=device)
        columns = cotangent.new_zeros(len(number), *shape)
        columns[number - start, number] = cotangent[number]
        for step, v in sweep.watch({root: columns}, len(number), list(evidence)):
            there = (v != 0).movedim(evidence[step].axis + 1, 1).flatten(2).any(2).long()
            found[number] += torch.zeros_like(found[number]).index_add_(
                1, evidence[step].sample_indices.to(device), there
            )
    touched = found > 0
    return touched.int().argmax(1) if bool((touched.sum(1) == 1).all()) else None
