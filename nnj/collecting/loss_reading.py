"""A loss read again, as it was called: its value and gradient must be those of the call, or no
Hessian is that of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import edge_dtype, edges, leaf_of, own_task, shape_at, sum_to
from nnj.graph.traverse import children, topological
from nnj.recording.loss_state import as_called, is_as_it_was
from nnj.recording.records import Edge, LossCall


def read(call: LossCall, outputs: Sequence[Tensor]) -> Tensor:
    """The value of the loss at outputs in the place of those of the call."""
    args, kwargs = call.arguments(list(outputs))
    with as_called(call):
        value: Tensor = call.module.forward(*args, **kwargs)
    return value


def check_as_called(call: LossCall, scale: Tensor, node: Any) -> None:
    """Errors: `NNJError` for a loss of which the value or the gradient, when it is read again, are
    not those of the call. Torch's own, unchanged, need not be read.

    Args:
        scale: the gradient that arrived at the value.
        node: autograd's node of the value.
    """
    if is_as_it_was(call.module, call.state):
        return
    outputs = [call.leaves[i] for i in call.outputs]
    autocast = torch.autocast(
        scale.device.type, call.autocast, enabled=call.autocast is not None, cache_enabled=False
    )
    with torch.enable_grad(), autocast:
        leaves = [t.detach().requires_grad_() for t in outputs]
        value = read(call, leaves)
    if not isinstance(value, Tensor) or not _is_same([value.detach()], [call.value]):
        raise NNJError(
            f"{call.name} gives another value when it is called again: it draws random numbers, or "
            "an option, a hook or something in place has changed it. Draw random numbers outside "
            "of the loss and give them as an argument; change a loss after backward"
        )
    if not leaves:
        return
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, scale, allow_unused=True)
    again: dict[Edge, Tensor] = {}
    for edge, g in zip(call.edges, found, strict=True):
        if g is not None:
            again[edge] = again[edge] + g if edge in again else g
    if not _is_same(_by_output(call, again), gradient_of_call(call, scale, node)):
        raise NNJError(
            f"{call.name} has another gradient when it is called again, though its value is the "
            "same: an option, or a hook on a gradient inside it, has changed it. Change a loss "
            "after backward; put hooks on no tensor inside of it"
        )


def gradient_of_call(call: LossCall, scale: Tensor, node: Any) -> list[Tensor]:
    """The gradient of `(loss * scale).sum()` in each output, on autograd's graph of the call."""
    ends = {end for end, _ in call.edges}

    def run() -> dict[Edge, Tensor]:
        values: dict[Edge, Tensor] = {(node, call.output_nr): scale}
        above = lambda n: [] if n in ends else children(n)
        for step in topological([node], above):
            if step not in ends and leaf_of(step) is None:
                _cross(step, values)
        return values

    return _by_output(call, own_task(run))


def _by_output(call: LossCall, values: dict[Edge, Tensor]) -> list[Tensor]:
    """What stands on edges for each output; that of an output which was given twice stands at the
    first, with zeros at the second.
    """
    found, seen = [], set[Edge]()
    for index, edge in zip(call.outputs, call.edges, strict=True):
        there = None if edge in seen else values.get(edge)
        found.append(torch.zeros_like(call.leaves[index]) if there is None else there)
        seen.add(edge)
    return found


def _cross(node: Any, values: dict[Edge, Tensor]) -> None:
    """Let what has arrived at a node go on to its operands, as the engine does."""
    arrived = [values.pop((node, nr), None) for nr in range(len(node._input_metadata))]
    if all(t is None for t in arrived):
        return
    answers = call_node(node, [None if t is None else t[None] for t in arrived], 1)
    for edge, back in zip(edges(node), answers, strict=False):
        if edge is None or back is None:
            continue
        share = sum_to(back[0], shape_at(edge), 0).to(edge_dtype(edge))
        values[edge] = values[edge] + share if edge in values else share


def _is_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are the same but for the order of sums."""
    if any(one.shape != other.shape for one, other in zip(found, expected, strict=True)):
        return False
    near = [_near(one, other) for one, other in zip(found, expected, strict=True) if one.numel()]
    return not near or bool(torch.stack([t.to(near[0].device) for t in near]).all())


def _near(one: Tensor, other: Tensor) -> Tensor:
    """The same of two tensors, as a tensor without axes: all of it is asked at once."""
    tolerance = torch.finfo(other.dtype).eps ** 0.75
    wide = torch.complex128 if other.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    largest = torch.where(torch.isfinite(other), other, 0.0).abs().max()
    same = (one == other) | (one.isnan() & other.isnan())
    result: Tensor = (same | ((one - other).abs() <= tolerance * largest)).all()
    return result
