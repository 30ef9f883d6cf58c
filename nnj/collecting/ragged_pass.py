"""Exact columns with a tolerance, where each sample walks as many as it needs: the cost follows the
mean uncertainty of the samples, not that of the least certain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnj.collecting.contribution import ExactColumns
from nnj.graph.step import Step
from nnj.loss_hessian.base import LossHessian
from nnj.loss_hessian.column_selection import RaggedColumns
from nnj.propagation.backward import Sink, Sweep
from nnj.propagation.chunking import columns_at_once, even
from nnj.propagation.last_layer import LastLayerColumns, walk_cost
from nnj.propagation.some_samples import SweepOfSome, narrow_steps, right
from nnj.recording.records import Edge

PART = 3e6  # multiply-adds that take as long as a step does beside them, once for each part

Run = Callable[[Tensor, Sink], object]


@dataclass(eq=False)
class RaggedPass:
    """How ragged columns go through a graph.

    Args:
        selection: the columns.
        cuts: (start, stop, samples) of each part of them.
        last: the last layers, behind which they begin, if there are any.
        steps, edge: those that they go through, and where they begin.
        narrow: those of them at which columns are those of some samples.
    """

    sweep: Sweep
    selection: RaggedColumns
    cuts: list[tuple[int, int, int]]
    last: LastLayerColumns | None
    steps: list[Step]
    edge: Edge
    narrow: list[Step]

    @property
    def exact(self) -> ExactColumns:
        s = self.selection
        return ExactColumns(s.k, s.trace, s.dropped)

    def parts(self, memory: int) -> Iterator[tuple[Tensor, Run]]:
        """Columns that go together within `memory`, and what lets them go."""
        size = _sizes(self.sweep, self.selection.hessian, memory)
        every = torch.arange(self.sweep.n, device=self.selection.counts.device)
        for start, stop, m in self.cuts if self.steps else ():
            of = every if m == self.sweep.n else (self.selection.counts > start).nonzero()[:, 0]
            sweep = SweepOfSome(self.sweep, self.narrow if m < self.sweep.n else (), of)
            together = even(stop - start, *size(m))
            for a in range(start, stop, together):
                yield self._begin(sweep, a, min(a + together, stop)), self._through(sweep)

    def _begin(self, sweep: SweepOfSome, start: int, stop: int) -> Tensor:
        if self.last is not None:
            v = self.last.columns(start, stop, sweep.of)
        else:
            (v,) = self.selection.hessian.to_outputs(self.selection.columns(start, stop))
            v = v.index_select(1, sweep.of)
        return sweep.begin(self.edge, v)

    def _through(self, sweep: Sweep) -> Run:
        return lambda v, sink: sweep.run({self.edge: v}, len(v), sink, self.steps)


def ragged_pass(
    sweep: Sweep,
    hessian: LossHessian,
    tol: float,
    last_layer: Callable[..., LastLayerColumns | None],
    own: Sequence[Sequence[Tensor]],
    owner: nn.Module | None,
) -> RaggedPass | None:
    """How columns go with a tolerance, each sample's own number of them; None where nothing is
    saved by that, or steps cannot be asked for some of the samples.

    Args:
        sweep: the plan.
        hessian: of the loss.
        last_layer: makes `LastLayerColumns` of hessian, sweep and selection=.
        own: parameters that have results together.
        owner: the model with which what was tried is forgotten.
    """
    roots = sweep.graph.roots
    if len(roots) != 1 or len(hessian.shapes) != 1 or sweep.hooks is not None:
        return None
    plain = sweep.state[roots[0]] is sweep.in_order and sweep.shapes[roots[0]][0] == sweep.n
    if not plain or hessian.rows != sweep.n or sweep.n < 2:
        return None
    if tuple(hessian.shapes[0]) != sweep.shapes[roots[0]]:
        return None
    selection = RaggedColumns(hessian, tol)
    last = last_layer(hessian, sweep, selection=selection)
    edge, steps = roots[0], sweep.graph.steps
    if last is not None:
        edge, steps = last.edge, steps[len(last.steps) :]
    narrow = narrow_steps(sweep, steps, own)
    cost = walk_cost(steps) / sweep.n
    fixed = PART * len(steps) / cost
    cuts = selection.parts(fixed)
    # a part asks the rules anew, which is about as long as one more column
    needs = sum(fixed + (b - a + 1) * m for a, b, m in cuts)
    if needs >= fixed + selection.packed * sweep.n:
        return None
    if steps and (not narrow or 2 * walk_cost(narrow) < walk_cost(steps)):
        return None
    if steps and not right(sweep, narrow, edge, steps, owner):
        return None
    return RaggedPass(sweep, selection, cuts, last, steps, edge, narrow)


def _sizes(sweep: Sweep, hessian: LossHessian, memory: int) -> Callable[[int], tuple[int, int]]:
    """How many columns of so many samples may walk together, and like to."""
    at_most, about = columns_at_once(sweep, memory)
    # they are made for all samples
    made = max(at_most, memory // (32 * max(1, sweep.n * hessian.places * hessian.block)))

    def sizes(m: int) -> tuple[int, int]:
        times = sweep.n // max(1, m)
        return min(made, at_most * times), min(made, about * times)

    return sizes
