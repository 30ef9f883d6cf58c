"""Columns are per row until rows mix.

The Hessian of a loss over tokens (or pixels) has a block for each of them. A sample of T tokens
needs T (C - 1) columns where its tokens have mixed, behind attention for instance. On the way,
through the head, norms and layers that take each token by itself, C - 1 columns serve all tokens: a
token is a sample there. A *row* here is one position of the axes that lead, all but the last few;
it holds whole blocks of H. So a sweep has two stages:

    rows      the steps that keep rows apart, from the loss on, with one sample for each row
    samples   all others, to which each column goes once for each row of a sample, zero at the
              entries of all other rows

Which steps keep rows apart is told by the names of autograd's nodes, and by the rule of a layer: it
is asked for the same call with rows in the place of samples. Both are tried on random numbers, once
for each structure, before they are believed (`_keeps_apart`); where they are not right, all steps
are in the second stage.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from nnj.checks import being_traced
from nnj.errors import NNJError
from nnj.generators import OwnGenerator
from nnj.graph.builder import Graph
from nnj.graph.step import Step
from nnj.jacobians.factor import Factor
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.sample_index import SampleIndex
from nnj.loss_hessian.base import LossHessian
from nnj.loss_hessian.column_selection import (
    AllColumns,
    ColumnSelection,
    PackedColumns,
    RaggedColumns,
)
from nnj.propagation.backward import Cotangents, Sink, Sweep, uses_of
from nnj.propagation.glue import entries_of
from nnj.propagation.last_layer import walk_cost
from nnj.propagation.plan import NOTHING, Route, device_of
from nnj.propagation.row_index import (
    ARRANGING,
    arranged,
    behind,
    in_order,
    leading,
    same,
    view_of,
)
from nnj.propagation.row_packing import RowPacking, in_parts
from nnj.propagation.trials import Trials, close
from nnj.propagation.verification import KEPT, coarsest, signature
from nnj.recording.records import Edge
from nnj.registry.layer_rules import Declined, ask_rule


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
    search = _Search(whole, hessian)
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


_rows_of_blocks: dict[Hashable, Tensor | None] = {}  # by layout: nothing is asked twice


class _Search:
    """Goes over the steps of a sweep, from the loss on.

    Attributes:
        before: the steps that only arrange the outputs of the loss.
        start: the edge behind them.
        count: how many rows there are.
        of: of each edge of the first stage, the row of each entry.
    """

    def __init__(self, whole: Sweep, hessian: LossHessian):
        self.whole, self.graph, self.hessian = whole, whole.graph, hessian
        self.start, self.before = self.graph.roots[0], list[Step]()
        self.count, self.of = 0, dict[Edge, Tensor]()

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """The row of each block of H, (R, D), and the sample of each row."""
        block = self._to_start()
        index, shape = self.whole.state.get(self.start), self.whole.shapes[self.start]
        if index is None or index.by_column:
            return None
        lead = min(leading(block), len(shape) - 1)
        while lead > 0:
            found = self._row_of_blocks(block, shape, lead)
            if found is not None:
                break
            lead -= 1
        self.count = math.prod(shape[:lead])
        sample = entries_of(index, shape, block.device)
        if lead == 0 or self.count <= self.whole.n or leading(sample) > lead:
            return None
        of = torch.arange(self.count, device=block.device)
        self.of[self.start] = of.reshape(*shape[:lead], *[1] * (len(shape) - lead))
        ones = [1] * (len(shape) - lead)
        assert found is not None
        return found, sample.expand(*shape[:lead], *ones).flatten()

    def _to_start(self) -> Tensor:
        """Go behind the steps that only arrange the outputs of the loss: the index of blocks of H
        there.
        """
        block = self._blocks = self.hessian.block_index()
        for step in self.graph.steps:
            out = step.out[0] if len(step.out) == 1 else None
            if out is None or step.into != [self.start]:
                break
            if step.record is not None or step.name not in ARRANGING or self._meets(step, out):
                break
            shapes = self.whole.shapes
            behind_it = arranged(step.node, block, shapes[self.start], shapes[out])
            if behind_it is None:
                break
            block, self.start = behind_it, out
            self.before.append(step)
        return block

    def _meets(self, step: Step, edge: Edge) -> bool:
        """Whether something else comes to an edge, too, or to another output of its node."""
        return len(self.graph.step_at(edge).into) > 1 or any(
            edge in other.out for other in self.graph.steps if other is not step
        )

    def _row_of_blocks(self, block: Tensor, shape: tuple[int, ...], lead: int) -> Tensor | None:
        """The row of each block, (R, D), where a row is one position of the leading axes; None
        where a block has entries in several rows, or none.
        """
        h, count = self.hessian, math.prod(shape[:lead])
        seen, layout = view_of(block, self._blocks), h.layout()
        key = None if seen is None or layout is None else (layout, *seen, shape, lead, block.device)
        if key is not None and key in _rows_of_blocks:
            return _rows_of_blocks[key]
        found = self._asked_row_of_blocks(block, shape, lead, count)
        if key is not None:
            if len(_rows_of_blocks) >= KEPT:
                _rows_of_blocks.clear()
            _rows_of_blocks[key] = found
        return found

    def _asked_row_of_blocks(
        self, block: Tensor, shape: tuple[int, ...], lead: int, count: int
    ) -> Tensor | None:
        h = self.hessian
        sizes = zip(shape[lead:], block.shape[lead:], strict=True)
        rest = [there if size > 1 else 1 for there, size in sizes]
        of = block.expand(*shape[:lead], *rest).reshape(count, -1)
        there = of >= 0
        row = torch.arange(count, device=of.device)[:, None].expand_as(of)
        first = torch.full((h.rows * h.places,), -1, device=of.device)
        found = first.index_put((of[there],), row[there])
        if bool((found < 0).any()) or not torch.equal(found[of[there]], row[there]):
            return None
        return found.reshape(h.rows, h.places)

    # -- steps that keep rows apart ----------------------------------------------------------------

    def steps(self, together: list[tuple[Tensor, ...]]) -> list[Step]:
        """Those of the first stage, with the Jacobians of rows; what stands at a parameter, or at
        several that belong together, comes from one stage.
        """
        begin, refused = self.of[self.start], set[Step]()
        while True:
            self.of = {self.start: begin}
            found = self._apart(refused)
            late = self._used_later(found, together)
            if not late:
                return list(found.values())
            refused |= late

    def _apart(self, refused: set[Step]) -> dict[Step, Step]:
        """The steps that keep rows apart, and what they are in the first stage."""
        found, mixed = dict[Step, Step](), set[Edge]()
        skipped = set(self.before)
        for step in self.graph.steps:
            if step in skipped:
                continue
            after = None
            if step not in refused and self.of.keys() - mixed >= set(step.into):
                after = self._crossed(step)
            if after is None:
                mixed.update(e for e in step.out if e is not None)
                continue
            found[step], there = after
            for edge, of in there.items():
                known = self.of.setdefault(edge, of)
                if not same(known, of):
                    mixed.add(edge)
        return found

    def _used_later(self, found: dict[Step, Step], together: list[tuple[Tensor, ...]]) -> set[Step]:
        """Steps of the first stage with a parameter that another one reaches, too, or one that
        belongs to it.
        """
        late = {
            p
            for step in self.graph.steps
            if step not in found
            for p in (step.leaf, *(p for _, p in step.params))
            if p is not None
        }
        for group in together:
            if not late.isdisjoint(group):
                late.update(group)
        return {step for step in found if any(p in late for _, p in step.params)}

    def _crossed(self, step: Step) -> tuple[Step, dict[Edge, Tensor]] | None:
        """The step with rows for samples, and the rows on the edges to which it leads; None where
        it may mix rows.
        """
        if step in self.whole.by_column or step.leaf is not None:
            return None
        if step.record is not None or step.bare:
            return self._layer(step)
        there: dict[Edge, Tensor] = {}
        for i, edge in enumerate(step.out):
            if edge is None:
                continue
            of = [self._carried(step, i, into, edge) for into in step.into]
            first = of[0]
            if first is None or any(o is None or not same(first, o) for o in of[1:]):
                return None
            if edge in there and not same(there[edge], first):
                return None
            there[edge] = first
        return step, there

    def _layer(self, step: Step) -> tuple[Step, dict[Edge, Tensor]] | None:
        (into,), record = step.into, step.record
        of, shape = self.of[into], self.whole.shapes[into]
        lead = leading(of)
        if of.shape[:lead] != shape[:lead] or of.numel() != self.count:
            return None
        if record is None:  # a product with bare parameters
            out = [e for e in step.out if e is not None]
            if lead > 1 or any(self.whole.shapes[e][:1] != shape[:1] for e in out):
                return None
            return step, {e: of.reshape(-1, *[1] * (len(self.whole.shapes[e]) - 1)) for e in out}
        slots = step.slots
        if lead > 1:
            found = self._slots_of_rows(step, shape, lead)
            if found is None:
                return None
            slots = found
        there = {}
        if step.out[0] is not None:
            x = tuple(record.x.shape)
            if x[:lead] != shape[:lead]:
                return None
            there[step.out[0]] = of.reshape(*x[:lead], *[1] * (len(x) - lead))
        return dataclasses.replace(step, slots=slots), there

    def _slots_of_rows(
        self, step: Step, shape: tuple[int, ...], lead: int
    ) -> dict[str, Jacobian] | None:
        """The Jacobians of a layer with rows for samples, if its rule knows them."""
        record = step.record
        assert record is not None
        point = record.working_point()
        if point is None:
            return None
        x, y = point
        if x.shape[:lead] != shape[:lead] or y.shape[:lead] != shape[:lead]:
            return None
        if x.dim() == lead or record.entry.is_fallback:
            return None
        x, y = x.flatten(0, lead - 1), y.flatten(0, lead - 1)
        try:
            said = ask_rule(record.entry, record.module, x, y, self.graph.paths)
        except NNJError:  # of a rule that was asked for a call that was not made
            return None
        if isinstance(said, Declined) or not step.slots.keys() <= said.jacobians.keys():
            return None
        return said.jacobians

    def _carried(self, step: Step, i: int, into: Edge, edge: Edge) -> Tensor | None:
        shapes = self.whole.shapes
        return behind(step.node, i, self.of[into], shapes[into], shapes[edge])


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
