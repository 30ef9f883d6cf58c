"""Autograd's nodes and edges: their names, shapes, leaves and saved tensors; backward passes of our
own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.recording.engine import Edge, behind_engine
from nnj.recording.records import Record

T = TypeVar("T")


def edge_shape(edge: Edge) -> tuple[int, ...]:
    """The shape of the tensor on an edge."""
    return tuple(edge[0]._input_metadata[edge[1]].shape)


def shape_at(edge: Edge) -> tuple[int, ...]:
    """The same as columns have it: of the output of a layer that is distributed, that of its part
    on this rank.
    """
    record = None if isinstance(edge[0], LEAF) else Record.of(*edge)
    part = record is not None and record.parallel is not None
    return tuple(record.y.shape) if record is not None and part else edge_shape(edge)


def edge_dtype(edge: Edge) -> torch.dtype:
    """The dtype of the tensor on an edge."""
    result: torch.dtype = edge[0]._input_metadata[edge[1]].dtype
    return result


def node_name(node: Any) -> str:
    """The name of an operation of torch: 'Add' for the node AddBackward0.

    Functions in Python keep their "Backward", which has no number, so that none of them is taken
    for an operation of torch whose name it has: what these do is known, what it does is not."""
    return _short(node.name())


@functools.cache
def _short(name: str) -> str:
    return re.sub(r"Backward\d+$", "", name.rsplit("::", 1)[-1])


# the node that adds a gradient to the .grad of a leaf
LEAF: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


def leaf_of(node: Any) -> Tensor | None:
    """The leaf whose gradient a node accumulates; None for the node of an operation.

    By the type of the node: a function in Python may have an attribute `variable` of its own."""
    return node.variable if type(node) is LEAF else None


def edges(node: Any) -> list[Edge | None]:
    """Where a node sends what it makes of a gradient, behind nodes that belong to an engine; None
    for nowhere.
    """
    return [None if n is None else behind_engine((n, nr)) for n, nr in node.next_functions]


_IN_PYTHON: Any = torch.autograd.function.BackwardCFunction


def is_alive(node: Any) -> bool:
    """Whether a node is still part of a graph, and may be asked for anything.

    What we hold of a node keeps it, and all that is behind it, but for a function in Python in
    older torch: that one dies with the last tensor or node of torch's own that leads to it, and
    asking it for its shapes ends the process."""
    if not isinstance(node, _IN_PYTHON):
        return True
    try:
        node.name()
    except RuntimeError:
        return False
    return True


def signed(number: int) -> int:
    """A saved axis or index, which autograd shows as an unsigned number."""
    return number - 2**64 if number >= 2**63 else number


def saved(node: Any, name: str) -> Tensor:
    """A tensor that a node has saved. Errors: `NNJError` if an earlier pass has freed it."""
    try:
        found: Tensor = getattr(node, f"_saved_{name}")
    except RuntimeError as error:
        refuse_freed(error)
        raise
    return found


def refuse_freed(error: RuntimeError) -> None:
    """Errors: `NNJError` if the error of a node means that its saved tensors are gone."""
    if "second time" in str(error):
        raise NNJError(
            "the graph was freed by an earlier backward pass; use retain_graph=True there"
        ) from error


def sum_to(t: Tensor, shape: tuple[int, ...], free: int) -> Tensor:
    """Sum the broadcast axes of t away, behind `free` leading axes, as the engine does."""
    extra = t.dim() - free - len(shape)
    if extra > 0:
        t = t.sum(tuple(range(free, free + extra)))
    axes = tuple(free + i for i, s in enumerate(shape) if s == 1 and t.shape[free + i] != 1)
    return t.sum(axes, keepdim=True) if axes else t


def own_task(run: Callable[[], T]) -> T:
    """Run something inside a backward pass of its own: checkpointed tensors can be unpacked only
    once in each.
    """
    result: list[T] = []
    with torch.enable_grad():
        within: Any = _Within.apply
        start = within(torch.zeros((), requires_grad=True), lambda: result.append(run()))
        # kept, since compiled functions free what they saved by what the pass that runs says
        torch.autograd.backward(start, retain_graph=True)
    return result[0]


class _Within(torch.autograd.Function):
    """The identity, of which the backward pass does something beside. No hook: those that were
    registered since the forward pass are counted, to know of the user's (`verification`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[], None]) -> Tensor:
        ctx.run = run
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.no_grad():
            ctx.run()
        return None, None
