"""Which rows of the loss belong to which sample: readings are tried, likeliest first, until one in
which samples are independent.

A sample is what stands at one position of the batch axis of the model's input. Where the loss has
as many rows, each is a sample; where it has k times as many, k rows in order (or every N-th);
otherwise each row is asked which sample it touches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nnj.errors import Coupled, NNJError
from nnj.generators import OwnGenerator
from nnj.graph.builder import Graph
from nnj.graph.step import Step, describe
from nnj.jacobians.sample_index import SampleAxis, SampleIndex
from nnj.propagation.backward import Sweep
from nnj.propagation.plan import Assumptions, device_of
from nnj.recording.records import CallMark, Edge, Record, storage_of


class Planned(NamedTuple):
    """A sweep, whose the rows of the loss are, and whether samples are known to be those that were
    given to the model.
    """

    sweep: Sweep
    sample_index: SampleIndex
    known: bool


def plan(graph: Graph, rows: int, device: torch.device) -> Planned:
    """The sweep of the first reading in which samples are independent.

    What the model did to its input before its first layer leaves no trace. Where that hides which
    sample is which, any grouping of rows in which samples are independent gives the same GGN, but
    not the same gradient for each sample.

    Errors: `NNJError` if samples influence one another in every reading.
    """
    mark = max(graph.marks, key=lambda m: m.order, default=None)
    given = None if mark is None else _samples(mark, rows)
    refusal: NNJError | None = None
    out_of_order: list[SampleIndex] = []
    for reading in _readings(graph, rows, mark, device):
        n, sample_index, assume = reading
        if sample_index in out_of_order:
            continue
        try:
            sweep = Sweep(graph, n, on_roots(graph, sample_index), assume)
            in_order = mark is None or given is None or _check_apart(sweep, mark, given)
        except Coupled as error:
            refusal = refusal or error
            continue
        if in_order or n == rows:
            return Planned(sweep, sample_index, _known(graph, rows, mark, given, reading))
        out_of_order.append(sample_index)
    assert refusal is not None
    try:
        raise refusal
    finally:
        del refusal  # its frames hold this one, which would hold it


def plan_by_axis(graph: Graph, axis: int, device: torch.device) -> Planned | None:
    """The sweep where the samples are along another axis of what the loss is given, as a loss of
    sequences has them (time, sample, class); None if they are not.
    """
    mark = max(graph.marks, key=lambda m: m.order, default=None)
    (root, *others), shapes = graph.roots, graph.shapes
    if mark is None or others or len(shapes[root]) <= axis:
        return None
    n = shapes[root][axis]
    if n not in mark.sizes or shapes[root][0] in mark.sizes[:1]:
        return None
    sample_index = SampleIndex.by_axis(n, shapes[root], SampleAxis(axis, 1), device)
    for assume in assumptions(graph):
        try:
            sweep = Sweep(graph, n, {root: sample_index}, assume)
            in_order = _check_apart(sweep, mark, n)
        except Coupled:
            continue
        if in_order:
            evidence = _evidence(graph, mark, n)
            known = all(bool((e.samples >= 0).all()) for e in evidence)
            return Planned(sweep, sample_index, known and bool(evidence))
    return None


def assumptions(graph: Graph) -> list[Assumptions]:
    """What a sweep may take for granted, the cheapest first; the rows that bare parameters meet may
    not be those of samples.
    """
    ways = [Assumptions(), Assumptions(probed=True), Assumptions(cut=True)]
    bare = any(step.bare for step in graph.steps)
    return [Assumptions(bare=True), *ways] if bare else ways


# -- readings --------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    n: int  # the number of samples
    sample_index: SampleIndex  # of the rows of the loss
    assume: Assumptions


def _readings(
    graph: Graph, rows: int, mark: CallMark | None, device: torch.device
) -> Iterator[_Reading]:
    """All that may do. That a second operand has no samples (`cut`) is assumed only where all else
    fails.
    """
    n, ways = None if mark is None else _samples(mark, rows), assumptions(graph)
    if mark is not None and n and rows != n:
        if rows % n == 0:
            orders = [SampleIndex(n), _cyclic(n, rows, device)]
            orders = orders if mark.batch_axis == 0 else orders[::-1]
            for cut in (False, True):
                for order in orders:
                    yield from (_Reading(n, order, way) for way in ways if way.cut == cut)
        touched = _touched(graph, rows, mark, n)
        if touched is not None:
            order = SampleIndex(n, touched)
            yield from (_Reading(n, order, way) for way in ways)
    each = SampleIndex(rows)
    yield from (_Reading(rows, each, way) for way in ways)


def _samples(mark: CallMark, rows: int) -> int | None:
    """The number of samples of a call; None if its arguments do not agree about it."""
    sizes = mark.sizes
    if rows in sizes or len(sizes) < 2:
        return rows if rows in sizes else next(iter(sizes), None)
    fit = [n for n in sizes if n > 1 and rows % n == 0]
    return fit[0] if len(fit) == 1 else None


def _cyclic(n: int, rows: int, device: torch.device) -> SampleIndex:
    """Every n-th row is of the same sample."""
    return SampleIndex(n, torch.arange(rows, device=device) % n)


def on_roots(graph: Graph, sample_index: SampleIndex) -> dict[Edge, SampleIndex]:
    """The sample index of rows as that of the entries of each root."""
    n, of = sample_index.n, sample_index.of
    if of is None or sample_index.along is not None:  # the latter is that of a root already
        return dict.fromkeys(graph.roots, sample_index)
    return {
        edge: SampleIndex(n, of.reshape(-1, *[1] * (len(graph.shapes[edge]) - 1)))
        for edge in graph.roots
    }


def _known(
    graph: Graph, rows: int, mark: CallMark | None, given: int | None, reading: _Reading
) -> bool:
    """Whether the samples of a reading are those that were given to the model."""
    if mark is None or given is None or rows == given:
        return True
    evidence = _evidence(graph, mark, given)
    if evidence:
        return all(bool((e.samples >= 0).all()) for e in evidence)
    return _alone(graph, rows, mark, reading)


def _alone(graph: Graph, rows: int, mark: CallMark, reading: _Reading) -> bool:
    """Whether samples influence one another in the other order of rows, so that this one needs no
    evidence of first layers.

    The layers before the first wanted parameter (frozen ones) leave no trace; behind them, rows
    that mix are of one sample."""
    n = reading.n
    if n == rows or rows % n:
        return False
    in_order = reading.sample_index.of is None
    other = _cyclic(n, rows, mark.inputs[0].device) if in_order else SampleIndex(n)
    for assume in assumptions(graph):
        if assume.cut:
            continue
        try:
            Sweep(graph, n, on_roots(graph, other), assume)
        except Coupled:
            continue
        return False
    return True


# -- evidence of first layers ----------------------------------------------------------------------


class _Evidence(NamedTuple):
    """Whose the rows of a first layer are: `samples` along one axis of its input and output, -1
    where it cannot be told.
    """

    step: Step
    axis: int
    samples: Tensor


def _evidence(graph: Graph, mark: CallMark, n: int) -> list[_Evidence]:
    """What is known of layers on what the user gave to the model: as it was given, or rows of it in
    another order.
    """
    evidence = []
    for step in graph.steps:
        record = step.record
        if record is not None and record.edge is None and step.params:
            seen = _at_first_layer(record, mark, n)
            if seen is not None:
                evidence.append(_Evidence(step, *seen))
    return evidence


def _at_first_layer(record: Record, mark: CallMark, n: int) -> tuple[int, Tensor] | None:
    """An axis of a first layer's input and output, and whose the rows along it are."""
    axis, x, y = mark.batch_axis, record.x, record.y
    if x.storage in [storage_of(t) for t in mark.inputs]:
        same = len(x.shape) > axis and x.shape[axis] == n
        same = same and y.shape[: axis + 1] == x.shape[: axis + 1]
        return (axis, torch.arange(n)) if same else None
    if axis < 2 and any(
        t.dim() > 1 and x.storage == storage_of(t.transpose(0, 1)) for t in mark.inputs
    ):
        same = x.shape[1 - axis] == n and y.shape[:2] == x.shape[:2]
        return (1 - axis, torch.arange(n)) if same else None
    if x.value is None or x.value.device.type == "meta":
        return None
    samples = _rows_of_inputs(x.value, mark, n)
    return None if samples is None else (0, samples)


