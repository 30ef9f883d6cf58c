"""What one loss adds in one backward pass: the sweep is planned, columns walk in chunks, quantities take their share."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnj.columns import LossColumns
from nnj.errors import NNJError
from nnj.factors import Factor
from nnj.graph import Graph
from nnj.grouping import plan
from nnj.head import HeadColumns
from nnj.hooks import extended_roots
from nnj.owners import Owner
from nnj.quantities.base import Quantity
from nnj.records import LossCall
from nnj.scalar import check_arguments
from nnj.selection import Selection, Whole
from nnj.sweep import Sink, Sweep
from nnj.targets import Target, asked
from nnj.turns import columns_at_once, even

if TYPE_CHECKING:
    from nnj.collection import collect


class Contribution:
    """Values of one collection from one loss, or from all losses of one backward pass."""

    def __init__(self, calls: frozenset[int], n: int):
        self.calls, self.n = calls, n  # the forward calls that made the samples, and their number
        self.values: dict[str, dict[int, Any]] = {}
        self.known: dict[int, Any] = {}  # every parameter and module that may hold a result
        self.trace = self.dropped = 0.0  # of the Hessians in the outputs, under a tolerance
        self.columns = 0  # how many exact ones

    def add(self, name: str, holder: Any, value: Any) -> None:
        mine = self.values.setdefault(name, {})
        mine[id(holder)] = mine[id(holder)] + value if id(holder) in mine else value

    def selected(self, selection: Selection | Whole) -> None:
        """Write down what walks of the exact columns."""
        self.trace, self.dropped, self.columns = selection.trace, selection.dropped, selection.k

    def finish(self, quantities: dict[str, Quantity]) -> None:
        """Turn sums of contributions into results."""
        for name, quantity in quantities.items():
            mine = self.values.get(name, {})
            for key in mine:
                mine[key] = asked(name, quantity.finish, mine[key])

    def value(self, name: str, holder: Any) -> Tensor | None:
        return self.values.get(name, {}).get(id(holder))

    def holders(self, modules: bool) -> list[Any]:
        return [h for h in self.known.values() if isinstance(h, nn.Module) == modules]

    @staticmethod
    def merge(parts: list[Contribution], per_sample: set[str]) -> Contribution:
        """The sum over the losses of one pass; per-sample values of different forward calls are put one behind the other."""
        groups: list[Contribution] = []
        for part in sorted(parts, key=lambda c: max(c.calls, default=0)):
            same = next((g for g in groups if g.n == part.n and (g.calls & part.calls or g.calls == part.calls)), None)
            if same is None:
                groups.append(part)
                continue
            same.calls |= part.calls
            same.known |= part.known
            for name, values in part.values.items():
                for key, value in values.items():
                    same.add(name, part.known[key], value)
        whole = Contribution(frozenset().union(*[g.calls for g in groups]), sum(g.n for g in groups))
        for group in groups:
            whole.known |= group.known
        whole.trace, whole.dropped = sum(p.trace for p in parts), sum(p.dropped for p in parts)
        whole.columns = max((p.columns for p in parts), default=0)
        for name in {name for g in groups for name in g.values}:
            for key in {key for g in groups for key in g.values.get(name, {})}:
                found = [(g, g.values.get(name, {}).get(key)) for g in groups]
                if name in per_sample:
                    like = next(v for _, v in found if v is not None)
                    value = torch.cat([like.new_zeros(g.n, *like.shape[1:]) if v is None else v for g, v in found])
                    whole.add(name, whole.known[key], value)
                    continue
                for _, v in found:
                    if v is not None:
                        whole.add(name, whole.known[key], v)
        return whole


def _executed(p: Tensor) -> bool:
    """Whether this backward pass accumulates a gradient for p (`inputs=` restricts it)."""
    node = torch.autograd.graph.get_gradient_edge(p).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True  # captured by torch.autograd.grad


def contribute(call: LossCall, scale: Tensor, node: Any, collections: list[collect],
               columns: LossColumns | None = None) -> dict[int, Contribution]:
    """Walk once for all open collections; `node` is the loss's own. Errors: `NNJError` wherever a number would not be exact."""
    columns = LossColumns(call, scale) if columns is None else columns
    roots = extended_roots()
    paths = {id(m): name for root in roots for name, m in root.named_modules()}
    targets = [Target(c, roots) for c in collections]
    check_arguments(call, node, {key for target in targets for key in target.params})
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
    reached = {id(p) for u in graph.units for _, p in u.params} | {id(u.leaf) for u in graph.units if u.leaf is not None}
    calls = frozenset(mark.order for mark in graph.marks)
    for target in targets:
        target.check(reached, paths)
    sweep, owner, known = plan(graph, columns.rows, scale.device) if graph.units else (None, Owner(columns.rows), True)
    each = [name for c in collections for name, quantity in c.quantities.items() if quantity.per_sample]
    if each and not known:
        raise NNJError(f"{each[0]}: nnj cannot tell which rows of the loss belong to which sample, since the model rearranges "
                       f"its input before its first layer. Hand the input to that layer as it is given, or give the loss one "
                       f"row for each sample; sums over samples, such as ggn_diag, do not need to know")
    found = {id(t.collection): Contribution(calls, owner.n) for t in targets}
    for target in targets:
        _holders(target, found[id(target.collection)], roots, graph, reached)
    if not graph.marks and not any(c.known for c in found.values()):
        raise NNJError("the loss reaches no parameter of an extended model. Extend the model, too: model = nnj.extend(model)")
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
        tol = min(t.collection.tol for t in targets if any(q.source == "exact" for q in t.collection.quantities.values()))
        selection = columns.select(owner, tol)
        shared = _of_several({id(m): m for t in targets for m in t.modules})
        head = HeadColumns(sweep, columns.curvature, shared, selection if tol else None)
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


def _walk_behind(head: HeadColumns, sweep: Sweep, size: int, sink: Callable[[dict[str, slice]], Sink],
                 flush: Callable[[dict[str, slice]], None]) -> None:
    """Exact columns, where the last layers are linear maps that all samples share."""
    head.parameters(lambda p, factor: sink({"exact": slice(0, factor.k)})(p, factor))
    units = sweep.graph.units[len(head.units) :]
    if not units:
        return
    for v in head.walked(size):
        parts = {"exact": slice(0, v.shape[0])}
        sweep.run({head.edge: v}, v.shape[0], sink(parts), units)
        flush(parts)


def _holders(target: Target, into: Contribution, roots: list[nn.Module], graph: Graph, reached: set[int]) -> None:
    """All that may hold a result: what belongs to a model that took part, reached or not."""
    called = {id(mark.module) for mark in graph.marks}
    if target.collection.modules is None:
        tops = [r for r in roots if id(r) in called or any(id(p) in reached for p in r.parameters())]
    else:
        tops = target.collection.modules
    for top in tops:
        for m in top.modules():
            own = target.own[id(m)]
            if own:
                into.known[id(m)] = m
            for p in own:
                into.known[id(p)] = p
