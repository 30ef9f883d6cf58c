"""J M J^T with the diagonal alone between layers: the metric of the input or of the parameters goes
forward in one pass.

As in `nnj.products.diagonal_backward`, nothing is neglected within a layer: a full metric enters
the first layer, and the block of a layer's own parameters that layer, as it is; and the last layer
gives the full matrix, if that is asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from nnj.graph.nodes import edge_dtype, edge_shape, own_task, sum_to
from nnj.graph.step import Step
from nnj.products.diagonal_steps import (
    DiagonalSweep,
    checkpoints_refused,
    input_edge,
    one_row_each,
    through,
    to_last_layer,
    unit_columns,
)
from nnj.products.metrics import Checked, diagonal_of, is_diagonal, part_of
from nnj.propagation.forward import Forward
from nnj.propagation.linearize import Linearization
from nnj.propagation.plan import device_of
from nnj.recording.records import Edge

REMEDY = "Give a diagonal metric and use to_diag=True"


def push_forward(at: Linearization[DiagonalSweep], m: Checked, to_diag: bool) -> Tensor:
    """J M J^T, (N, out, out), or its diagonal (N, out), with only the diagonal kept between
    layers.
    """
    zero = at.y.new_zeros(at.n, at.out)
    if at.sweep is None or at.root is None:
        return zero if to_diag else zero.diag_embed()
    push = _Push(at, at.sweep, m)
    with checkpoints_refused():
        diagonal = push.run(at.by_leaf(diagonal_of(m, at, at.size)[None]), 1).get(at.root)
        if not to_diag:
            return own_task(push.last)
    return zero if diagonal is None else diagonal.reshape(at.n, -1)


class _Push(Forward):
    """The way forward of a diagonal; full metrics are taken exactly where they enter.

    Args:
        at: the point.
        sweep: its steps.
        m: the metric on what J is in.
    """

    def __init__(self, at: Linearization[DiagonalSweep], sweep: DiagonalSweep, m: Checked):
        super().__init__(sweep)
        self.at, self.m, self.full = at, m, not is_diagonal(m)
        self.input = input_edge(sweep, at) if at.wrt == "input" else None
        self.starts: dict[Tensor, int] = {}
        total = 0
        for p in at.params:
            self.starts[p], total = total, total + p.numel()
        self.seen: dict[Edge, Tensor] = {}  # the diagonal on each edge

    # -- where the metric enters -------------------------------------------------------------------

    def block(self, step: Step) -> Tensor:
        """The metric on the parameters of a layer, (N, P_l, P_l), in the order of `step.params`."""
        index = [
            i for _, p in step.params for i in range(self.starts[p], self.starts[p] + p.numel())
        ]
        return part_of(self.m, self.at, index)

    def rows(self, step: Step, left: Tensor) -> Tensor:
        """Rows of the Jacobian in a layer's parameters, (N, k, P_l), for columns
        (k, N, *outputs).
        """
        parts = [step.slots[slot].vjp(left).flatten(2) for slot, _ in step.params]
        return torch.cat(parts, -1).transpose(0, 1)

    @override
    def _record(
        self, step: Step, tangents: dict[Edge, Tensor], seeds: dict[Tensor, Tensor], k: int
    ) -> dict[Edge, Tensor]:
        (edge,) = step.into
        at_input = step.out[0] is not None and step.out[0] == self.input
        exact = self.full and (at_input or any(p in seeds for _, p in step.params))
        if not exact:
            return super()._record(step, tangents, seeds, k)
        one_row_each(self.sweep, step, edge, REMEDY)
        left = _unit_columns(edge)
        total = torch.zeros(1, *edge_shape(edge), dtype=edge_dtype(edge), device=left.device)
        if at_input:
            total = total + self._from_input(edge, step.slots["input"].vjp(left))
        else:
            below = super()._record(step, tangents, {}, k)
            total = total + below[edge] if edge in below else total
        if step.params:
            j = self.rows(step, left)
            total = total + ((j @ self.block(step)) * j).sum(-1).reshape(total.shape)
        return {edge: total}

    @override
    def _node(self, step: Step, tangents: dict[Edge, Tensor], k: int) -> dict[Edge, Tensor]:
        at_input = [i for i, e in enumerate(step.out) if e is not None and e == self.input]
        if not self.full or not at_input:
            return super()._node(step, tangents, k)
        # what else comes to this node does so as a diagonal
        outputs = super()._node(step, {e: t for e, t in tangents.items() if e != self.input}, k)
        for edge in step.into:
            one_row_each(self.sweep, step, edge, REMEDY)
            sent = through(step, edge[1], _unit_columns(edge))
            shape = (self.n, *self.at.inputs)
            parts = [sum_to(t, shape, 1) for t in (sent[i] for i in at_input) if t is not None]
            exact = self._from_input(edge, torch.stack(parts).sum(0))
            outputs[edge] = outputs[edge] + exact if edge in outputs else exact
        return outputs

    def _from_input(self, edge: Edge, rows: Tensor) -> Tensor:
        """diag(J M J^T) for rows (k, N, *inputs) of J, as a tangent on the edge."""
        j = rows.reshape(rows.shape[0], self.n, -1).transpose(0, 1)
        return ((j @ self._on_input()) * j).sum(-1).reshape(1, *edge_shape(edge))

    def _on_input(self) -> Tensor:
        """The full metric on the input."""
        assert isinstance(self.m, Tensor)
        return self.m

    @override
    def _arrived(self, edge: Edge, step: Step, t: Tensor) -> Tensor:
        self.seen[edge] = super()._arrived(edge, step, t)
        return self.seen[edge]

    # -- the last layer ----------------------------------------------------------------------------

    def last(self) -> Tensor:
        """The full matrix, (N, out, out): rows of the identity go back to the last layer, and meet
        there what has come.
        """
        root, stop = self.at.root, self.input if self.full else None
        assert root is not None
        number, edge, (left,) = to_last_layer(
            self.sweep, root, [lambda step: step], [self.at.basis()], stop
        )
        step = self.sweep.graph.steps[number]
        if stop is not None and edge == stop:
            return self._sandwich(left, self._on_input())
        if step.record is not None:
            return self._last_layer(step, left)
        return self._sandwich(left, self._there(step, edge))

    def _last_layer(self, step: Step, left: Tensor) -> Tensor:
        (edge,), below = step.into, step.out[0]
        one_row_each(self.sweep, step, edge, REMEDY)
        total = self.at.y.new_zeros(self.n, self.at.out, self.at.out)
        if below is not None:
            at_input = self.full and below == self.input
            m = self._on_input() if at_input else self._there(step, below)
            total = total + self._sandwich(step.slots["input"].vjp(left), m)
        if step.params:
            j = self.rows(step, left)
            total = total + j @ self.block(step) @ j.mT
        return total

    def _there(self, step: Step, edge: Edge) -> Tensor:
        """The diagonal that has come to an edge, (N, d)."""
        if edge not in self.seen:
            size = math.prod(edge_shape(edge)[1:])
            return torch.zeros(self.n, size, dtype=edge_dtype(edge), device=self.at.y.device)
        one_row_each(self.sweep, step, edge, REMEDY)
        return self.seen[edge].reshape(self.n, -1)

    def _sandwich(self, rows: Tensor, m: Tensor) -> Tensor:
        """J M J^T for rows (k, N, ...) of J."""
        j = rows.reshape(rows.shape[0], self.n, -1).transpose(0, 1)
        return (j @ m if m.dim() == 3 else j * m[:, None]) @ j.mT


def _unit_columns(edge: Edge) -> Tensor:
    """The unit columns (d, N, *shape) on an edge that has one row for each sample."""
    return unit_columns(edge_shape(edge), edge_dtype(edge), device_of(edge))
