"""From the samples of a model's outputs to those of what a loss is given: through the glue between,
such as a view, a permutation, a mask, a `cat`.

Where the names of nodes do not tell, tangents that hold the bits of the samples' numbers go forward
through the glue alone. Samples that come together in one entry are taken together."""

from __future__ import annotations

import torch
from torch import Tensor

from nnj.errors import Coupled
from nnj.graph.builder import Graph
from nnj.graph.step import Step
from nnj.jacobians.sample_index import SampleAxis, SampleIndex
from nnj.propagation.backward import Sweep
from nnj.propagation.forward import Forward
from nnj.propagation.outputs import Outputs, Reading
from nnj.propagation.plan import device_of
from nnj.propagation.probe import Probe, filled
from nnj.propagation.sample_axes import carried
from nnj.recording.records import Edge

ENTRIES = 1 << 28  # of a table of samples and entries of a loss's arguments, at most
Found = tuple[dict[Edge, SampleIndex], Tensor | None]
STRIDE = 64  # samples that are asked at a time


class Glue:
    """What lies between a loss and the outputs of a model.

    Args:
        outputs: those that are met first.

    Attributes:
        steps: in topological order.
        ends: the roots that lead to something wanted.
    """

    def __init__(self, outputs: Outputs):
        self.graph, self.outputs, self.steps = outputs.graph, outputs, outputs.glue
        reached = {edge for step in self.graph.steps for edge in step.into}
        self._last: tuple[Reading, Found] | None = None
        self.ends = [root for root in self.graph.roots if root in reached]

    def roots(self, reading: Reading) -> Found:
        """Whose the entries of each root are that leads to something wanted, and of each sample the
        number of the group with which it is taken together; None if each is by itself.

        Errors: `Coupled` where there are too many to tell.
        """
        if self._last is None or self._last[0] is not reading:
            self._last = reading, self._roots(reading)
        return self._last[1]

    def _roots(self, reading: Reading) -> Found:
        found: dict[Edge, SampleIndex] = {}
        for root in self.ends:
            index = reading.at.get(root)
            if index is None and reading.n > 1:
                index = self._by_name(root, reading)
            if index is None and reading.n > 1:
                return self._asked(reading)
            found[root] = SampleIndex(1) if index is None else index
        return found, None

    # -- by the names of nodes ---------------------------------------------------------------------

    def _by_name(self, root: Edge, reading: Reading) -> SampleIndex | None:
        """That of a root of which the names of nodes say along which axis the samples are, as they
        are in the outputs.
        """
        shape, n = self.graph.shapes[root], reading.n
        if root in self.outputs.marks or any(
            index.of is not None and index.along is None for index in reading.at.values()
        ):
            return None
        leading = self._leading(reading)
        for axis, size in enumerate(shape):
            for run in dict.fromkeys((size // n, 1)) if size % n == 0 and size else ():
                along = SampleAxis(axis, run)
                if self._leads(root, along, reading, leading):
                    return SampleIndex.by_axis(n, shape, along, device_of(root))
        return None

    def _leading(self, reading: Reading) -> set[Step]:
        """The steps of the glue that lead to outputs with samples."""
        found: set[Step] = set()
        for step in reversed(self.steps):
            if any(
                e is not None and (e in reading.at or self.graph.step_at(e) in found)
                for e in step.out
            ):
                found.add(step)
        return found

    def _leads(self, root: Edge, along: SampleAxis, reading: Reading, leading: set[Step]) -> bool:
        """Whether samples along an axis of a root are, behind the glue, those of the outputs."""
        graph, at = self.graph, {root: along}
        met = False
        for step in self.steps:
            arrived = {edge: at[edge] for edge in step.into if edge in at}
            for i, below in enumerate(step.out if arrived else ()):
                if below is None or not (below in reading.at or graph.step_at(below) in leading):
                    continue
                axes = {
                    _carried(graph, step, i, edge, below, reading.n, axis)
                    for edge, axis in arrived.items()
                }
                (axis, *others) = axes
                if axis is None or others or at.setdefault(below, axis) != axis:
                    return False
                if below in reading.at:
                    met = True
                    if axis != _axis(reading.at[below], graph.shapes[below]):
                        return False
        return met

    # -- by numbers --------------------------------------------------------------------------------

    def _asked(self, reading: Reading) -> Found:
        """As `Probe`, forward, and a bit of the numbers at a time."""
        forward = Forward(Sweep(self.graph, 1, dict.fromkeys(self.graph.roots, SampleIndex(1))))
        open_roots = [root for root in self.ends if root not in reading.at]
        if any(len(self.graph.shapes[root]) == 0 for root in open_roots):
            return self._together(reading, forward)
        number: dict[Edge, Tensor] = {}
        for bit in range(Probe(reading.n).bits):
            seen = self._bit(bit, reading, forward)
            for root in open_roots:
                if root not in seen:  # it depends on no sample
                    return self._together(reading, forward)
                one, zero = seen[root]
                if bool((one & zero).any()):
                    return self._together(reading, forward)
                so_far = number.get(root, torch.zeros((), dtype=torch.long, device=one.device))
                # an entry that no sample touched is nobody's
                told = (one | zero) & (so_far >= 0)
                number[root] = torch.where(told, so_far + (one.long() << bit), -1)
        return {
            root: reading.at[root]
            if root in reading.at
            else SampleIndex(reading.n, filled(number[root])).tidy()
            for root in self.ends
        }, None

    def _bit(
        self, bit: int, reading: Reading, forward: Forward
    ) -> dict[Edge, tuple[Tensor, Tensor]]:
        """Which entries of the roots depend on samples whose number has a bit, and which on others.

        Two random tangents, since an entry is nobody's only if it is zero for each.
        """
        probe, found = Probe(reading.n), dict[Edge, tuple[Tensor, Tensor]]()
        for _ in range(probe.DRAWS):
            seeds = {}
            for edge, index in reading.at.items():
                shape = self.graph.shapes[edge]
                u = probe.cotangent(shape, self._like(edge))
                of = entries_of(index, shape, u.device)
                has = (of >> bit) & 1 == 1
                seeds[edge] = torch.stack([u * (has & (of >= 0)), u * (~has & (of >= 0))])
            for root, there in forward.through(self.steps, seeds, 2).items():
                one, zero = found.get(root, (False, False))
                found[root] = one | (there[0] != 0), zero | (there[1] != 0)
        return found

    def _like(self, edge: Edge) -> Tensor:
        return torch.empty((), dtype=self.graph.dtypes[edge], device=device_of(edge))

    def _together(self, reading: Reading, forward: Forward) -> Found:
        """Groups of samples that come together in entries of the roots."""
        graph, n = self.graph, reading.n
        size = sum(torch.Size(graph.shapes[root]).numel() for root in self.ends)
        if size * n > ENTRIES:
            raise Coupled.at("what the loss is given")
        touched = {root: self._touched(root, reading, forward) for root in self.ends}
        sets = torch.cat([t.flatten(1) for t in touched.values()], 1)
        group = linked(sets)
        found = {}
        for root, t in touched.items():
            of = torch.where(t, group.reshape(-1, *[1] * (t.dim() - 1)), -1).amax(0)
            groups = int(group.max()) + 1
            found[root] = SampleIndex(groups, of).tidy() if groups > 1 else SampleIndex(1)
        return found, group

    def _touched(self, root: Edge, reading: Reading, forward: Forward) -> Tensor:
        """(n, *shape): whether an entry of a root depends on a sample; one that depends on no
        output does on all of them.
        """
        shape, parts = self.graph.shapes[root], []
        for start in range(0, reading.n, STRIDE):
            samples = torch.arange(start, min(start + STRIDE, reading.n), device=device_of(root))
            seeds = {
                edge: self._of_samples(edge, index, samples) for edge, index in reading.at.items()
            }
            there = seeds.get(root)
            if there is None:
                there = forward.through(self.steps, seeds, len(samples)).get(root)
            if there is None or not shape:
                there = torch.ones(len(samples), *shape, device=device_of(root))
            parts.append(there != 0)
        return torch.cat(parts)

    def _of_samples(self, edge: Edge, index: SampleIndex, samples: Tensor) -> Tensor:
        """A random tangent of an output on the entries of each of some samples alone."""
        shape = self.graph.shapes[edge]
        u = Probe(index.n).cotangent(shape, self._like(edge))
        of = entries_of(index, shape, u.device)
        return u * (of == samples.to(u.device).reshape(-1, *[1] * len(shape)))


def _carried(
    graph: Graph, step: Step, i: int, edge: Edge, below: Edge, n: int, axis: SampleAxis
) -> SampleAxis | None:
    """Along which axis of operand i of a step samples are; a layer with a rule takes rows apart."""
    out, into = graph.shapes[edge], graph.shapes[below]
    if step.record is not None:
        return axis if axis.axis == 0 and into[0] == out[0] else None
    return carried(step.node, i, out, into, n, axis)


def _axis(index: SampleIndex, shape: tuple[int, ...]) -> SampleAxis | None:
    return SampleAxis(0, shape[0] // index.n) if index.of is None else index.along


def entries_of(index: SampleIndex, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The sample of each entry of a tensor, as what broadcasts to its shape."""
    if index.of is not None:
        return index.of.reshape(*index.of.shape, *[1] * (len(shape) - index.of.dim()))
    if not shape:
        return torch.zeros((), dtype=torch.long, device=device)
    of = torch.arange(shape[0], device=device) // (shape[0] // index.n)
    return of.reshape(-1, *[1] * (len(shape) - 1))


def linked(sets: Tensor) -> Tensor:
    """The numbers, from 0 on, of the groups of samples that have a set in common: (n,).

    Args:
        sets: (n, sets), whether a sample is in a set.
    """
    n = len(sets)
    number = torch.arange(n, device=sets.device)
    while True:
        of_set = torch.where(sets, number[:, None], n).amin(0)
        lowest = torch.minimum(number, torch.where(sets, of_set, n).amin(1))
        if torch.equal(lowest, number):
            break
        number = lowest
    group: Tensor = number.unique(return_inverse=True)[1]
    return group
