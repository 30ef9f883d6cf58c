"""What one loss adds in one backward pass: its graph, whose the rows are, and each request's
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnj.collecting.accumulate import result
from nnj.collecting.called_parameters import check_data, check_replaced
from nnj.collecting.column_pass import ColumnPass
from nnj.collecting.contribution import Contribution
from nnj.collecting.loss_columns import LossColumns
from nnj.collecting.request import Request
from nnj.collecting.shares import Shares
from nnj.collecting.targets import Target
from nnj.errors import NNJError
from nnj.graph.builder import Graph
from nnj.graph.linearity import check_arguments, runs_to_all_leaves
from nnj.propagation.plan_search import Planned, plan
from nnj.recording.module_hook import extended_roots
from nnj.recording.records import LossCall
from nnj.recording.scope import Paths, Scope


def contribute(
    call: LossCall,
    node: Any,
    requests: Sequence[Request],
    columns: LossColumns,
    shares: Shares | None = None,
    sign: int = 1,
) -> dict[Request, Contribution]:
    """What one loss adds to each request; columns are propagated once for all of them.

    Args:
        call: the call of the loss.
        node: autograd's node of the loss.
        columns: those of the loss, or of a part of its Hessian.
        shares: takes in sums of sharded models, `sign` times what is found.

    Errors: `NNJError` wherever a number would not be exact.
    """
    firsts = {request: first for request in requests if (first := request.first()) is not None}
    if not firsts:
        return _contribute(call, node, requests, columns, shares, sign)
    # what some quantities must know before their columns, of this loss alone
    found = _contribute(call, node, list(firsts.values()), columns)
    try:
        for request, first in firsts.items():
            part = found[first]
            for name, states in part.states.items():
                made = {
                    place: result(name, first.quantities[name], place, state, part.n)
                    for place, state in states.items()
                }
                request.quantities[name].given(made)
        return _contribute(call, node, requests, columns, shares, sign)
    finally:
        for request, first in firsts.items():
            for name in first.quantities:
                request.quantities[name].given(None)


def _contribute(
    call: LossCall,
    node: Any,
    requests: Sequence[Request],
    columns: LossColumns,
    shares: Shares | None = None,
    sign: int = 1,
) -> dict[Request, Contribution]:
    scope = Scope(extended_roots())
    targets = [Target(request, scope, shares, sign) for request in requests]
    wanted: set[Tensor] = set().union(*(target.params for target in targets))
    check_arguments(call, node, wanted)
    if call.edges:
        _check_modules(requests, scope)
        graph, met = _graph(call, wanted, scope.paths)
        check_data(graph, [node for node, _ in call.edges], scope.paths)
        reached, empty = _reached(graph), graph.without_entries()
        for target in targets:
            target.reach(reached | empty.keys() if empty else reached, scope.paths)
        planned = _planned(graph, columns, requests)
        n = columns.rows if planned is None else planned.n
        _open(targets, graph, reached | empty.keys(), scope, n)
        for target in targets:
            target.found.given = frozenset() if planned is None else planned.calls
        _check_met(graph, requests, met | empty.keys())
        check_replaced(graph, wanted, met | empty.keys(), scope.paths)
        if planned is not None:
            ColumnPass(call, columns, planned, targets, wanted, shares).run()
        for target in targets if empty else ():
            target.take_zeros(empty, n)
    return {target.request: target.found for target in targets}


# -- the graph, and whose the rows are -------------------------------------------------------------


def _check_modules(requests: Sequence[Request], scope: Scope) -> None:
    """Errors: `NNJError` for a module of modules= that is part of no extended model."""
    for top in [top for request in requests for top in request.modules or ()]:
        if not any(m in scope.own for m in top.modules()):
            raise NNJError(
                f"modules= names a module ({type(top).__name__}) that is part of no extended "
                "model. Extend the model that it is in, or name modules of that one"
            )


def _check_met(graph: Graph, requests: Sequence[Request], met: set[Tensor]) -> None:
    """Errors: `NNJError` for a model that took part, and none of whose parameters are behind the
    loss: others were, by torch.func.functional_call, or none at all.
    """
    if all(request.modules is not None for request in requests):
        return
    for m in dict.fromkeys(mark.module for mark in graph.marks):
        if any(p in met for p in m.parameters()):
            continue  # mostly the first one
        if any(p.requires_grad for p in m.parameters()):
            raise NNJError(
                f"the loss reaches no parameter of {type(m).__name__}, which was called and has "
                "parameters that require grad. Call it with its own parameters (not by "
                "torch.func.functional_call with others), or freeze those that it does not use"
            )


def _graph(call: LossCall, wanted: set[Tensor], paths: Paths) -> tuple[Graph, set[Tensor]]:
    """Autograd's graph from the outputs of the loss to the wanted parameters that this backward
    pass reaches, and all wanted ones that were met.
    """
    executed: dict[Tensor, bool] = {}
    all_run = runs_to_all_leaves()

    def is_wanted(p: Tensor) -> bool:
        if p not in wanted:
            return False
        known = True if all_run else executed.get(p)
        if known is None:
            known = _executed(p)
        executed[p] = known
        return known

    graph = Graph(list(dict.fromkeys(call.edges)), is_wanted, paths, parallel=True)
    all_run = False  # of what was not met here, the engine is asked: it may be of other models
    return graph, set(executed)


def _executed(p: Tensor) -> bool:
    """Whether this backward pass accumulates a gradient for p (`inputs=` restricts it)."""
    node = torch.autograd.graph.get_gradient_edge(p).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True  # captured by torch.autograd.grad


def _reached(graph: Graph) -> set[Tensor]:
    """The parameters to which columns may come."""
    reached: set[Tensor] = {p for step in graph.steps for _, p in step.params}
    return reached | {step.leaf for step in graph.steps if step.leaf is not None}


def _planned(graph: Graph, columns: LossColumns, requests: Sequence[Request]) -> Planned | None:
    """The plan of the graph, None if it has no steps.

    Errors: `NNJError` where it is not known which sample is which, and somebody asks.
    """
    if not graph.steps:
        return None
    asked = [name for request in requests for name in request.by_sample]
    if columns.curvature:
        _ = columns.rows  # what its rule refuses comes before what the plan does
    planned = plan(graph, lambda: columns.rows, bool(asked))
    if asked and planned.unknown:
        raise NNJError(
            f"{asked[0]}: {planned.unknown}; sums over samples, such as ggn_diag, do not need to "
            "know"
        )
    return planned


def _open(
    targets: Sequence[Target],
    graph: Graph,
    reached: set[Tensor],
    scope: Scope,
    n: int,
) -> None:
    """Begin the contributions: the samples, and all parameters and modules of the models that took
    part.

    Errors: `NNJError` if no model did.
    """
    calls = frozenset(mark.order for mark in graph.marks)
    wrappers = frozenset(mark.wrapper for mark in graph.marks) or frozenset({None})
    if len(wrappers) > 1:  # a frozen model beside need not be called through one
        trained = [m for m in graph.marks if any(p.requires_grad for p in m.module.parameters())]
        wrappers = frozenset(mark.wrapper for mark in trained)
    called = {mark.module for mark in graph.marks}
    took_part = [
        m
        for root, modules in scope.modules.items()
        if root in called or any(p in reached for m in modules for p in scope.own[m])
        for m in modules
    ]
    for target in targets:
        target.found.calls, target.found.n = calls, n
        target.found.wrappers = wrappers
        target.hold(took_part)
    if not graph.marks and not any(target.found.holders for target in targets):
        raise NNJError(
            "the loss reaches no parameter of an extended model. Extend the model, too: model = "
            "nnj.extend(model)"
        )
