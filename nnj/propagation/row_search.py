"""Which steps of a sweep keep rows apart, and which row each entry on their edges is of.

It is told by the names of autograd's nodes, and by the rule of a layer: it is asked for the same
call with rows in the place of samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.graph.step import Step
from nnj.jacobians.jacobian import Jacobian
from nnj.loss_hessian.base import LossHessian
from nnj.propagation.backward import Sweep
from nnj.propagation.glue import entries_of
from nnj.propagation.row_index import (
    ARRANGING,
    arranged,
    behind,
    leading,
    same,
    view_of,
)
from nnj.propagation.verification import KEPT
from nnj.recording.records import Edge
from nnj.registry.layer_rules import Declined, ask_rule

_rows_of_blocks: dict[Hashable, Tensor | None] = {}  # by layout: nothing is asked twice


class RowSearch:
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
