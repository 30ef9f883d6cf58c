"""(J o J)^T m: a metric of which only the diagonal is kept between layers, in one pass whatever the
size of the output.

This is the approximation that the original nnj calls diag_backprop: (J2 J1)o2 is not J2o2 J1o2, so
what is neglected is how the inputs of a layer vary together, and how the uses of one tensor do.
Within the last layer, the first one that the input meets, and each layer's own parameters nothing
is neglected. With a second point, J o J' stands in the place of J o J."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from nnj.errors import NNJError
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import edge_dtype, edge_shape, own_task, sum_to
from nnj.graph.squared import squared_backward
from nnj.graph.step import Step, describe
from nnj.jacobians.factor import DenseFactor, Factor
from nnj.jacobians.jacobian import Jacobian
from nnj.propagation.backward import Sweep
from nnj.propagation.cotangents import Cotangents
from nnj.propagation.linearize import Linearization, parameters_by_module
from nnj.recording.records import Edge


class DiagonalSweep(Sweep):
    """The sweep with J o J in the place of J: what walks is the diagonal of a metric,
    (1, N, *shape).
    """

    def __init__(self, *args: Any, **options: Any):
        self.made: dict[tuple[Step, str], Jacobian] = {}
        self.partners: dict[Step, Step] = {}
        self.probing = False
        super().__init__(*args, **options)

    def paired(self, other: DiagonalSweep) -> DiagonalSweep:
        """The same with J o J', J' being J at another point. Errors: `NNJError` if the model takes
        another way there.
        """
        sweep = copy.copy(self)
        sweep.made, mine, theirs = {}, self.graph.steps, other.graph.steps
        same = len(mine) == len(theirs) and all(
            _alike(a, b) for a, b in zip(mine, theirs, strict=True)
        )
        sweep.partners = dict(zip(mine, theirs, strict=True)) if same else {}
        if not same or any(
            sweep.partners.get(self.graph.step_at(a)) is not other.graph.step_at(b)
            for one, two in sweep.partners.items()
            for a, b in zip(one.out, two.out, strict=True)
            if a is not None and b is not None
        ):
            raise NNJError(
                "the model does other operations at x1 than at x2, so diag_backprop has no mixed "
                "term there. Leave out diag_backprop"
            )
        return sweep

    def partner(self, step: Step) -> Step:
        """The unit at the other point."""
        return self.partners.get(step, step)

    def operator(self, step: Step, slot: str) -> Jacobian:
        if (step, slot) not in self.made:
            j, other = step.slots[slot], self.partner(step).slots[slot]
            self.made[step, slot] = j.square() if j is other else j.times(other)
        return self.made[step, slot]

    def backward(self, step: Step, args: list[Tensor | None], k: int) -> list[Tensor | None]:
        if self.probing:
            return call_node(step.node, args, k)
        return squared_backward(step, args, k, self.graph.paths, self.partners.get(step))

    def _find_sample_indices(self, roots: dict[Edge, Any]) -> None:
        self.probing = True
        try:
            super()._find_sample_indices(roots)
        finally:
            self.probing = False


def _alike(a: Step, b: Step) -> bool:
    """Whether two units do the same at two points."""
    same = a.record.module is b.record.module if a.record and b.record else a.record is b.record
    shapes = [edge_shape(e) for e in a.into] == [edge_shape(e) for e in b.into]
    ways = [e is None for e in a.out] == [e is None for e in b.out]
    return same and a.name == b.name and shapes and ways and (a.leaf is None) == (b.leaf is None)


class _Walk:
    """One backward pass of a metric on the output, (J^T M J')."""

    def __init__(self, at: Linearization, sweep: DiagonalSweep, to_diag: bool):
        self.at, self.sweep, self.to_diag = at, sweep, to_diag
        self.diagonal = at.y.new_empty(at.n, at.size if to_diag else 0)
        holders = [at.x] if at.wrt == "input" else at.params
        sizes = [at.size] if at.wrt == "input" else at.sizes
        self.parts = (
            {id(p): t for p, t in zip(holders, self.diagonal.split(sizes, 1), strict=True)}
            if to_diag
            else {}
        )
        self.written: set[int] = set()
        self.blocks: list[Tensor] = []
        # of a parameter: which block, and where it begins
        self.places: dict[int, tuple[int, int]] = {}
        for number, own in enumerate(
            parameters_by_module(at.module) if at.wrt == "weight" and not to_diag else []
        ):
            size = 0
            for p in own:
                self.places[id(p)] = number, size
                size += p.numel()
            self.blocks.append(at.y.new_zeros(at.n, size, size))
        self.near = nearest(sweep, at) if at.wrt == "input" and not to_diag else None
        self.full = at.y.new_zeros(at.n, at.size, at.size) if self.near is not None else None

    def add(self, p: Tensor, found: Factor) -> None:
        if self.to_diag:
            found.write(self.parts[id(p)], id(p) in self.written)
            self.written.add(id(p))

    def run(self, m: Tensor | None) -> None:
        try:
            own_task(lambda: self._run(m))
        except CheckpointError as error:
            raise NNJError(
                "diag_backprop cannot go on at torch.utils.checkpoint, whose tensors may be read "
                "only once in a pass. Leave out the checkpoint, or diag_backprop"
            ) from error
        for key, part in self.parts.items():
            if key not in self.written:
                part.zero_()

    def _run(self, m: Tensor | None) -> None:
        at, root = self.at, self.at.root
        assert root is not None
        if self.near == root:
            self.full = (
                torch.eye(at.out, dtype=at.y.dtype, device=at.y.device).expand(at.n, -1, -1)
                if m is None
                else (m.diag_embed() if m.dim() == 2 else m)
            )
            return
        values = Cotangents()
        steps = list(self.sweep.graph.steps)
        if m is None or m.dim() == 2:
            start = at.y.new_ones(at.n, at.out) if m is None else m
            values[root] = start.reshape(1, at.n, *at.outputs).to(edge_dtype(root))
        else:
            steps = self._head(m, steps, root, values)
        for step in steps:
            arrived = [e for e in step.into if e in values]
            if arrived and not self.to_diag:
                self._exactly(step, arrived, values)
            self.sweep._walk_step(step, values, 1, self.add)

    def _exactly(self, step: Step, arrived: list[Edge], values: Cotangents) -> None:
        """Blocks of a layer's parameters, and of the input at the first layer, from the diagonal
        that has arrived.
        """
        if step.leaf is not None and self.at.wrt == "weight":
            raise NNJError(
                "diag_backprop keeps only the diagonal at a parameter that no layer with a rule "
                "owns. Use to_diag=True"
            )
        if step.record is not None and step.params:
            self._block(step, *_columns(values[arrived[0]]))
        if self.near is None or (
            self.near not in step.out and not (step.leaf is not None and self.near in step.into)
        ):
            return
        for edge in arrived:
            self._first(step, edge, *_columns(values[edge]))

    def _head(self, m: Tensor, steps: list[Step], root: Edge, values: Cotangents) -> list[Step]:
        """A full metric enters exactly: rows of the identity and of M walk as columns down to the
        last layer.
        """
        at, edge = self.at, root
        left = at.basis()
        right = m.transpose(0, 1).reshape(at.out, at.n, *at.outputs)
        for i, step in enumerate(steps):
            outs = [(i, e) for i, e in enumerate(step.out) if e is not None]
            if step.record is not None:
                self._exact(step, left, right, values)
                return steps[i + 1 :]
            plain = len(outs) == 1 and len(step.into) == 1 and step not in self.sweep.by_column
            if step.leaf is not None and self.near is not None:
                self._first(step, edge, left, right)
            if not plain or (step, outs[0][0]) in self.sweep.reduced | self.sweep.split:
                values[edge] = (left * right).sum(0, keepdim=True)
                return steps[i:]
            number, after = outs[0]
            pair = [
                through(u, number, edge[1], t)
                for u, t in ((step, left), (self.sweep.partner(step), right))
            ]
            if pair[0] is None or pair[1] is None or tuple(pair[0].shape[1:]) != edge_shape(after):
                values[edge] = (left * right).sum(0, keepdim=True)
                return steps[i:]
            left, right = pair[0], pair[1]
            edge = after
        return []

    def _exact(self, step: Step, left: Tensor, right: Tensor, values: Cotangents) -> None:
        """The last layer: diag(J^T M J'), or the block of its parameters, with all of M."""
        (edge,) = step.into
        other = self.sweep.partner(step)
        if step.params and not self.to_diag:
            self._block(step, left, right)
        for slot, p in step.params if self.to_diag else []:
            sample_index = self.sweep._sample_index(edge, step)
            a, b = (
                u.slots[slot].pullback(t, sample_index).dense()
                for u, t in ((step, left), (other, right))
            )
            self.add(p, DenseFactor((a * b).sum(0, keepdim=True)))
        out = step.out[0]
        if out is not None:
            if self.near == out:
                self._first(step, edge, left, right)
            a, b = step.slots["input"].vjp(left), other.slots["input"].vjp(right)
            values[out] = (a * b).sum(0, keepdim=True)

    def _first(self, step: Step, edge: Edge, left: Tensor, right: Tensor) -> None:
        """J^T M J' of the first layer, over the whole input: what arrives at a unit that the input
        feeds.
        """
        one_row_each(self.sweep, step, edge, "Use to_diag=True")
        a, b = left, right
        if step.leaf is None:
            a, b = (
                self._into(u, edge, t) for u, t in ((step, left), (self.sweep.partner(step), right))
            )
        a, b = (t.reshape(t.shape[0], self.at.n, -1).transpose(0, 1) for t in (a, b))
        assert self.full is not None
        self.full = self.full + a.mT @ b

    def _into(self, step: Step, edge: Edge, t: Tensor) -> Tensor:
        """Columns through a unit to the input."""
        if step.record is not None:
            return step.slots["input"].vjp(t)
        args: list[Tensor | None] = [None] * len(step.node._input_metadata)
        args[edge[1]] = t
        found = call_node(step.node, args, t.shape[0])
        parts = [
            f for f, e in zip(found, step.out, strict=False) if e == self.near and f is not None
        ]
        return torch.stack([sum_to(f, (self.at.n, *self.at.inputs), 1) for f in parts]).sum(0)

    def _block(self, step: Step, left: Tensor, right: Tensor) -> None:
        """J^T M J' over a layer's own parameters, from rows of the identity and of M."""
        assert step.record is not None
        (edge,) = step.into
        one_row_each(self.sweep, step, edge, "Use to_diag=True")
        sides = [
            [u.slots[s].vjp(t).flatten(2).transpose(0, 1) for s, _ in step.params]
            for u, t in ((step, left), (self.sweep.partner(step), right))
        ]
        for (_, p), a in zip(step.params, sides[0], strict=True):
            for (_, q), b in zip(step.params, sides[1], strict=True):
                (one, i), (two, j) = self.places[id(p)], self.places[id(q)]
                if one == two:
                    self.blocks[one][:, i : i + p.numel(), j : j + q.numel()] += a.mT @ b


def one_row_each(sweep: Sweep, step: Step, edge: Edge, remedy: str) -> None:
    """Errors: `NNJError` unless a unit has one row for each sample, in order."""
    sample_index = sweep._sample_index(edge, step)
    if (
        sample_index.of is not None
        or (sample_index.by_column and sweep.n > 1)
        or edge_shape(edge)[0] != sweep.n
    ):
        raise NNJError(
            "diag_backprop takes full matrices only where a layer has one row for each sample, "
            f"which {describe(step, sweep.graph.paths)} has not. {remedy}"
        )


def through(step: Step, number: int, nr: int, t: Tensor) -> Tensor | None:
    """Columns at output nr of a raw node, sent to its operand `number`."""
    args: list[Tensor | None] = [None] * len(step.node._input_metadata)
    args[nr] = t
    return call_node(step.node, args, t.shape[0])[number]


def _columns(m: Tensor) -> tuple[Tensor, Tensor]:
    """A diagonal (1, N, *shape) as rows of the identity, and the same times the diagonal."""
    shape = m.shape[1:]
    d = math.prod(shape[1:])
    eye = torch.eye(d, dtype=m.dtype, device=m.device).reshape(d, 1, *shape[1:]).expand(d, *shape)
    return eye, eye * m


def _zeros(at: Linearization, size: int) -> Tensor:
    return at.y.new_zeros(at.n, size)


def nearest(sweep: Sweep, at: Linearization) -> Edge | None:
    """The edge on which the model takes its input: behind the view that keeps the leaf from being
    written over.
    """
    steps = sweep.graph.steps
    leaf = next((u for u in steps if u.leaf is at.x), None)
    views = [u for u in steps if leaf is not None and leaf.into[0] in u.out]
    if leaf is None:
        return None
    return (
        views[0].into[0] if len(views) == 1 and views[0].name in ("View", "Alias") else leaf.into[0]
    )


def backward(
    at: Linearization, m: Tensor | None, to_diag: bool, other: Linearization | None = None
) -> Any:
    """J^T M J' with only the diagonal kept between layers, J' being J at `other`: on the input
    (N, in, in) or its diagonal; on the parameters the list of blocks, or the diagonal (N, P)."""
    sweep = at.sweep
    if sweep is not None and other is not None and other.sweep is not None:
        assert isinstance(sweep, DiagonalSweep) and isinstance(other.sweep, DiagonalSweep)
        sweep = sweep.paired(other.sweep)
    walk = None
    if isinstance(sweep, DiagonalSweep):
        walk = _Walk(at, sweep, to_diag)
        walk.run(m)
    if to_diag:
        return _zeros(at, at.size) if walk is None else walk.diagonal
    if at.wrt == "input":
        return (
            at.y.new_zeros(at.n, at.size, at.size)
            if walk is None or walk.full is None
            else walk.full
        )
    sizes = [sum(p.numel() for p in own) for own in parameters_by_module(at.module)]
    blocks = [at.y.new_zeros(at.n, size, size) for size in sizes] if walk is None else walk.blocks
    return blocks[0] if len(blocks) == 1 else blocks
