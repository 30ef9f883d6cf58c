"""All columns of one loss through its graph in chunks: by row, behind the last layer, each sample's
own number of them, or as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from nnj.checks import being_traced
from nnj.collecting.contribution import ExactColumns
from nnj.collecting.coupling import samples_of
from nnj.collecting.loss_columns import LossColumns, Part
from nnj.collecting.parallel_results import is_parallel, mesh_of, over_mesh
from nnj.collecting.ragged_pass import ragged_pass
from nnj.collecting.request import EXACT, GRADIENT, ColumnSource
from nnj.collecting.shares import Shares
from nnj.collecting.targets import ChunkSink, Target
from nnj.errors import NNJError
from nnj.loss_hessian.base import LossHessian
from nnj.loss_hessian.column_selection import ColumnSelection
from nnj.propagation.backward import Sink, Sweep
from nnj.propagation.chunking import columns_at_once, even
from nnj.propagation.last_layer import LastLayerColumns
from nnj.propagation.plan_search import Planned
from nnj.propagation.row_stage import RowStage, row_stage
from nnj.propagation.verification import verify
from nnj.recording.records import LossCall
from nnj.recording.scope import owned_by_several


class ColumnPass:
    """All columns that are wanted of one loss, through the graph in chunks.

    Args:
        planned: by sample.
        wanted: the parameters of all targets.
        shares: of a sharded model.
    """

    def __init__(
        self,
        call: LossCall,
        columns: LossColumns,
        planned: Planned,
        targets: Sequence[Target],
        wanted: set[Tensor],
        shares: Shares | None,
    ):
        self.columns, self.targets, self.wanted = columns, targets, wanted
        self.edges, self.planned = call.edges, planned
        requests = [target.request for target in targets]
        self.sources = list(dict.fromkeys(s for r in requests for s in r.sources.values()))
        self.memory = min(request.memory for request in requests)
        # of verification: no part of the gradients alone, where all of them are there anyhow
        self.room = math.inf if shares is None else min(self.memory / 2, shares.room)
        self.tol = min((r.tol for r in requests if EXACT in r.sources.values()), default=0.0)
        self.verify = any(request.verify for request in requests)
        every = [q for request in requests for q in request.quantities.values()]
        distributed = is_parallel(planned.sweep.graph)
        self.gathers = distributed and any(q.place is not Tensor for q in every)
        if distributed:
            self.columns.mesh = mesh_of(planned.sweep.graph)
        self.columns.ranks |= {
            source: request.rank(target.found.wrappers) if shares is None else shares.rank
            for request, target in zip(requests, targets, strict=True)
            for source in request.sources.values()
            if source.drawn_for is not None
        }

    def run(self) -> None:
        """What comes of the Hessian goes by the samples that the loss takes together, the gradient
        by each.
        """
        curvature = [source for source in self.sources if source is not GRADIENT]
        planned, sample = self.planned, None
        if curvature:
            hessian = self.columns.hessian
            sample, group = samples_of(hessian, self.edges, planned)
            if group is not None:
                self._check_apart()
                planned = planned.together(group)
                sample, _ = samples_of(hessian, self.edges, planned)
        if planned is self.planned or GRADIENT not in self.sources:
            self._propagate(planned, self.sources, sample)
        else:
            self._propagate(planned, curvature, sample)
            self._propagate(self.planned, [GRADIENT], None)
        for target in self.targets:
            target.found.end(target.request.quantities)
            if not self.gathers:
                over_mesh(target.found, target.request.quantities)

    def _check_apart(self) -> None:
        """Errors: `NNJError` for curvature of each sample, which the loss takes together."""
        for request in [target.request for target in self.targets]:
            for name in request.curvature_of_samples:
                raise NNJError(
                    f"{name}: {self.columns.name} takes samples together, so that none has a "
                    "curvature of its own. Collect sums over samples, such as ggn_diag"
                )

    def _propagate(
        self, planned: Planned, sources: Sequence[ColumnSource], sample: Tensor | None
    ) -> None:
        if self.verify:
            _verified(planned, self.wanted, self.room)
        sweep, columns, targets = planned.sweep, self.columns, self.targets
        sweep.gathers = self.gathers
        at_most, about = columns_at_once(sweep, self.memory)
        selection, size, left = None, about, list(sources)
        stage = self._stage(planned) if EXACT in sources else None
        if stage is not None:
            left.remove(EXACT)
            self._propagate_by_row(stage)
        elif EXACT in sources and self._propagate_ragged(planned, sample):
            left.remove(EXACT)
        elif EXACT in sources:
            selection = columns.select(sample, self.tol)
            exact = ExactColumns(selection.k, selection.trace, selection.dropped)
            for target in targets:
                target.found.exact = exact
            last = _last_layer(
                columns.hessian, sweep, targets, selection if self.tol else None, self.memory
            )
            if last is None:
                size = even(selection.k, at_most, about)
            else:
                left.remove(EXACT)
                _propagate_behind(last, sweep, targets, even(last.walks, at_most, about))
        for chunk in columns.chunks(left, selection, size):
            sink = ChunkSink(targets, chunk.parts)
            sweep.run(chunk.roots, chunk.k, sink.take)
            sink.end()

    def _stage(self, planned: Planned) -> RowStage | None:
        """The stages of the exact columns, where only sums over samples are made of them."""
        requests = [target.request for target in self.targets]
        each = [name for r in requests for name in r.exact_of_samples]
        together = planned.groups or any(target.together for target in self.targets)
        if each or together or is_parallel(planned.sweep.graph):
            return None
        own, owner = self._own(planned)
        return row_stage(planned.sweep, self.columns.hessian, own, owner)

    def _own(self, planned: Planned) -> tuple[list[list[nn.Parameter]], nn.Module | None]:
        """The parameters that have results together, and the model of the last call."""
        calls = planned.sweep.graph.marks
        own = [own for target in self.targets for own in target.own.values()]
        return own, calls[-1].module if calls else None

    def _propagate_ragged(self, planned: Planned, sample: Tensor | None) -> bool:
        """Exact columns with a tolerance, each sample's own number of them; whether that was
        done.
        """
        wanted = [q for t in self.targets for q in t.request.exact]
        if not self.tol or sample is not None or math.isfinite(self.room) or planned.groups:
            return False
        if not all(q.skips_zeros for q in wanted) or being_traced():
            return False
        last = partial(_last_layer, targets=self.targets, memory=self.memory)
        ragged = ragged_pass(
            planned.sweep, self.columns.hessian, self.tol, last, *self._own(planned)
        )
        if ragged is None:
            return False
        for target in self.targets:
            target.found.exact = ragged.exact
        if ragged.last is not None:
            ragged.last.parameters(_all_of(self.targets, ragged.exact.k))
        for v, run in ragged.parts(self.memory):
            # a part is not added to another one, of other samples
            sink = ChunkSink(self.targets, {EXACT: Part(slice(0, len(v)), len(v))})
            run(v, sink.take)
            sink.end()
        return True

    def _propagate_by_row(self, stage: RowStage) -> None:
        """All exact columns, by row as long as rows are apart, and then by sample."""
        targets, sweep, memory = self.targets, stage.sweep, self.memory // 2
        at_most, about = columns_at_once(sweep, memory)
        at_most = max(1, min(at_most, memory // max(1, stage.bytes_of_column)))
        selection = stage.select(self.tol)
        last, walks, edge, steps = None, selection.k, stage.start, sweep.graph.steps
        if stage.by_row is not None:
            chosen = selection if self.tol else None
            last = _last_layer(stage.by_row, sweep, targets, chosen, memory)
        if last is not None:
            walks, edge, steps = last.walks, last.edge, steps[len(last.steps) :]
        size = even(walks, at_most, about)
        goes = 0 if last is not None and last.is_end else walks
        cuts = [(a, min(a + size, goes)) for a in range(0, goes, size)]
        packing, sizes, every = stage.packing(selection.counts), [0] * len(cuts), 1
        if stage.behind:
            sizes = packing.sizes(cuts)
            (every,) = packing.sizes([(0, selection.k)])
        k = every if stage.behind else selection.k
        for target in targets:
            target.found.exact = ExactColumns(k, selection.trace, selection.dropped)
        if last is not None:
            last.parameters(_all_of(targets, walks))
        parts = stage.begun(selection, size) if last is None else last.walked(size)
        later, total = columns_at_once(stage.whole, memory), sum(sizes)
        for v, cut, goes_on in zip(parts, cuts, sizes, strict=True):
            sink = ChunkSink(targets, {EXACT: Part(slice(0, len(v)), walks)})
            arrived = stage.run(edge, v, sink.take, steps)
            sink.end()
            together = even(goes_on, *later)
            for roots in stage.chunks(arrived, packing, *cut, goes_on, together):
                k = len(next(iter(roots.values())))
                sink = ChunkSink(targets, {EXACT: Part(slice(0, k), total)})
                stage.whole.run(roots, k, sink.take, stage.behind)
                sink.end()


def _all_of(targets: Sequence[Target], total: int) -> Sink:
    """What is given factors with all exact columns in them."""

    def take(p: Tensor, factor: Any) -> None:
        ChunkSink(targets, {EXACT: Part(slice(0, factor.k), total)}).take(p, factor)

    return take


def _last_layer(
    hessian: LossHessian,
    sweep: Sweep,
    targets: Sequence[Target],
    selection: ColumnSelection | None,
    memory: int,
) -> LastLayerColumns | None:
    """The exact columns behind the last layers, where these are one linear map for all samples."""
    several = owned_by_several([m for target in targets for m in target.own])
    several = several.union(*(target.together for target in targets))
    # with hooks, H at the last layer's parameters is not behind them
    if sweep.hooks is not None or is_parallel(sweep.graph):
        return None
    last = LastLayerColumns(sweep, hessian, several, selection)
    if not last.useful:
        return None
    last.narrow(memory)
    return last


def _propagate_behind(
    last: LastLayerColumns, sweep: Sweep, targets: Sequence[Target], size: int
) -> None:
    """Exact columns from behind the last layers on, whose own parameters need none."""

    walks = last.walks
    last.parameters(_all_of(targets, walks))
    steps = sweep.graph.steps[len(last.steps) :]
    for v in last.walked(size) if steps else ():
        sink = ChunkSink(targets, {EXACT: Part(slice(0, len(v)), walks)})
        sweep.run({last.edge: v}, len(v), sink.take, steps)
        sink.end()


def _verified(planned: Planned, wanted: set[Tensor], memory: float) -> None:
    """Errors: `NNJError` where the sweep is not what autograd computes."""
    sweep, graph = planned.sweep, planned.sweep.graph
    calls = graph.marks
    layers = (step.record.module for step in graph.steps if step.record is not None)
    owner = calls[-1].module if calls else next(layers, None)
    verify(sweep, planned.roots, wanted, owner, memory=memory)
