"""J M J^T with the diagonal alone between layers: the metric of the input or of the parameters goes
forward in one pass.

As in `nnj.products.diagonal_backward`, nothing is neglected within a layer: a full metric enters
the first layer, and the block of a layer's own parameters that layer, as it is; and the last layer
gives the full matrix, if that is asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnj.graph.nodes import edge_dtype, edge_shape, own_task, sum_to
from nnj.graph.step import Step
from nnj.products.diagonal_backward import DiagonalSweep, nearest, one_row_each, through
from nnj.propagation.forward import Forward
from nnj.propagation.linearize import Linearization
from nnj.recording.records import Edge

REMEDY = "Give a diagonal metric and use to_diag=True"


class _Push(Forward):
    """The forward walk of a diagonal; full metrics are taken exactly where they enter.

    Args:
        at: the point.
        m: None, a diagonal (N, d), a full metric (N, d, d), or blocks [(positions, (N, P_l, P_l)),
            …].
    """

    def __init__(self, at: Linearization, m: Any):
        assert isinstance(at.sweep, DiagonalSweep)
        super().__init__(at.sweep)
        self.at, self.m = at, m
        self.whole = isinstance(m, list) or (m is not None and m.dim() == 3)
        self.near = nearest(at.sweep, at) if at.wrt == "input" else None
        self.starts: dict[int, int] = {}
        total = 0
        for p in at.params:
            self.starts[id(p)], total = total, total + p.numel()
        self.seen: dict[Edge, Tensor] = {}

    def diagonal(self) -> Tensor:
        """The diagonal of the metric, (N, d)."""
        at, m = self.at, self.m
        if m is None:
            return at.y.new_ones(at.n, at.size)
        if not isinstance(m, list):
            return m if m.dim() == 2 else m.diagonal(dim1=1, dim2=2)
        found = at.y.new_zeros(at.n, at.size)
        for index, block in m:
            found[:, index] = block.diagonal(dim1=1, dim2=2)
        return found

    def seeds(self) -> dict[int, Tensor]:
        """The diagonal at the leaves."""
        at, d = self.at, self.diagonal()
        if at.wrt == "input":
            return {id(at.x): d.reshape(1, at.n, *at.inputs)}
        return {
            id(p): t.reshape(1, at.n, *p.shape)
            for p, t in zip(at.params, d.split(at.sizes, 1), strict=True)
        }

    def block(self, step: Step) -> Tensor:
        """The metric on the parameters of a layer, (N, P_l, P_l), in the order of `unit.params`."""
        index = [
            i
            for _, p in step.params
            for i in range(self.starts[id(p)], self.starts[id(p)] + p.numel())
        ]
        if not self.whole:
            return self.diagonal()[:, index].diag_embed()
        if not isinstance(self.m, list):
            return self.m[:, torch.tensor(index)[:, None], index]
        found = self.at.y.new_zeros(self.at.n, len(index), len(index))
        for positions, block in self.m:
            place = {i: k for k, i in enumerate(positions)}
            here = [(k, place[i]) for k, i in enumerate(index) if i in place]
            mine, theirs = (
                torch.tensor([k for k, _ in here], dtype=torch.long),
                [i for _, i in here],
            )
            found[:, mine[:, None], mine] = block[
                :, torch.tensor(theirs, dtype=torch.long)[:, None], theirs
            ]
        return found

    def rows(self, step: Step, left: Tensor) -> Tensor:
        """Rows of the Jacobian in a layer's parameters, (N, k, P_l), for columns
        (k, N, *outputs).
        """
        return torch.cat(
            [step.slots[s].vjp(left).flatten(2) for s, _ in step.params], -1
        ).transpose(0, 1)

    def _record(
        self, step: Step, tangents: dict[Edge, Tensor], seeds: dict[int, Tensor], k: int
    ) -> dict[Edge, Tensor]:
        (edge,) = step.into
        at_input = step.out[0] is not None and step.out[0] == self.near
        exact = self.whole and (at_input or any(id(p) in seeds for _, p in step.params))
        if not exact:
            return super()._record(step, tangents, seeds, k)
        one_row_each(self.sweep, step, edge, REMEDY)
        left = _eye(edge)
        total = torch.zeros(1, *edge_shape(edge), dtype=edge_dtype(edge), device=left.device)
        if at_input:
            total = total + self._out(edge, step.slots["input"].vjp(left), self.m)
        else:
            found = super()._record(step, tangents, {}, k)
            total = total + found[edge] if edge in found else total
        if step.params:
            j = self.rows(step, left)
            total = total + ((j @ self.block(step)) * j).sum(-1).reshape(total.shape)
        return {edge: total}

    def _node(self, step: Step, tangents: dict[Edge, Tensor], k: int) -> dict[Edge, Tensor]:
        mine = [i for i, e in enumerate(step.out) if e is not None and e == self.near]
        if not self.whole or not mine:
            return super()._node(step, tangents, k)
        held = tangents.pop(self.near) if self.near in tangents else None
        found = super()._node(step, tangents, k)
        if held is not None and self.near is not None:
            tangents[self.near] = held
        for edge in step.into:
            one_row_each(self.sweep, step, edge, REMEDY)
            parts = [through(step, i, edge[1], _eye(edge)) for i in mine]
            rows = torch.stack(
                [sum_to(t, (self.n, *self.at.inputs), 1) for t in parts if t is not None]
            ).sum(0)
            exact = self._out(edge, rows, self.m)
            found[edge] = found[edge] + exact if edge in found else exact
        return found

    def _out(self, edge: Edge, rows: Tensor, m: Tensor) -> Tensor:
        """diag(J M J^T) for rows (k, N, *inputs) of J, as a tangent on the edge."""
        j = rows.reshape(rows.shape[0], self.n, -1).transpose(0, 1)
        return ((j @ m) * j).sum(-1).reshape(1, *edge_shape(edge))

    def _at(self, edge: Edge, step: Step, t: Tensor) -> Tensor:
        self.seen[edge] = super()._at(edge, step, t)
        return self.seen[edge]

    # -- the last layer ----------------------------------------------------------------------------

    def last(self) -> Tensor:
        """The full matrix, (N, out, out): rows of the identity walk back to the last layer, and
        meet there what has come.
        """
        at = self.at
        edge, left = at.root, at.basis()
        assert edge is not None
        for step in self.sweep.graph.steps:
            if edge == self.near and self.whole:
                return self._sandwich(left, self.m)
            if step.record is not None:
                return self._through_record(step, left)
            outs = [(i, e) for i, e in enumerate(step.out) if e is not None]
            plain = len(outs) == 1 and len(step.into) == 1 and step not in self.sweep.by_column
            if not plain or (step, outs[0][0]) in self.sweep.reduced | self.sweep.split:
                break
            number, after = outs[0]
            back = through(step, number, edge[1], left)
            if back is None or tuple(back.shape[1:]) != edge_shape(after):
                break
            edge, left = after, back
        return self._sandwich(left, self._there(step, edge))

    def _there(self, step: Step, edge: Edge) -> Tensor:
        """The diagonal on an edge, (N, d)."""
        if edge not in self.seen:
            return torch.zeros(
                self.n,
                math.prod(edge_shape(edge)[1:]),
                dtype=edge_dtype(edge),
                device=self.at.y.device,
            )
        one_row_each(self.sweep, step, edge, REMEDY)
        return self.seen[edge].reshape(self.n, -1)

    def _through_record(self, step: Step, left: Tensor) -> Tensor:
        (edge,) = step.into
        one_row_each(self.sweep, step, edge, REMEDY)
        total = self.at.y.new_zeros(self.n, self.at.out, self.at.out)
        below = step.out[0]
        if below is not None:
            m = self.m if below == self.near and self.whole else self._there(step, below)
            total = total + self._sandwich(step.slots["input"].vjp(left), m)
        if step.params:
            j = self.rows(step, left)
            total = total + j @ self.block(step) @ j.mT
        return total

    def _sandwich(self, rows: Tensor, m: Tensor) -> Tensor:
        j = rows.reshape(rows.shape[0], self.n, -1).transpose(0, 1)
        return (j @ m if m.dim() == 3 else j * m[:, None]) @ j.mT


def _eye(edge: Edge) -> Tensor:
    """The unit columns (d, N, *shape) on an edge that has one row for each sample."""
    n, *shape = edge_shape(edge)
    d = math.prod(shape)
    eye = torch.eye(d, dtype=edge_dtype(edge), device=edge[0]._input_metadata[edge[1]].device)
    return eye.reshape(d, 1, *shape).expand(d, n, *shape)


def forward(at: Linearization, m: Any, to_diag: bool) -> Tensor:
    """J M J^T, (N, out, out), or its diagonal (N, out), with only the diagonal kept between
    layers.
    """
    zero = at.y.new_zeros(at.n, at.out)
    if at.sweep is None or at.root is None:
        return zero if to_diag else zero.diag_embed()
    push = _Push(at, m)
    found = push.run(push.seeds(), 1).get(at.root)
    if not to_diag:
        return own_task(push.last)
    return zero if found is None else found.reshape(at.n, -1)
