"""What one loss adds in one backward pass: the sweep is planned, columns walk in chunks, quantities
take their share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnj.collecting.accumulate import Contribution
from nnj.collecting.loss_columns import LossColumns
from nnj.collecting.quantity import Quantity, asked
from nnj.errors import NNJError, complex_parameter
from nnj.graph.builder import Graph
from nnj.graph.linearity import check_arguments
from nnj.jacobians.factor import Factor
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Sink, Sweep
from nnj.propagation.chunking import columns_at_once, even
from nnj.propagation.last_layer import LastLayerColumns
from nnj.propagation.plan_search import plan
from nnj.recording.module_hook import extended_roots
from nnj.recording.records import LossCall

if TYPE_CHECKING:
    from nnj.collecting.collect import collect


def _executed(p: Tensor) -> bool:
    """Whether this backward pass accumulates a gradient for p (`inputs=` restricts it)."""
    node = torch.autograd.graph.get_gradient_edge(p).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True  # captured by torch.autograd.grad


def contribute(
    call: LossCall,
    scale: Tensor,
    node: Any,
    collections: list[collect],
    columns: LossColumns | None = None,
) -> dict[int, Contribution]:
    """Walk once for all open collections; `node` is the loss's own. Errors: `NNJError` wherever a
    number would not be exact.
    """
    columns = LossColumns(call, scale) if columns is None else columns
    roots = extended_roots()
    paths = {m: name for root in roots for name, m in root.named_modules()}
    targets = [Target(c, roots) for c in collections]
    check_arguments(call, node, {p for target in targets for p in target.params.values()})
    if not call.edges:
        return {id(t.collection): Contribution(frozenset(), 0) for t in targets}
    executed: dict[int, bool] = {}

    def wanted(p: Tensor) -> bool:
        if not any(id(p) in t.params for t in targets):
            return False
        if id(p) not in executed:
            executed[id(p)] = _executed(p)
        return executed[id(p)]

    graph = Graph(list(dict.fromkeys(call.edges)), wanted, paths)
    reached = {id(p) for u in graph.steps for _, p in u.params} | {
        id(u.leaf) for u in graph.steps if u.leaf is not None
    }
    calls = frozenset(mark.order for mark in graph.marks)
    for target in targets:
        target.check(reached, paths)
    sweep, sample_index, known = (
        plan(graph, columns.rows, scale.device)
        if graph.steps
        else (None, SampleIndex(columns.rows), True)
    )
    each = [
        name for c in collections for name, quantity in c.quantities.items() if quantity.per_sample
    ]
    if each and not known:
        raise NNJError(
            f"{each[0]}: nnj cannot tell which rows of the loss belong to which sample, since the "
            "model rearranges its input before its first layer. Hand the input to that layer as it "
            "is given, or give the loss one row for each sample; sums over samples, such as "
            "ggn_diag, do not need to know"
        )
    found = {id(t.collection): Contribution(calls, sample_index.n) for t in targets}
    for target in targets:
        _holders(target, found[id(target.collection)], roots, graph, reached)
    if not graph.marks and not any(c.known for c in found.values()):
        raise NNJError(
            "the loss reaches no parameter of an extended model. Extend the model, too: model = "
            "nnj.extend(model)"
        )
    if sweep is None:
        return found
    wants: dict[str, Any] = {}
    for target in targets:
        for name, quantity in target.collection.quantities.items():
            wants[target.source(name, quantity)] = quantity

    def sink(parts: dict[str, slice]) -> Sink:
        def take(p: Tensor, factor: Factor) -> None:
            for target in targets:
                target.take(found[id(target.collection)], p, factor, parts, reached)

        return take

    def flush(parts: dict[str, slice]) -> None:
        for target in targets:
            target.flush(found[id(target.collection)], parts)

    selection = None
    fits, likes = columns_at_once(sweep, min(c.memory for c in collections))
    if "exact" in wants:
        tol = min(
            t.collection.tol
            for t in targets
            if any(q.source == "exact" for q in t.collection.quantities.values())
        )
        selection = columns.select(sample_index, tol)
        shared = _of_several({id(m): m for t in targets for m in t.modules})
        head = LastLayerColumns(sweep, columns.hessian, shared, selection if tol else None)
        if head.useful:
            head.narrow(min(c.memory for c in collections))
        for target in targets:
            target.in_all["exact"] = head.walks if head.useful else selection.k
            found[id(target.collection)].selected(selection)
        if head.useful:
            del wants["exact"]
            _walk_behind(head, sweep, even(head.walks, fits, likes), sink, flush)
    size = even(selection.k, fits, likes) if selection and "exact" in wants else likes
    for chunk in columns.chunks(wants, selection, size):
        sweep.run(chunk.roots, chunk.k, sink(chunk.parts))
        flush(chunk.parts)
    for target in targets:
        found[id(target.collection)].finish(target.points)
    return found


def _of_several(modules: dict[int, nn.Module]) -> set[int]:
    """The parameters that several modules own."""
    seen: set[int] = set()
    twice: set[int] = set()
    for m in modules.values():
        own = {id(p) for p in m._parameters.values()}
        twice |= own & seen
        seen |= own
    return twice


def _walk_behind(
    head: LastLayerColumns,
    sweep: Sweep,
    size: int,
    sink: Callable[[dict[str, slice]], Sink],
    flush: Callable[[dict[str, slice]], None],
) -> None:
    """Exact columns, where the last layers are linear maps that all samples share."""
    head.parameters(lambda p, factor: sink({"exact": slice(0, factor.k)})(p, factor))
    steps = sweep.graph.steps[len(head.steps) :]
    if not steps:
        return
    for v in head.walked(size):
        parts = {"exact": slice(0, v.shape[0])}
        sweep.run({head.edge: v}, v.shape[0], sink(parts), steps)
        flush(parts)


def _holders(
    target: Target, into: Contribution, roots: list[nn.Module], graph: Graph, reached: set[int]
) -> None:
    """All that may hold a result: what belongs to a model that took part, reached or not."""
    called = {id(mark.module) for mark in graph.marks}
    if target.collection.modules is None:
        tops = [
            r for r in roots if id(r) in called or any(id(p) in reached for p in r.parameters())
        ]
    else:
        tops = target.collection.modules
    for top in tops:
        for m in top.modules():
            own = target.own[id(m)]
            if own:
                into.known[id(m)] = m
            for p in own:
                into.known[id(p)] = p


def _own_params(m: nn.Module) -> list[nn.Parameter]:
    """Each once, in order; torch's own iterators take much longer."""
    return list(
        {id(p): p for p in m._parameters.values() if p is not None and p.requires_grad}.values()
    )


