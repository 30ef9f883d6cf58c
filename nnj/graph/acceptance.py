"""Whether a record says all that autograd says of one call: the fallback assumes what only the
graph of the call can confirm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import own_task, sum_to
from nnj.jacobians.jacobian import Jacobian
from nnj.recording.records import Record


def confirmed(node: Any, record: Record, slots: dict[str, Jacobian], y: Tensor) -> bool:
    """Whether every path through the call ends at its input or its own parameters, and one random
    vjp is autograd's own.

    Samples that influence one another, tensors of other layers and hooks on gradients are seen in
    this."""
    ends = _inside(node, record)
    if ends is None:
        return False
    seed = torch.Generator().manual_seed(0x6E6E6A)
    u = torch.rand(y.shape, generator=seed).to(y.device, y.dtype) + 0.5
    try:
        expected = own_task(lambda: _backward(node, record, ends, u))
        named = dict(record.module.named_parameters(remove_duplicate=False))
        for slot, j in slots.items():
            key = record.edge if slot == "input" else id(named[slot])
            if (slot != "input" and not named[slot].requires_grad) or key is None:
                continue
            found = j.vjp(u[None])[0] if slot == "input" else j.vjp(u[None])[0].sum(0)
            theirs = expected.get(key, torch.zeros_like(found))
            tolerance = torch.finfo(y.dtype).eps ** 0.5 * (theirs.abs().max() + found.abs().max())
            if found.shape != theirs.shape or bool(((found - theirs).abs() > tolerance).any()):
                return False
    except RuntimeError:
        return False
    return True


def _inside(node: Any, record: Record) -> list[Any] | None:
    """The nodes of the call in topological order, or None if a path leaves it elsewhere than at x
    and its parameters.
    """
    own = {id(p) for p in record.module.parameters()}
    order: list[Any] = []
    done: set[Any] = set()
    stack = [(node, False)]
    while stack:
        n, leaving = stack.pop()
        if leaving:
            order.append(n)
            continue
        if n in done:
            continue
        done.add(n)
        if hasattr(n, "variable"):
            if id(n.variable) not in own:
                return None
            continue
        stack.append((n, True))
        for child in n.next_functions:
            if child[0] is not None and child != record.edge:
                stack.append((child[0], False))
        if len(done) > 10_000:
            return None
    return order[::-1]


def _backward(node: Any, record: Record, order: list[Any], u: Tensor) -> dict[Any, Tensor]:
    """Autograd's own vjp of the call, by the edge of x and by the ids of parameters."""
    values: dict[Any, Tensor] = {(node, 0): u}
    found: dict[Any, Tensor] = {}
    for n in order:
        args = [values.pop((n, nr), None) for nr in range(len(n._input_metadata))]
        if all(a is None for a in args):
            continue
        columns = [None if a is None else a[None] for a in args]
        for edge, back in zip(n.next_functions, call_node(n, columns, 1), strict=False):
            if back is None or edge[0] is None:
                continue
            shape = tuple(edge[0]._input_metadata[edge[1]].shape)
            t = sum_to(back, shape, 1)[0]
            inner = hasattr(edge[0], "variable") and edge != record.edge
            into, key = (
                (found, id(edge[0].variable))
                if inner
                else (found, edge)
                if edge == record.edge
                else (values, edge)
            )
            into[key] = into[key] + t if key in into else t
    return found


def working_point(record: Record) -> tuple[Tensor, Tensor] | None:
    """x and y of a call in one dtype; where autocast has mixed precisions, the widest. None if
    parameters are narrower.
    """
    x, y = record.x.tensor(), record.y.tensor()
    dtype = torch.promote_types(x.dtype, y.dtype) if x.is_floating_point() else y.dtype
    own = {p.dtype for p in record.module.parameters()}
    for other in own:
        dtype = torch.promote_types(dtype, other)
    if own - {dtype}:
        return None
    return x.to(dtype) if x.is_floating_point() else x, y.to(dtype)
