"""(J o J)^T m: a metric on the output goes back in one pass whatever its size, with the diagonal
alone kept between layers.

Within the last layer, the first one that the input meets, and each layer's own parameters nothing
is neglected: there rows of the identity meet rows of the metric, and their product is J^T M J'.
With a second point, J o J' stands in the place of J o J (`nnj.products.diagonal_steps`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from nnj.errors import NNJError
from nnj.graph.nodes import edge_dtype, own_task, sum_to
from nnj.graph.step import Step
from nnj.jacobians.factor import DenseFactor, Factor
from nnj.products.diagonal_steps import (
    DiagonalSweep,
    checkpoints_refused,
    input_edge,
    one_row_each,
    through,
    to_last_layer,
    unit_columns,
)
from nnj.products.metrics import dense_on_outputs
from nnj.propagation.backward import Cotangents
from nnj.propagation.linearize import Linearization, parameters_by_module
from nnj.recording.records import Edge


def pull_back(
    at: Linearization[DiagonalSweep],
    m: Tensor | None,
    to_diag: bool,
    other: Linearization[DiagonalSweep] | None = None,
) -> Any:
    """J^T M J' with only the diagonal kept between layers, J' being J at `other`: on the input
    (N, in, in) or its diagonal; on the parameters the list of blocks, or the diagonal (N, P)."""
    if at.sweep is None:
        return _zeros(at, to_diag)
    sweep = at.sweep
    if other is not None and other.sweep is not None:
        sweep = sweep.paired(other.sweep)
    kind = _ToDiagonal if to_diag else _ToInput if at.wrt == "input" else _ToBlocks
    return kind(at, sweep).run(m)


class _Pull:
    """One pass of a metric back from the output, J^T M J'; the classes below say what is kept of
    it.

    Args:
        at: the point.
        sweep: its steps, or these paired with another point's.
    """

    def __init__(self, at: Linearization[DiagonalSweep], sweep: DiagonalSweep):
        self.at, self.sweep = at, sweep

    def run(self, m: Tensor | None) -> Any:
        """J^T M J' for M on the output."""
        with checkpoints_refused():
            own_task(lambda: self._walk(m))
        return self.result()

    def _walk(self, m: Tensor | None) -> None:
        at, root, values, first = self.at, self.at.root, Cotangents(), 0
        assert root is not None
        if m is None or m.dim() == 2:
            diagonal = at.y.new_ones(at.n, at.out) if m is None else m
            values[root] = diagonal.reshape(1, at.n, *at.outputs).to(edge_dtype(root))
        else:
            first = self._enter(m, root, values)
        for step in self.sweep.graph.steps[first:]:
            for edge in step.into:
                if edge in values and self._meets(step, edge):
                    diagonal = values[edge]
                    eye = unit_columns(diagonal.shape[1:], diagonal.dtype, diagonal.device)
                    self.meet(step, edge, eye, eye * diagonal)
            self.sweep.cross(step, values, 1, self.take)

    def _enter(self, m: Tensor, root: Edge, values: Cotangents) -> int:
        """A full metric enters exactly: rows of the identity and of M go back to the last layer.
        Returns the number of the step to go on with.
        """
        at, points = self.at, (lambda step: step, self.sweep.partner)
        rows = [at.basis(), m.transpose(0, 1).reshape(at.out, at.n, *at.outputs)]
        number, edge, (left, right) = to_last_layer(self.sweep, root, points, rows)
        step = self.sweep.graph.steps[number]
        if step.record is None:
            if step.leaf is not None:
                self.meet_leaf(step, edge, left, right)
            values[edge] = _diagonal(left, right)
            return number
        self.meet_last(step, edge, left, right)
        if step.out[0] is not None:
            values[step.out[0]] = _diagonal(*self._sides(step, "input", left, right))
        return number + 1

    def _meets(self, step: Step, edge: Edge) -> bool:
        """Whether rows are wanted at a step, which has one for each sample then."""
        if not self.wants_rows(step):
            return False
        one_row_each(self.sweep, step, edge, "Use to_diag=True")
        return True

    def _sides(self, step: Step, slot: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Both rows through a layer, each at its point."""
        other = self.sweep.partner(step)
        return step.slots[slot].vjp(left), other.slots[slot].vjp(right)

    # -- what is kept of the pass ------------------------------------------------------------------

    def take(self, p: Tensor, squared: Factor) -> None:
        """The diagonal has come to a parameter, or to the input."""

    def wants_rows(self, step: Step) -> bool:
        """Whether rows of the identity and of the metric are to meet at a step."""
        return False

    def meet(self, step: Step, edge: Edge, left: Tensor, right: Tensor) -> None:
        """Rows of the identity and of the metric, (d, N, *shape) each, stand on an edge of a
        step.
        """

    def meet_last(self, step: Step, edge: Edge, left: Tensor, right: Tensor) -> None:
        """The same at the last layer, with all of the metric."""
        if self._meets(step, edge):
            self.meet(step, edge, left, right)

    def meet_leaf(self, step: Step, edge: Edge, left: Tensor, right: Tensor) -> None:
        """The same where no layer lies between the output and a leaf."""

    def result(self) -> Any:
        raise NotImplementedError


class _ToDiagonal(_Pull):
    """The diagonal over all that J is in, (N, in or P)."""

    def __init__(self, at: Linearization[DiagonalSweep], sweep: DiagonalSweep):
        super().__init__(at, sweep)
        self.diagonal = at.y.new_empty(at.n, at.size)
        self.parts = dict(zip(at.leaves, self.diagonal.split(at.leaf_sizes, 1), strict=True))
        self.written: set[Tensor] = set()

    @override
    def take(self, p: Tensor, squared: Factor) -> None:
        squared.write(self.parts[p][None], p in self.written)
        self.written.add(p)

    @override
    def meet_last(self, step: Step, edge: Edge, left: Tensor, right: Tensor) -> None:
        other = self.sweep.partner(step)
        for slot, p in step.params:
            sample_index = self.sweep.sample_index(edge, step)
            a = step.slots[slot].pullback(left, sample_index).dense()
            b = other.slots[slot].pullback(right, sample_index).dense()
            self.take(p, DenseFactor(_diagonal(a, b)))

    @override
    def result(self) -> Tensor:
        for p, part in self.parts.items():
            if p not in self.written:
                part.zero_()
        return self.diagonal


class _ToBlocks(_Pull):
    """The blocks of the parameters of modules, (N, P_l, P_l) each."""

    def __init__(self, at: Linearization[DiagonalSweep], sweep: DiagonalSweep):
        super().__init__(at, sweep)
        self.blocks = _zero_blocks(at)
        # of a parameter: which block, and where it begins
        self.places: dict[Tensor, tuple[int, int]] = {}
        for number, own in enumerate(parameters_by_module(at.module)):
            start = 0
            for p in own:
                self.places[p] = number, start
                start += p.numel()

    @override
    def wants_rows(self, step: Step) -> bool:
        if step.leaf is not None:
            raise NNJError(
                "diag_backprop keeps only the diagonal at a parameter that no layer with a rule "
                "owns. Use to_diag=True"
            )
        return step.record is not None and bool(step.params)

    @override
    def meet(self, step: Step, edge: Edge, left: Tensor, right: Tensor) -> None:
        sides = [
            [t.flatten(2).transpose(0, 1) for t in self._sides(step, slot, left, right)]
            for slot, _ in step.params
        ]
        for (_, p), (a, _) in zip(step.params, sides, strict=True):
            for (_, q), (_, b) in zip(step.params, sides, strict=True):
                (one, i), (two, j) = self.places[p], self.places[q]
                if one == two:  # a layer may use parameters of several modules
                    self.blocks[one][:, i : i + p.numel(), j : j + q.numel()] += a.mT @ b

    @override
    def result(self) -> Any:
        return self.blocks[0] if len(self.blocks) == 1 else self.blocks


class _ToInput(_Pull):
    """The matrix over the whole input, (N, in, in)."""

    def __init__(self, at: Linearization[DiagonalSweep], sweep: DiagonalSweep):
        super().__init__(at, sweep)
        self.full = at.y.new_zeros(at.n, at.size, at.size)
        self.input = input_edge(sweep, at)

    @override
    def run(self, m: Tensor | None) -> Tensor:
        if self.at.root == self.input:  # the model gives back what it was given
            return dense_on_outputs(m, self.at)
        found: Tensor = super().run(m)
        return found

    @override
    def wants_rows(self, step: Step) -> bool:
        return self.input in step.out

    @override
    def meet(self, step: Step, edge: Edge, left: Tensor, right: Tensor) -> None:
        if step.record is not None:
            self._add(*self._sides(step, "input", left, right))
        else:
            other = self.sweep.partner(step)
            self._add(self._node(step, step, edge, left), self._node(step, other, edge, right))

    @override
    def meet_leaf(self, step: Step, edge: Edge, left: Tensor, right: Tensor) -> None:
        one_row_each(self.sweep, step, edge, "Use to_diag=True")
        self._add(left, right)

    def _node(self, step: Step, there: Step, edge: Edge, t: Tensor) -> Tensor:
        """Columns at a raw node to the input, through the same step at another point."""
        shape = (self.at.n, *self.at.inputs)
        sent = zip(step.out, through(there, edge[1], t), strict=False)
        parts = [sum_to(b, shape, 1) for e, b in sent if e == self.input and b is not None]
        return torch.stack(parts).sum(0)

    def _add(self, left: Tensor, right: Tensor) -> None:
        a, b = (t.reshape(t.shape[0], self.at.n, -1).transpose(0, 1) for t in (left, right))
        self.full = self.full + a.mT @ b

    @override
    def result(self) -> Tensor:
        return self.full


def _diagonal(left: Tensor, right: Tensor) -> Tensor:
    """That of the product of rows, as one column."""
    return (left * right).sum(0, keepdim=True)


def _zero_blocks(at: Linearization[DiagonalSweep]) -> list[Tensor]:
    sizes = [sum(p.numel() for p in own) for own in parameters_by_module(at.module)]
    return [at.y.new_zeros(at.n, size, size) for size in sizes]


def _zeros(at: Linearization[DiagonalSweep], to_diag: bool) -> Any:
    """Where the output does not depend on what J is in."""
    if to_diag:
        return at.y.new_zeros(at.n, at.size)
    if at.wrt == "input":
        return at.y.new_zeros(at.n, at.size, at.size)
    blocks = _zero_blocks(at)
    return blocks[0] if len(blocks) == 1 else blocks
