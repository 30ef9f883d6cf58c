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
        owners: dict[Edge, SampleIndex],
        probed: bool = False,
        cut: bool = False,
        bare: bool = False,
    ):
        self.graph, self.n, self.probed, self.cut, self.bare = graph, n, probed, cut, bare
        self.plain, self.apart = SampleIndex(n), SampleIndex(n, explicit=True)
        self.state: dict[Edge, SampleIndex | None] = {}  # None: to be found by the probe
        # owners are the same if they are one
        self._by_axis: dict[tuple[SampleAxis, tuple[int, ...], torch.device], SampleIndex] = {}
        self.leaving: dict[tuple[Step, int], SampleIndex | None] = {}
        # operands without the batch: their share is summed for each sample
        self.reduced: set[tuple[Step, int]] = set()
        # bare parameters follow: walked with one column for each sample from here
        self.split: set[tuple[Step, int]] = set()
        self.explicit: set[Step] = set()  # units that are given one column for each sample
        for edge, owner in owners.items():
            self._arrive(edge, self.apart if n == 1 else self._root(edge, owner))
        for unit in graph.units:
            self._plan(unit)

    def _root(self, edge: Edge, owner: SampleIndex) -> SampleIndex:
        of = owner.of
        if of is None:
            return self.plain
        simple = of.numel() == len(of) and is_cyclic(of.flatten(), self.n)
        return self._along(edge, SampleAxis(0, 1)) if simple else owner

    def _along(self, edge: Edge, along: SampleAxis) -> SampleIndex:
        """The owner of an edge with the samples along one axis."""
        shape = edge_shape(edge)
        if along.axis == 0 and shape[0] == self.n * along.run:
            return self.plain
        key = along, shape, self._device(edge)
        if key not in self._by_axis:
            self._by_axis[key] = SampleIndex.by_axis(self.n, shape, along, key[2])
        return self._by_axis[key]

    def _axis(self, edge: Edge, owner: SampleIndex | None) -> SampleAxis | None:
        """Along which axis of an edge the samples are; None if that is not known, or not all there
        is to say.
        """
        return (
            SampleAxis(0, edge_shape(edge)[0] // self.n)
            if owner is self.plain
            else None
            if owner is None
            else owner.along
        )

    def _arrive(self, edge: Edge, owner: SampleIndex | None) -> None:
        if edge not in self.state:
            self.state[edge] = owner
            return
        there = self.state[edge]
        if (there is not None and there.explicit) != (owner is not None and owner.explicit):
            unit = self.graph._unit(edge)
            if self._batch_behind(edge):
                raise Coupled.at(describe(unit, self.graph.paths))
            self.state[edge] = self.apart
        elif there is not owner:
            self.state[edge] = None

    def _plan(self, unit: Step) -> None:
        states = [self.state[e] for e in unit.into]
        if any(s is not None and s.explicit for s in states) or (
            unit.leaf is not None and unit.leaf is not self.graph.batched
        ):
            self.explicit.add(unit)
        whole = unit in self.explicit
        if whole and self._on_the_batch(unit):
            raise Coupled.at(describe(unit, self.graph.paths))
        for i, edge in enumerate(unit.out):
            if edge is None:
                continue
            leaving = self.apart if whole else self._leaving(unit, i, edge, states)
            self.leaving[unit, i] = leaving
            self._arrive(edge, leaving)

    def _on_the_batch(self, unit: Step) -> bool:
        """Whether a record stands on what was given to the model, or a view of it."""
        if unit.record is None or unit.record.x.place is None or self.n == 1:
            return False
        storage, seen = unit.record.x.place[0], math.prod(unit.record.x.shape)
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
        unit = self.graph._unit(edge)
        return unit.batch or unit.batch_above or (self.bare and (unit.bare or unit.bare_above))

    def _reducible(self, unit: Step, edge: Edge, along: SampleAxis | None) -> bool:
        axis = 0 if along is None else along.axis
        return len(unit.into) == 1 and broadcast_operand(
            unit.node, edge_shape(unit.into[0]), edge_shape(edge), axis
        )

    def _carried(
        self, unit: Step, i: int, edge: Edge, alongs: list[SampleAxis | None]
    ) -> SampleIndex | None:
        """Whose the entries of an operand are, if the names of nodes tell that."""
        found = set()
        for e, along in zip(unit.into, alongs, strict=True):
            found.add(
                None
                if along is None
                else carried(unit.node, i, edge_shape(e), edge_shape(edge), self.n, along)
            )
        (along, *others) = found
        return None if others or along is None else self._along(edge, along)

    def _leaving(
        self, unit: Step, i: int, edge: Edge, states: list[SampleIndex | None]
    ) -> SampleIndex | None:
        """Whose the entries are that leave a unit on one edge; None if only a probe can say."""
        alongs = [self._axis(e, owner) for e, owner in zip(unit.into, states, strict=True)]
        along, known = alongs[0], None not in alongs
        if unit.record is not None:
            rows = edge_shape(edge)[0]
            if along is None or along.axis > 0 or rows != edge_shape(unit.into[0])[0]:
                return None
            return self._along(edge, along)
        if self._reducible(unit, edge, along) and (
            known or not self.probed or not self._batch_behind(edge)
        ):
            self.reduced.add((unit, i))
            return self.apart
        owner = self._carried(unit, i, edge, alongs)
        if owner is not None:
            return owner
        if self._batch_behind(edge) and not (self.cut and known):
            return None
        self.split.add((unit, i))
        return self.apart

    @staticmethod
    def _device(edge: Edge) -> torch.device:
        return edge[0]._input_metadata[edge[1]].device
