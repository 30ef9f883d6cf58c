"""Checks that the scalar on which backward was called is linear in each loss: only then its Hessian
is that of the losses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable
from types import FrameType
from typing import Any

from torch import Tensor

from nnj.errors import NNJError
from nnj.graph.nodes import leaf_of, node_name
from nnj.graph.op_names import BILINEAR, LINEAR
from nnj.graph.traverse import children, reachable, topological
from nnj.recording.engine import is_engine
from nnj.recording.records import LOSS, MARK, RECORD, LossCall


def _running() -> tuple[Any, ...]:
    """What the running backward pass was started with: its roots, and the other arguments, from the
    frame of torch that runs the engine; nothing if there is none.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_engine_run_backward" and "t_outputs" in frame.f_locals:
            return frame.f_locals["t_outputs"], *frame.f_locals.get("args", ())
        frame = frame.f_back
    return ()


def backward_roots() -> list[Any]:
    """The nodes on which the running backward pass was started."""
    return [
        node
        for t in next(iter(_running()), ())
        if (node := t.grad_fn if isinstance(t, Tensor) else t.node) is not None
    ]


def runs_to_all_leaves() -> bool:
    """Whether no `inputs=` restricts the running backward pass; False also where that is not known.

    To ask the engine of one leaf takes as long as a small layer does."""
    given = _running()
    return len(given) > 4 and given[4] == ()


def is_only_loss(call: LossCall) -> bool:
    """Whether the running backward pass is of no other loss; False also where that is not known."""
    nodes = reachable(backward_roots(), children)
    keys = ((node, key) for node in nodes for key in node.metadata if isinstance(key, tuple))
    losses = [node.metadata[key] for node, key in keys if key[0] == LOSS]
    return [found for found in losses if found.counts] == [call]


def check_linear(call: LossCall, loss: Any) -> None:
    """Errors: `NNJError` if the scalar is not linear in the loss, whose node is `loss`."""
    stop = {node for node, _ in call.edges} | {loss}
    above: Callable[[Any], list[Any]] = lambda node: [] if node in stop else children(node)
    leads = {loss}  # the nodes that lead to the loss
    for node in reversed(topological(backward_roots(), above)):
        operands = [child for child in above(node) if child in leads]
        if operands:
            leads.add(node)
            _check(node, operands, call)


def _check(node: Any, operands: list[Any], call: LossCall) -> None:
    """Errors: `NNJError` if a node is not linear in the operands that lead to the loss."""
    name = node_name(node)
    if name in LINEAR or is_engine(node):
        return
    if name == "Div":  # numerator and denominator
        fine = node.next_functions[0][0] in operands
        others = [n for n, _ in node.next_functions[1:] if n is not None]
    else:
        fine = name in BILINEAR and len(operands) == 1
        others = [n for n in children(node) if n not in operands]
    if fine and not _of_a_model(others, call):
        return
    raise NNJError(
        f"{call.name}: the scalar is not linear in this loss (autograd's {name} comes after it), "
        "so its Hessian is not that of the scalar. Make one loss of the whole: nnj.extend(lambda "
        "output, target: ...)"
    )


def _of_a_model(nodes: Iterable[Any], call: LossCall) -> bool:
    """Whether a factor comes from an output of a model."""
    ends = {node for node, _ in call.edges}
    return any(node in ends or _recorded(node) for node in reachable(nodes, children))


def _recorded(node: Any) -> bool:
    """Whether the output of an extended module is the result of a node."""
    if leaf_of(node) is not None:
        return False
    return any(isinstance(key, tuple) and key[0] in (RECORD, MARK) for key in node.metadata)


def check_arguments(call: LossCall, loss: Any, params: Container[Tensor]) -> None:
    """Errors: `NNJError` if the loss depends on parameters of a model otherwise than through its
    arguments.
    """
    ends = {node for node, _ in call.edges}
    above: Callable[[Any], list[Any]] = lambda node: [
        child for child in children(node) if child not in ends
    ]
    for node in reachable([] if loss in ends else [loss], above):
        leaf = leaf_of(node)
        if leaf is not None and leaf in params:
            raise NNJError(
                f"{call.name}: the loss reaches parameters of the model otherwise than through its "
                "arguments, and nnj sees only what is passed to it. Pass every output of the model "
                "to the loss as a tensor, or in tuples, lists and dicts of them; add terms in the "
                "parameters outside of it"
            )
