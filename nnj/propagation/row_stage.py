"""Columns are per row until rows mix.

The Hessian of a loss over tokens (or pixels) has a block for each of them. A sample of T tokens
needs T (C - 1) columns where its tokens have mixed, behind attention for instance. On the way,
through the head, norms and layers that take each token by itself, C - 1 columns serve all tokens: a
token is a sample there. A *row* here is one position of the axes that lead, all but the last few;
it holds whole blocks of H. So a sweep has two stages:

    rows      the steps that keep rows apart, from the loss on, with one sample for each row
    samples   all others, to which each column goes once for each row of a sample, zero at the
              entries of all other rows

Which steps keep rows apart (`row_search`) is told by the names of autograd's nodes, and by the rule
of a layer: it is asked for the same call with rows in the place of samples. Both are tried on
random numbers, once for each structure, before they are believed (`_keeps_apart`); where they are
not right, all steps are in the second stage. How columns go on from the first is in `row_packing`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from nnj.checks import being_traced
from nnj.generators import OwnGenerator
from nnj.graph.builder import Graph
from nnj.graph.step import Step
from nnj.jacobians.factor import Factor
from nnj.jacobians.sample_index import SampleIndex
from nnj.loss_hessian.base import LossHessian
from nnj.loss_hessian.column_selection import (
    AllColumns,
    ColumnSelection,
    PackedColumns,
    RaggedColumns,
)
from nnj.propagation.backward import Cotangents, Sink, Sweep, uses_of
from nnj.propagation.last_layer import walk_cost
from nnj.propagation.plan import NOTHING, Route, device_of
from nnj.propagation.row_index import (
    in_order,
    leading,
    view_of,
)
from nnj.propagation.row_packing import RowPacking, in_parts
from nnj.propagation.row_search import RowSearch
from nnj.propagation.trials import Trials, close
from nnj.propagation.verification import coarsest, signature
from nnj.recording.records import Edge


class RowSweep(Sweep):
    """The sweep of the first stage, to which each row is a sample.

    Args:
        whole: the sweep of all steps.
        start: the edge on which it begins.
        of: for each edge that it reaches, the row of each entry, of a shape that broadcasts.
        steps: its own, with the Jacobians of rows.
        rows: how many there are.
    """

    def __init__(
        self, whole: Sweep, start: Edge, of: dict[Edge, Tensor], steps: list[Step], rows: int
    ):
        self.graph: Graph = copy.copy(whole.graph)
        self.graph.steps, self.graph.roots = steps, [start]
        self.n, self.assume, self.shapes = rows, NOTHING, whole.shapes
        self.in_order, self.column_each = SampleIndex(rows), SampleIndex(rows, by_column=True)
        self.rows_of, self.by_column, self.hooks = of, set(), None
        self._rows = of[start]  # 0, 1, ...
        self._unchecked, self.state = {}, {edge: self._index(edge) for edge in of}
        self.routes = {step: [self._route_to(edge) for edge in step.out] for step in steps}
        self.uses, self.gathers, self._wholes = uses_of(steps), False, {}

    def _index(self, edge: Edge) -> SampleIndex:
        """That of cotangents with the leading axes as one."""
        of = self.rows_of[edge]
        if in_order(of, self._rows):
            return self.in_order
        seen = view_of(of, self._rows)
        key = None if seen is None else (self.n, "rows", *seen)
        flat = of.reshape(-1, *[1] * (of.dim() - leading(of)))
        return SampleIndex(self.n, flat, key=key)

    def _route_to(self, edge: Edge | None) -> Route | None:
        return None if edge is None else Route(self.state[edge], "together")

    def _record(
        self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents, use: Sink | None
    ) -> None:
        ((edge, v),) = arrived.items()
        assert step.record is not None
        lead = leading(self.rows_of[edge])
        v = v.to(step.dtype).flatten(1, lead)
        if use is not None:
            self._parameters(step, edge, v, use)
        if step.out[0] is not None:
            back = self.operator(step, "input").vjp(v)
            self._send(step, 0, back.reshape(len(v), *step.record.x.shape), values)


class RowStage:
    """Both stages of the sweep of one loss.

    Args:
        whole: the sweep of all steps, by sample.
        before: the steps from the loss to where rows begin, which only arrange entries.
        sweep: that of the first stage.
        hessian: of the loss.
        row: (R, D), the row of each block of H.
        sample: of each row, negative where it is nobody's.
    """

    def __init__(
        self,
        whole: Sweep,
        before: list[Step],
        sweep: RowSweep,
        hessian: LossHessian,
        row: Tensor,
        sample: Tensor,
    ):
        self.whole, self.before, self.sweep, self.sample = whole, before, sweep, sample
        self.root, self.start = whole.graph.roots[0], sweep.graph.roots[0]
        mine = {id(step.node) for step in (*before, *sweep.graph.steps)}
        self.behind = [step for step in whole.graph.steps if id(step.node) not in mine]
        self.of_loss, self.row = hessian, row
        by_row = None
        if row.numel() == hessian.rows * hessian.places and hessian.block == self._entries:
            by_row = hessian.at_rows(_block_of(row, sweep.n))
        self.by_row = by_row

    @property
    def _entries(self) -> int:
        """How many entries a row has where rows begin."""
        return math.prod(self.sweep.shapes[self.start]) // self.sweep.n

    @property
    def hessian(self) -> LossHessian:
        """H, with rows in the place of those of the loss where its structure can be so."""
        return self.of_loss if self.by_row is None else self.by_row

    @cached_property
    def _alive(self) -> Tensor:
        """The sample of each row in which H is not zero, (R,); behind the last for all others."""
        alive = self.of_loss.diagonal().sum(-1) > 0
        rows = torch.zeros(self.sweep.n, dtype=torch.bool, device=alive.device)
        rows = rows.index_put((self.row.flatten(),), alive.flatten(), accumulate=True)
        return torch.where(rows & (self.sample >= 0), self.sample, self.whole.n)

    def packing(self, counts: Tensor | None = None) -> RowPacking:
        """How columns of rows, each of which may have a number of its own, become those of
        samples.
        """
        return RowPacking(self._alive, self.whole.n, counts)

    def select(self, tol: float) -> ColumnSelection:
        """The exact columns of rows; `tol` as in `PackedColumns`."""
        if self.by_row is None:
            return PackedColumns(self.of_loss, self.row, tol)
        if not tol:
            return AllColumns(self.by_row)
        if not self.behind or being_traced():
            number = torch.arange(self.sweep.n, device=self.row.device)
            return PackedColumns(self.by_row, number, tol)
        ragged = RaggedColumns(self.by_row, tol)
        packed = ragged.as_packed()
        return ragged if self._cost(ragged) < self._cost(packed) else packed

    def _cost(self, selection: ColumnSelection) -> float:
        """Multiply-adds of both stages."""
        (size,) = self.packing(selection.counts).sizes([(0, selection.k)])
        first, later = walk_cost(self.sweep.graph.steps), walk_cost(self.behind)
        return selection.k * first + size * later

    @property
    def bytes_of_column(self) -> int:
        """What one column takes where it waits for the second stage."""
        used = {edge for step in self.sweep.graph.steps for edge in step.into}
        edges = self.sweep.state.keys() - used
        return sum(
            math.prod(self.sweep.shapes[e]) * self.sweep.graph.dtypes[e].itemsize for e in edges
        )

    def begun(self, selection: ColumnSelection, size: int) -> Iterator[Tensor]:
        """The columns of a selection where rows begin, at most `size` at a time."""
        for a in range(0, selection.k, size):
            yield self._begin(selection.columns(a, min(a + size, selection.k)))

    def _begin(self, columns: Tensor) -> Tensor:
        """(k, R, D, B) -> (k, *shape)."""
        (v,) = self.hessian.to_outputs(columns)
        if self.by_row is None:
            found = self.whole.run({self.root: v}, len(v), _nobody, self.before)
            v = found[self.start]
        return v.reshape(len(v), *self.sweep.shapes[self.start])

    def run(self, edge: Edge, v: Tensor, sink: Sink, steps: list[Step]) -> dict[Edge, Tensor]:
        """Let columns of rows go from an edge of the first stage through some of its steps.

        Returns: what goes on into the second stage.
        """
        v = v.reshape(len(v), *self.sweep.shapes[edge])
        return self.sweep.run({edge: v}, len(v), sink, steps)

    def chunks(
        self,
        arrived: dict[Edge, Tensor],
        packing: RowPacking,
        start: int,
        stop: int,
        total: int,
        size: int,
    ) -> Iterator[dict[Edge, Tensor]]:
        """What goes on of columns start to stop of rows, as `total` columns of samples, at most
        `size` at a time.
        """
        if not arrived:
            return
        for part in in_parts(packing.table(start, stop, total), size):
            yield {e: packing.spread(v, self.sweep.rows_of[e], part) for e, v in arrived.items()}


def _nobody(p: Tensor, factor: Factor) -> None:
    """A sink where no parameter is."""


def _block_of(row: Tensor, rows: int) -> Tensor:
    """The block of each row, -1 where it has none."""
    number = torch.arange(row.numel(), device=row.device)
    return torch.full((rows,), -1, device=row.device).index_put((row.flatten(),), number)


# -- which steps -----------------------------------------------------------------------------------


def row_stage(
    whole: Sweep,
    hessian: LossHessian,
    own: Iterable[Sequence[Tensor]],
    owner: nn.Module | None,
) -> RowStage | None:
    """The stages of a sweep; None where there is but one, since each sample has but one row, rows
    mix at once, or nothing is to be saved.

    Args:
        whole: the sweep of all steps.
        hessian: of the loss, all of whose outputs are on the only root.
        own: parameters that have results together, such as those of one module.
        owner: the model with which what was tried is forgotten.
    """
    graph = whole.graph
    one = len(graph.roots) == len(hessian.shapes) == 1
    if not one or whole.hooks is not None or hessian.rows * hessian.places <= whole.n:
        return None
    if tuple(hessian.shapes[0]) != whole.shapes[graph.roots[0]]:
        return None
    search = RowSearch(whole, hessian)
    found = search.rows()
    if found is None:
        return None
    row, sample = found
    steps = search.steps([tuple(together) for together in own])
    if not any(step.record is not None or step.bare for step in steps):
        return None
    sweep = RowSweep(whole, search.start, search.of, steps, search.count)
    stage = RowStage(whole, search.before, sweep, hessian, row, sample)
    return stage if _trusted(stage, owner) else None


# -- trying it -------------------------------------------------------------------------------------


_tried = Trials()


def _trusted(stage: RowStage, owner: nn.Module | None) -> bool:
    """Whether the first stage keeps rows apart; tried once for each structure."""
    key = (signature(stage.sweep), signature(stage.whole))
    rules = [s.record.entry for s in stage.sweep.graph.steps if s.record is not None]
    return _tried.answer(owner, key, rules, lambda: _keeps_apart(stage))


def _keeps_apart(stage: RowStage) -> bool:
    """A random cotangent on all rows gives what the whole sweep gives, and a random half of the
    rows nothing outside of it.
    """
    sweep, eps = stage.sweep, coarsest(stage.sweep) ** 0.5
    generator, shape = OwnGenerator.seeded(), sweep.shapes[stage.start]
    u = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    u = (u * (torch.rand(shape, generator=generator) - 0.5).sign()).to(
        device_of(stage.start), sweep.graph.dtypes[stage.start]
    )
    mine = torch.ones(sweep.n, dtype=torch.bool)
    mine[torch.randperm(sweep.n, generator=generator)[: sweep.n // 2]] = False
    mine = mine.to(u.device)
    half = u * mine[sweep.rows_of[stage.start]]
    factors: dict[Tensor, Factor] = {}
    try:
        left = sweep.run({stage.start: torch.stack([u, half])}, 2, factors.__setitem__)
    except Exception:  # of a rule, which was asked for a call that was never made
        return False
    names = {id(step.node) for step in sweep.graph.steps}
    same = [step for step in stage.whole.graph.steps if id(step.node) in names]
    others: dict[Tensor, Factor] = {}
    expected = stage.whole.run({stage.start: u[None]}, 1, others.__setitem__, same)
    if left.keys() != expected.keys() or factors.keys() != others.keys():
        return False
    for edge, v in left.items():
        inside = mine[sweep.rows_of[edge]]
        if not close(v[0], expected[edge][0], eps) or not close(v[1], v[0] * inside, eps):
            return False
    return all(_share_is_right(factor, others[p], mine, eps) for p, factor in factors.items())


def _share_is_right(factor: Factor, other: Factor, mine: Tensor, eps: float) -> bool:
    c = torch.zeros(2, factor.n, dtype=factor.dtype, device=factor.device)
    c[0] = 1
    whole = factor.rmatvec(c)
    ones = torch.ones(1, other.n, dtype=other.dtype, device=other.device)
    size = factor.square_sum().max().sqrt()
    if not close(whole, other.rmatvec(ones), eps, size):
        return False
    c.zero_()[1] = (~mine).to(c)
    return bool(factor.rmatvec(c).abs().max() <= eps * size)
