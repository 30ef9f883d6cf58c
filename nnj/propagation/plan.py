"""The plan of a sweep: how columns stand on each edge and how they cross each step, decided before
any column moves.

Every entry on an edge belongs to one sample, and what is of two samples may never be added up
before a quantity has squared it. So what matters on each edge is whose its entries are. There are
three ways in which K columns can stand there:

in order    (K, R, ...): axis 0 of the tensor holds the n samples one after the other, R / n rows
            each. So it is in most models, on most edges.
by index    (K, R, ...): in any other arrangement, sequence-first for instance. A `SampleIndex` says
            whose each entry is; the names of autograd's nodes tell it (`sample_axes`), or else the
            numbers do (`Probe`).
by column   (K * n, ...): the tensor has no samples at all, as a bare parameter has none. Then each
            column is that of one sample.

The first two cost the same. The third costs n times as much, so it begins as late as it can, where
nothing but bare parameters lies behind. A step sends columns to an operand in one of three ways:

together    as they stand: what the node gives for an entry of one sample is of that sample alone.
summed      the operand is broadcast along the samples (a bias that is added), and the node's answer
            not yet summed to its shape: it is summed for each sample apart, and stands by column.
split       the node itself would add up the samples (x^T v of a matrix product): each column goes
            in once for each sample, zero at the entries of all others, and stands by column."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from nnj.errors import Coupled, NNJError
from nnj.graph.builder import Graph
from nnj.graph.step import Step, describe
from nnj.jacobians.sample_index import SampleAxis, SampleIndex, is_cyclic
from nnj.propagation.sample_axes import broadcast_operand, carried
from nnj.recording.records import Edge, storage_of


@dataclass(eq=False, slots=True)
class Route:
    """How columns go from a step to one of its operands.

    Attributes:
        index: how they stand when they leave the step; None if only a probe can say.
        way: how the step is asked for them.
    """

    index: SampleIndex | None
    way: Literal["together", "summed", "split"]


class Assumptions(NamedTuple):
    """What a plan takes for granted where the names of nodes leave it open.

    Attributes:
        probed: where it is not known which axis holds the samples, an operand that is broadcast
            along the first one may have samples all the same: let the probe say.
        cut: an operand beside the batch (the second of a product) has no samples, though layers lie
            behind it.
        bare: products with bare parameters have the samples in their rows, as layers have.
    """

    probed: bool = False
    cut: bool = False
    bare: bool = False


NOTHING = Assumptions()


class Plan:
    """For each edge how columns stand there, for each step how they cross it.

    Args:
        graph: the steps.
        n: the number of samples.
        sample_indices: for each root edge, whose its entries are.
        assume: what is taken for granted.
        outputs: the same for edges of the model's outputs, behind what the loss is given; so what
            lies between need not be known.

    Attributes:
        state: how columns stand on each edge; None where the probe has to find it.
        routes: for each step a route to each operand, None to those that nobody needs.
        by_column: the steps to which columns come by column.

    Errors: `NNJError` if samples influence one another.
    """

    def __init__(
        self,
        graph: Graph,
        n: int,
        sample_indices: dict[Edge, SampleIndex],
        assume: Assumptions = NOTHING,
        outputs: dict[Edge, SampleIndex] | None = None,
    ):
        self.graph, self.n, self.assume = graph, n, assume
        self.shapes = graph.shapes
        # one object each, so that "the same way" is "the same object"
        self.in_order, self.column_each = SampleIndex(n), SampleIndex(n, by_column=True)
        self._each_alone = Route(self.column_each, "together")
        self._by_axis: dict[tuple[SampleAxis, tuple[int, ...], torch.device], SampleIndex] = {}
        self.state: dict[Edge, SampleIndex | None] = {}
        self.routes: dict[Step, list[Route | None]] = {}
        self.by_column: set[Step] = set()
        given = {} if n == 1 else outputs or {}
        self._outputs = {edge: self._given(edge, index) for edge, index in given.items()}
        self._before = self._leading_to_outputs()
        for edge, index in sample_indices.items():
            there = self.column_each if n == 1 else self._outputs.get(edge)
            self._arrive(edge, self._given(edge, index) if there is None else there)
        for step in graph.steps:
            self._plan(step)

    def _given(self, edge: Edge, sample_index: SampleIndex) -> SampleIndex:
        """What is known of an edge, as one object each."""
        of, along = sample_index.of, sample_index.along
        if of is None:
            return self.in_order
        if along is None and of.numel() == len(of) and is_cyclic(of.flatten(), self.n):
            along = SampleAxis(0, 1)
        return sample_index if along is None else self._along(edge, along)

    def _leading_to_outputs(self) -> set[Step]:
        """The steps behind which outputs are whose samples are known."""
        found: set[Step] = set()
        for step in reversed(self.graph.steps if self._outputs else []):
            for e in step.out:
                if e is not None and (e in self._outputs or self.graph.step_at(e) in found):
                    found.add(step)
        return found

    # -- edges -------------------------------------------------------------------------------------

    def _along(self, edge: Edge, along: SampleAxis) -> SampleIndex:
        """That of an edge with the samples along one axis."""
        shape = self.shapes[edge]
        if along.axis == 0 and shape[0] == self.n * along.run:
            return self.in_order
        key = along, shape, device_of(edge)
        if key not in self._by_axis:
            self._by_axis[key] = SampleIndex.by_axis(self.n, shape, along, key[2])
        return self._by_axis[key]

    def axis_of(self, edge: Edge) -> SampleAxis | None:
        """Along which axis of an edge the samples are; None if that is not known, or not all there
        is to say.
        """
        sample_index = self.state[edge]
        if sample_index is self.in_order:
            return SampleAxis(0, self.shapes[edge][0] // self.n)
        return None if sample_index is None else sample_index.along

    def _arrive(self, edge: Edge, sample_index: SampleIndex | None) -> None:
        """Note how columns come to an edge, to which others may come, too."""
        if edge not in self.state:
            self.state[edge] = sample_index
            return
        there = self.state[edge]
        if there is sample_index:
            return
        if _by_column(there) == _by_column(sample_index):
            self.state[edge] = None
            return
        # an operand that has samples in one use and none in the other
        if self._batch_behind(edge):
            raise Coupled.at(describe(self.graph.step_at(edge), self.graph.paths))
        self.state[edge] = self.column_each

    def _batch_behind(self, edge: Edge) -> bool:
        """Whether steps with samples in their rows lie behind an edge, and not bare parameters
        alone.
        """
        step = self.graph.step_at(edge)
        return (
            step.batch
            or step.batch_above
            or (self.assume.bare and (step.bare or step.bare_above))
            or step in self._before
        )

    def split_at(self, step: Step, i: int) -> SampleIndex | None:
        """By which sample index the columns for operand i are split as they reach its edge, as
        others come there by column; None if none do, or these as well.

        Errors: `NNJError` where it is not known whose they are.
        """
        edge, route = step.out[i], self.routes[step][i]
        there = None if edge is None else self.state[edge]
        if route is None or there is None or not there.by_column:
            return None
        if route.index is None:
            raise NNJError(
                "nnj could not find out whose the rows behind "
                f"{describe(step, self.graph.paths)} are"
            )
        return None if route.index.by_column else route.index

    # -- steps -------------------------------------------------------------------------------------

    def _plan(self, step: Step) -> None:
        by_column = step.leaf is not None and step.leaf is not self.graph.batched
        for edge in step.into:
            there = self.state[edge]
            by_column = by_column or (there is not None and there.by_column)
        if by_column:
            self.by_column.add(step)
            if self._on_the_batch(step):
                raise Coupled.at(describe(step, self.graph.paths))
        routes: list[Route | None] = []
        for i, below in enumerate(step.out):
            route = None
            if below is not None:
                route = self._each_alone if by_column else self._route(step, i, below)
                self._arrive(below, route.index)
            routes.append(route)
        self.routes[step] = routes

    def _on_the_batch(self, step: Step) -> bool:
        """Whether a record stands on what was given to the model, or a view of it."""
        if step.record is None or step.record.x.storage is None or self.n == 1:
            return False
        storage, seen = step.record.x.storage[0], math.prod(step.record.x.shape)
        given = [(t, mark.batch_axis) for mark in self.graph.marks for t in mark.inputs]
        return any(
            storage == storage_of(t)[0]
            and t.numel() <= seen
            and t.dim() > axis
            and t.shape[axis] == self.n
            for t, axis in given
        )

    def _route(self, step: Step, i: int, edge: Edge) -> Route:
        """To an operand of a step whose columns do not come by column."""
        if edge in self._outputs:
            return Route(self._outputs[edge], "together")
        axes = [self.axis_of(e) for e in step.into]
        if step.record is not None:
            return Route(self._behind_record(step, edge, axes[0]), "together")
        axes_known = None not in axes
        probed = self.assume.probed or self.graph.step_at(edge) in self._before
        if self._broadcast(step, edge, axes[0]) and (
            axes_known or not probed or not self._batch_behind(edge)
        ):
            return Route(self.column_each, "summed")
        sample_index = self._carried(step, i, edge, axes)
        if sample_index is not None:
            return Route(sample_index, "together")
        if self._batch_behind(edge) and not (self.assume.cut and axes_known):
            return Route(None, "together")
        return Route(self.column_each, "split")

    def _broadcast(self, step: Step, edge: Edge, axis: SampleAxis | None) -> bool:
        """Whether an operand is broadcast along the samples; where they are not known, along the
        first axis.
        """
        return len(step.into) == 1 and broadcast_operand(
            step.node,
            self.shapes[step.into[0]],
            self.shapes[edge],
            0 if axis is None else axis.axis,
        )

    def _behind_record(self, step: Step, edge: Edge, axis: SampleAxis | None) -> SampleIndex | None:
        """A layer with a rule takes rows apart: what is along axis 0 of its output is so in its
        input.
        """
        if axis is None or axis.axis > 0 or self.shapes[edge][0] != self.shapes[step.into[0]][0]:
            return None
        return self._along(edge, axis)

    def _carried(
        self, step: Step, i: int, edge: Edge, axes: list[SampleAxis | None]
    ) -> SampleIndex | None:
        """Whose the entries of an operand are, if the names of nodes tell it, and the same from
        each output.
        """
        carried_to = {
            None
            if axis is None
            else carried(step.node, i, self.shapes[e], self.shapes[edge], self.n, axis)
            for e, axis in zip(step.into, axes, strict=True)
        }
        (axis, *others) = carried_to
        return None if others or axis is None else self._along(edge, axis)


def _by_column(sample_index: SampleIndex | None) -> bool:
    return sample_index is not None and sample_index.by_column


def device_of(edge: Edge) -> torch.device:
    """The device of the tensor on an edge."""
    result: torch.device = edge[0]._input_metadata[edge[1]].device
    return result