class Target:
    """One open collection as a sweep sees it: its parameters, its modules, its quantities."""

    def __init__(self, collection: collect, roots: list[nn.Module]):
        self.collection = collection
        tops = roots if collection.modules is None else collection.modules
        self.modules = list({id(m): m for top in tops for m in top.modules()}.values())
        self.own = {id(m): _own_params(m) for m in self.modules}
        self.params = {id(p): p for own in self.own.values() for p in own}
        self.blocks = {n: q for n, q in collection.quantities.items() if q.of_modules}
        self.points = {n: q for n, q in collection.quantities.items() if not q.of_modules}
        self.pending: dict[int, dict[int, Factor]] = {}
        self.in_all: dict[str, int] = {}  # how many columns of each source there will be

    def check(self, reached: set[int], paths: dict[nn.Module, str]) -> None:
        """Errors: `NNJError` for what cannot be collected at the parameters that a sweep will
        reach.
        """
        squared = [
            name
            for name, quantity in self.collection.quantities.items()
            if quantity.source != "gradient"
        ]
        if squared and any(p.is_complex() and key in reached for key, p in self.params.items()):
            where = next(
                m
                for m in self.modules
                if any(p.is_complex() and id(p) in reached for p in self.own[id(m)])
            )
            raise complex_parameter(
                f"{squared[0]}: a parameter of '{paths.get(where, '') or type(where).__name__}'"
            )
        for quantity in self.blocks.values():
            for m in self.modules:
                if any(id(p) in reached for p in self.own[id(m)]):
                    quantity.check(m, self.own[id(m)], paths.get(m, ""))

    def take(
        self,
        into: Contribution,
        p: Tensor,
        factor: Factor,
        parts: dict[str, slice],
        reached: set[int],
    ) -> None:
        """The factor of one parameter has arrived, with the columns of all sources in it."""
        if id(p) not in self.params:
            return
        for name, quantity in self.points.items():
            which = parts.get(self.source(name, quantity))
            if which is not None:
                in_all = self.in_all.get(self.source(name, quantity), factor.k)
                into.add(name, p, asked(name, quantity.parameter, factor.columns(which), in_all))
        if not self.blocks:
            return
        for m in self.modules:
            own = self.own[id(m)]
            if any(q is p for q in own):
                there = self.pending.setdefault(id(m), {})
                there[id(p)] = factor
                if len(there) == len({id(q) for q in own} & reached):
                    self._module(into, m, self.pending.pop(id(m)), parts)

    def flush(self, into: Contribution, parts: dict[str, slice]) -> None:
        """After a walk: modules to some of whose parameters nothing was sent."""
        for m in self.modules:
            if id(m) in self.pending:
                self._module(into, m, self.pending.pop(id(m)), parts)

    def _module(
        self, into: Contribution, m: nn.Module, factors: dict[int, Factor], parts: dict[str, slice]
    ) -> None:
        own = self.own[id(m)]
        for name, quantity in self.blocks.items():
            which = parts.get(self.source(name, quantity))
            if which is not None:
                cut = {key: f.columns(which) for key, f in factors.items()}
                into.add(name, m, asked(name, quantity.module, [cut.get(id(p)) for p in own], own))

    def source(self, name: str, quantity: Quantity) -> str:
        """Draws are a quantity's own; exact columns and the gradient are shared."""
        return (
            f"signs {id(self.collection)} {name}" if quantity.source == "signs" else quantity.source
        )
