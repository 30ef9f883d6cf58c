"""The plan of a sweep: whose the entries are on each edge, and what each unit does with columns;
decided before any walks.

Three ways in which columns can stand on an edge: plain (K, R, ...) with the samples in order along
axis 0; owned, in any other order, which names of nodes tell, or a probe finds out; explicit
(K * n, ...), one column for each sample, where an operand has no batch at all (a bare parameter).
The first two cost the same."""

from __future__ import annotations

import math

import torch

from nnj.errors import Coupled
from nnj.graph.builder import Graph
from nnj.graph.nodes import edge_shape
from nnj.graph.step import Step, describe
from nnj.jacobians.sample_index import SampleAxis, SampleIndex, is_cyclic
from nnj.propagation.sample_axes import broadcast_operand, carried
from nnj.recording.records import Edge, place_of


class Plan:
    """For each edge whose entries are whose, for each unit what it does with them.

    Args:
        graph: the units.
        n: the number of samples.
        owners: for each root edge, whose its entries are.
        cut: an operand beside the batch (the second of a product) has no samples, though layers lie
            behind it.
        probed: where it is not known which axis holds the samples, a broadcast operand need not be
            without samples: ask.
        bare: products with bare parameters have the samples in their rows, as layers have.

    Errors: `NNJError` if samples influence one another.
    """

    def __init__(
        self,
        graph: Graph,
        n: int,
        sample_indices: dict[Edge, SampleIndex],
        probed: bool = False,
        cut: bool = False,
        bare: bool = False,
    ):
        self.graph, self.n, self.probed, self.cut, self.bare = graph, n, probed, cut, bare
        self.plain, self.apart = SampleIndex(n), SampleIndex(n, by_column=True)
        self.state: dict[Edge, SampleIndex | None] = {}  # None: to be found by the probe
        # owners are the same if they are one
        self._by_axis: dict[tuple[SampleAxis, tuple[int, ...], torch.device], SampleIndex] = {}
        self.leaving: dict[tuple[Step, int], SampleIndex | None] = {}
        # operands without the batch: their share is summed for each sample
        self.reduced: set[tuple[Step, int]] = set()
        # bare parameters follow: walked with one column for each sample from here
        self.split: set[tuple[Step, int]] = set()
        self.by_column: set[Step] = set()  # units that are given one column for each sample
        for edge, sample_index in sample_indices.items():
            self._arrive(edge, self.apart if n == 1 else self._root(edge, sample_index))
        for step in graph.steps:
            self._plan(step)

    def _root(self, edge: Edge, sample_index: SampleIndex) -> SampleIndex:
        of = sample_index.of
        if of is None:
            return self.plain
        simple = of.numel() == len(of) and is_cyclic(of.flatten(), self.n)
        return self._along(edge, SampleAxis(0, 1)) if simple else sample_index

    def _along(self, edge: Edge, along: SampleAxis) -> SampleIndex:
        """The owner of an edge with the samples along one axis."""
        shape = edge_shape(edge)
        if along.axis == 0 and shape[0] == self.n * along.run:
            return self.plain
        key = along, shape, self._device(edge)
        if key not in self._by_axis:
            self._by_axis[key] = SampleIndex.by_axis(self.n, shape, along, key[2])
        return self._by_axis[key]

    def _axis(self, edge: Edge, sample_index: SampleIndex | None) -> SampleAxis | None:
        """Along which axis of an edge the samples are; None if that is not known, or not all there
        is to say.
        """
        return (
            SampleAxis(0, edge_shape(edge)[0] // self.n)
            if sample_index is self.plain
            else None
            if sample_index is None
            else sample_index.along
        )

    def _arrive(self, edge: Edge, sample_index: SampleIndex | None) -> None:
        if edge not in self.state:
            self.state[edge] = sample_index
            return
        there = self.state[edge]
        if (there is not None and there.by_column) != (
            sample_index is not None and sample_index.by_column
        ):
            step = self.graph.step_at(edge)
            if self._batch_behind(edge):
                raise Coupled.at(describe(step, self.graph.paths))
            self.state[edge] = self.apart
        elif there is not sample_index:
            self.state[edge] = None

    def _plan(self, step: Step) -> None:
        states = [self.state[e] for e in step.into]
        if any(s is not None and s.by_column for s in states) or (
            step.leaf is not None and step.leaf is not self.graph.batched
        ):
            self.by_column.add(step)
        whole = step in self.by_column
        if whole and self._on_the_batch(step):
            raise Coupled.at(describe(step, self.graph.paths))
        for i, edge in enumerate(step.out):
            if edge is None:
                continue
            leaving = self.apart if whole else self._leaving(step, i, edge, states)
            self.leaving[step, i] = leaving
            self._arrive(edge, leaving)

    def _on_the_batch(self, step: Step) -> bool:
        """Whether a record stands on what was given to the model, or a view of it."""
        if step.record is None or step.record.x.place is None or self.n == 1:
            return False
        storage, seen = step.record.x.place[0], math.prod(step.record.x.shape)
        given = [(t, mark.batch_axis) for mark in self.graph.marks for t in mark.inputs]
        return any(
            storage == place_of(t)[0]
            and t.numel() <= seen
            and t.dim() > axis
            and t.shape[axis] == self.n
            for t, axis in given
        )

    def _batch_behind(self, edge: Edge) -> bool:
        """Whether units with samples in their rows lie behind an edge, and not bare parameters
        alone.
        """
        step = self.graph.step_at(edge)
        return step.batch or step.batch_above or (self.bare and (step.bare or step.bare_above))

    def _reducible(self, step: Step, edge: Edge, along: SampleAxis | None) -> bool:
        axis = 0 if along is None else along.axis
        return len(step.into) == 1 and broadcast_operand(
            step.node, edge_shape(step.into[0]), edge_shape(edge), axis
        )

    def _carried(
        self, step: Step, i: int, edge: Edge, alongs: list[SampleAxis | None]
    ) -> SampleIndex | None:
        """Whose the entries of an operand are, if the names of nodes tell that."""
        found = set()
        for e, along in zip(step.into, alongs, strict=True):
            found.add(
                None
                if along is None
                else carried(step.node, i, edge_shape(e), edge_shape(edge), self.n, along)
            )
        (along, *others) = found
        return None if others or along is None else self._along(edge, along)

    def _leaving(
        self, step: Step, i: int, edge: Edge, states: list[SampleIndex | None]
    ) -> SampleIndex | None:
        """Whose the entries are that leave a unit on one edge; None if only a probe can say."""
        alongs = [
            self._axis(e, sample_index) for e, sample_index in zip(step.into, states, strict=True)
        ]
        along, known = alongs[0], None not in alongs
        if step.record is not None:
            rows = edge_shape(edge)[0]
            if along is None or along.axis > 0 or rows != edge_shape(step.into[0])[0]:
                return None
            return self._along(edge, along)
        if self._reducible(step, edge, along) and (
            known or not self.probed or not self._batch_behind(edge)
        ):
            self.reduced.add((step, i))
            return self.apart
        sample_index = self._carried(step, i, edge, alongs)
        if sample_index is not None:
            return sample_index
        if self._batch_behind(edge) and not (self.cut and known):
            return None
        self.split.add((step, i))
        return self.apart

    @staticmethod
    def _device(edge: Edge) -> torch.device:
        return edge[0]._input_metadata[edge[1]].device
