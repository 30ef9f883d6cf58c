"""Evidence of first layers: whose their rows are, told by what the user gave to the model, as it
was given or in another order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnj.errors import Coupled
from nnj.generators import OwnGenerator
from nnj.graph.builder import Graph
from nnj.graph.step import Step, describe
from nnj.jacobians.sample_index import SampleAxis, SampleIndex
from nnj.propagation.backward import Sweep
from nnj.propagation.plan import device_of
from nnj.recording.records import CallMark, Edge, Record, storage_of


class Evidence(NamedTuple):
    """Whose the rows of a first layer are.

    Attributes:
        axis: of its input and output, along which they are.
        found: the samples along it, -1 where it cannot be told; None where they are all of them, in
            order.
        n: how many samples there are.
    """

    step: Step
    axis: int
    found: Tensor | None
    n: int

    @property
    def samples(self) -> Tensor:
        return torch.arange(self.n) if self.found is None else self.found

    @property
    def told(self) -> bool:
        """Whether it is known of every row."""
        return self.found is None or bool((self.found >= 0).all())


def evidence_of(graph: Graph, mark: CallMark, n: int) -> list[Evidence]:
    """What is known of layers on what the user gave to the model: as it was given, or rows of it in
    another order.
    """
    evidence = []
    for step in graph.steps:
        record = step.record
        if record is not None and record.edge is None and step.params:
            seen = _at_first_layer(record, mark, n)
            if seen is not None:
                evidence.append(Evidence(step, *seen, n))
    return evidence


def _at_first_layer(record: Record, mark: CallMark, n: int) -> tuple[int, Tensor | None] | None:
    """An axis of a first layer's input and output, and whose the rows along it are."""
    axis, x, y = mark.batch_axis, record.x, record.y
    if x.storage in [storage_of(t) for t in mark.inputs]:
        same = len(x.shape) > axis and x.shape[axis] == n
        same = same and y.shape[: axis + 1] == x.shape[: axis + 1]
        return (axis, None) if same else None
    if axis < 2 and any(
        t.dim() > 1 and x.storage == storage_of(t.transpose(0, 1)) for t in mark.inputs
    ):
        same = x.shape[1 - axis] == n and y.shape[:2] == x.shape[:2]
        return (1 - axis, None) if same else None
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


def check_apart(sweep: Sweep, mark: CallMark, n: int) -> bool:
    """Whether sample i of the sweep is what was given to the model at place i, as far as first
    layers tell.

    Errors: `Coupled` if what was given at one place reaches the loss in two samples.
    """
    if sweep.n == 1:
        return True
    evidence = evidence_of(sweep.graph, mark, n)
    if all(
        e.found is None and sweep.axis_of(e.step.into[0]) == SampleAxis(e.axis, 1) for e in evidence
    ):
        return True
    in_order, reached = True, torch.full((n,), -1)  # the sample that each place reaches
    for step, axis, samples in ((e.step, e.axis, e.samples) for e in evidence):
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


def touched(graph: Graph, edge: Edge, mark: CallMark, n: int) -> Tensor | None:
    """The one sample that each row on an edge touches at the first layers, or None if a row touches
    none or several.
    """
    known = {e.step: e for e in evidence_of(graph, mark, n) if e.told}
    shape, dtype, device = graph.shapes[edge], graph.dtypes[edge], device_of(edge)
    if not known or not shape:
        return None
    sweep = Sweep(graph, 1, dict.fromkeys(graph.roots, SampleIndex(1)))
    generator = OwnGenerator.seeded()
    cotangent = (torch.rand(shape, generator=generator) + 0.5).to(device, dtype)
    rows = shape[0]
    found = torch.zeros(rows, n, dtype=torch.long, device=device)
    stride = 64
    for start in range(0, rows, stride):
        number = torch.arange(start, min(start + stride, rows), device=device)
        columns = cotangent.new_zeros(len(number), *shape)
        columns[number - start, number] = cotangent[number]
        for step, v in sweep.watch({edge: columns}, len(number), list(known)):
            nonzero = (v != 0).movedim(known[step].axis + 1, 1).flatten(2).any(2).long()
            found[number] += torch.zeros_like(found[number]).index_add_(
                1, known[step].samples.to(device), nonzero
            )
    one_each = bool(((found > 0).sum(1) == 1).all())
    return (found > 0).int().argmax(1) if one_each else None
