"""Between the value of a loss and the scalar on which backward was called: only what is linear in
the loss keeps its Hessian.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from nnj.errors import NNJError
from nnj.graph.nodes import node_name
from nnj.recording.records import MARK, RECORD, LossCall

_LINEAR = set(
    """
    Add Sub Rsub Neg Sum Nansum Mean Select Slice Index IndexSelect Gather Stack Cat Split
    Unbind View UnsafeView ReshapeAlias Squeeze Unsqueeze Expand Clone Alias ToCopy Permute
    Transpose T MaskedFill Where Max Min Amax Amin Repeat CopySlices AsStrided
    """.split()
)
_BILINEAR = {"Mul", "Dot", "Mv", "Mm", "Bmm", "Addcmul"}


def backward_roots() -> list[Any]:
    """The nodes on which the running backward pass was started, from the frame of torch that runs
    the engine.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_engine_run_backward" and "t_outputs" in frame.f_locals:
            roots = frame.f_locals["t_outputs"]
            return [
                node
                for t in roots
                if (node := t.grad_fn if isinstance(t, Tensor) else t.node) is not None
            ]
        frame = frame.f_back  # type: ignore[assignment]
    return []


def check_linear(call: LossCall, loss: Any) -> None:
    """Errors: `NNJError` if the scalar is not linear in the loss, whose node is `loss`."""
    stop = {node for node, _ in call.edges}
    leads: dict[Any, bool] = {}
    stack = [(node, False) for node in backward_roots()]
    while stack:
        node, leaving = stack.pop()
        if leaving:
            below = [n for n, _ in node.next_functions if n is not None and leads.get(n)]
            leads[node] = bool(below)
            if below:
                _check(node, below, call)
        elif node not in leads:
            leads[node] = node is loss
            if node is not loss and node not in stop:
                stack.append((node, True))
                stack += [(n, False) for n, _ in node.next_functions if n is not None]


def _check(node: Any, below: list[Any], call: LossCall) -> None:
    name = node_name(node)
    children = [n for n, _ in node.next_functions]
    if name in _LINEAR:
        return
    if (
        name == "Div"
        and children[0] in below
        and (len(children) < 2 or not _of_a_model([children[1]], call))
    ):
        return
    if (
        name in _BILINEAR
        and not _of_a_model([n for n in children if n is not None and n not in below], call)
        and len([n for n in children if n in below]) == 1
    ):
        return
    raise NNJError(
        f"{call.name}: the scalar is not linear in this loss (autograd's {name} comes after it), "
        "so its Hessian is not that of the scalar. Make one loss of the whole: nnj.extend(lambda "
        "output, target: ...)"
    )


def _of_a_model(nodes: Iterable[Any], call: LossCall) -> bool:
    """Whether a factor comes from an output of a model."""
    ends = {node for node, _ in call.edges}
    seen: set[Any] = set()
    stack = [n for n in nodes if n is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        keys = (
            []
            if hasattr(node, "variable")
            else [key for key in node.metadata if isinstance(key, tuple)]
        )
        marked = any(key[0] in (RECORD, MARK) for key in keys)
        if node in ends or marked:
            return True
        stack += [n for n, _ in node.next_functions if n is not None]
    return False


def check_arguments(call: LossCall, loss: Any, params: set[int]) -> None:
    """Errors: `NNJError` if the loss depends on parameters of a model otherwise than through its
    arguments.
    """
    ends = {node for node, _ in call.edges}
    seen: set[Any] = set()
    stack = [loss]
    while stack:
        node = stack.pop()
        if node in seen or node in ends:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) in params:
            raise NNJError(
                f"{call.name}: the loss reaches parameters of the model otherwise than through its "
                "arguments, and nnj sees only what is passed to it. Pass every output of the model "
                "to the loss as a tensor, or in tuples, lists and dicts of them; add terms in the "
                "parameters outside of it"
            )
        stack += [n for n, _ in node.next_functions if n is not None]