def _rows_of_inputs(x: Tensor, mark: CallMark, n: int) -> Tensor | None:
    """The sample of each row of x, if every row is found among the rows of the model's inputs; None
    if some are not.
    """
    size, axis = x[0].numel(), mark.batch_axis
    pool = [
        t.movedim(axis, 0).reshape(-1, size)
        for t in mark.inputs
        if t.dim() > axis
        and t.shape[axis] == n
        and t.dtype == x.dtype
        and t.numel() % (n * size) == 0
    ]
    if not pool or (not x.is_floating_point() and x.numel() != sum(t.numel() for t in pool)):
        # numbers that merely count, such as positions, are found among tokens by chance
        return None
    samples = [torch.arange(n).repeat_interleave(len(t) // n) for t in pool]
    return _found_among(x.reshape(len(x), -1), torch.cat(pool), torch.cat(samples))


def _found_among(rows: Tensor, pool: Tensor, samples: Tensor) -> Tensor | None:
    """The sample of the row of the pool that each row is equal to, -1 where several samples have
    that row; None if a row is not among them. Rows are compared by one random combination.
    """
    generator = OwnGenerator.seeded()
    mix = torch.rand(rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    keys, order = (pool.to(torch.float64) * mix).sum(1).sort()
    samples = samples[order.cpu()]
    mine, slack = (rows.to(torch.float64) * mix).sum(1), 1e-12 * (1 + keys.abs())
    last = (torch.searchsorted(keys - slack, mine, right=True).clamp(max=len(keys)) - 1).cpu()
    first = torch.searchsorted(keys + slack, mine).cpu()
    if bool((first > last).any()):
        return None
    return torch.where(samples[first] == samples[last], samples[first], -1)


def _check_apart(sweep: Sweep, mark: CallMark, n: int) -> bool:
    """Whether sample i of the sweep is what was given to the model at place i, as far as first
    layers tell.

    Errors: `Coupled` if what was given at one place reaches the loss in two samples.
    """
    if sweep.n == 1:
        return True
    in_order, reached = True, torch.full((n,), -1)  # the sample that each place reaches
    for step, axis, samples in _evidence(sweep.graph, mark, n):
        state, shape = sweep.state[step.into[0]], sweep.shapes[step.into[0]]
        if state is None:
            return False
        if state.by_column:
            raise Coupled.at(describe(step, sweep.graph.paths))
        of = _along_axis(state, shape, axis)
        both_told = (of >= 0) & (samples[:, None] >= 0)
        place, sample = samples[:, None].expand(of.shape)[both_told], of[both_told]
        first_seen = reached[place] < 0
        reached[place[first_seen]] = sample[first_seen]
        if bool((reached[place] != sample).any()):
            raise Coupled.at(describe(step, sweep.graph.paths))
        in_order = in_order and bool((place == sample).all())
    return in_order


def _along_axis(state: SampleIndex, shape: tuple[int, ...], axis: int) -> Tensor:
    """Whose the entries on an edge of `shape` are, (shape[axis], all else that it depends on)."""
    if state.of is None:
        of = torch.arange(shape[0]) // (shape[0] // state.n)
    else:
        of = state.of.cpu()
    of = of.reshape(*of.shape, *[1] * (len(shape) - of.dim()))
    sizes = [shape[i] if i == axis else s for i, s in enumerate(of.shape)]
    return of.expand(sizes).movedim(axis, 0).flatten(1)


def _touched(graph: Graph, rows: int, mark: CallMark, n: int) -> Tensor | None:
    """The one sample that each row of the loss touches at the first layers, or None if a row
    touches none or several.
    """
    evidence = {e.step: e for e in _evidence(graph, mark, n) if bool((e.samples >= 0).all())}
    if not evidence or len(graph.roots) > 1 or graph.shapes[graph.roots[0]][:1] != (rows,):
        return None
    (root,) = graph.roots
    shape, dtype, device = graph.shapes[root], graph.dtypes[root], device_of(root)
    sweep = Sweep(graph, 1, {root: SampleIndex(1)})
    generator = OwnGenerator.seeded()
    cotangent = (torch.rand(shape, generator=generator) + 0.5).to(device, dtype)
    touched = torch.zeros(rows, n, dtype=torch.long, device=device)
    stride = 64
    for start in range(0, rows, stride):
        number = torch.arange(start, min(start + stride, rows), device=device)
        columns = cotangent.new_zeros(len(number), *shape)
        columns[number - start, number] = cotangent[number]
        for step, v in sweep.watch({root: columns}, len(number), list(evidence)):
            _, axis, samples = evidence[step]
            nonzero = (v != 0).movedim(axis + 1, 1).flatten(2).any(2).long()
            touched[number] += torch.zeros_like(touched[number]).index_add_(
                1, samples.to(device), nonzero
            )
    one_each = bool(((touched > 0).sum(1) == 1).all())
    return (touched > 0).int().argmax(1) if one_each else None
