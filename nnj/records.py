"""What a forward pass leaves on autograd's graph: records of layers, marks of calls, and the call of a loss."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from nnj.plugins import Entry

RECORD, MARK = "nnj.record", "nnj.call"
Edge = tuple[Any, int]  # (grad_fn, output_nr)


def place_of(t: Tensor) -> tuple[Any, ...]:
    """Where the numbers of a tensor are: another tensor with the same place is the same, seen in the same way."""
    return (t.untyped_storage().data_ptr(), t.data_ptr(), t.shape, t.stride()) if t.layout == torch.strided else (id(t),)


class Point:
    """A tensor of a call, detached, and the version that it had; only its shape where the rule does not read it.

    Attributes:
        place: where its numbers are, if they may be those that were given to the model: nothing has computed them from such.
    """

    __slots__ = ("dtype", "place", "shape", "value", "version")

    def __init__(self, t: Tensor, keep: bool, version: int):
        self.shape, self.dtype, self.version = t.shape, t.dtype, version
        self.value = t.detach() if keep else None
        self.place = place_of(t) if t.grad_fn is None or t._is_view() else None

    def tensor(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta") if self.value is None else self.value

    @property
    def stale(self) -> bool:
        """Whether something was written over the value after the call."""
        return self.value is not None and self.value._version != self.version


class Record:
    """One call of a module with a rule: from the edge of its output straight to the edge of its input."""

    __slots__ = ("edge", "entry", "module", "state", "x", "y")

    def __init__(self, module: nn.Module, entry: Entry, x: Point, y: Point, edge: Edge | None):
        self.module, self.entry, self.x, self.y, self.edge = module, entry, x, y, edge
        self.state = layer_state(module)

    @property
    def stale(self) -> bool:
        """Whether the module is no longer as it was in the call, or what the rule reads was written over."""
        if self.x.stale or self.y.stale:
            return True
        now = layer_state(self.module)
        return len(now) != len(self.state) or any(
            a is not b if isinstance(a, Tensor) else a != b for a, b in zip(now, self.state, strict=True))


_PLAIN = (bool, int, float, str, tuple, type(None))


def layer_state(module: nn.Module) -> list[Any]:
    """What a rule reads of a layer beside x and y: its mode and options, its tensors and their versions."""
    parts = module.modules() if module._modules else (module,)
    found: list[Any] = []
    for part in parts:
        own = part.__dict__
        found += [v for k, v in own.items() if k[0] != "_" and isinstance(v, _PLAIN)]
        for t in own["_parameters"].values():
            if t is not None:
                found += (t, t._version)
        for t in own["_buffers"].values():
            if t is not None:
                found += (t, t._version)
    return found


@dataclass(eq=False)
class CallMark:
    """An outermost call of an extended module: its batch says what a sample is."""

    module: nn.Module
    sizes: list[int]  # the lengths of the batch axis of its arguments, each once
    inputs: list[Tensor]  # its arguments, detached
    batch_axis: int
    order: int


@dataclass(eq=False)
class LossCall:
    """One call of an extended loss: its arguments, detached, and the edges of those that are outputs of a model."""

    module: nn.Module
    name: str  # of the loss, for errors
    leaves: list[Any]
    spec: Any
    outputs: list[int]  # which leaves are outputs of a model
    edges: list[Edge]
    versions: list[tuple[Tensor, int]]
    thread: int
    value: Tensor

    def arguments(self, outputs: list[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """(args, kwargs) of the call with other outputs in place of the model's."""
        leaves = list(self.leaves)
        for index, t in zip(self.outputs, outputs, strict=True):
            leaves[index] = t
        return (leaves, {}) if self.spec is None else tree_unflatten(leaves, self.spec)


def edge_of(t: Tensor) -> Edge | None:
    """The gradient edge of a tensor; None where no gradient flows."""
    if not t.requires_grad:
        return None
    if t.grad_fn is not None:
        return t.grad_fn, t.output_nr
    found = torch.autograd.graph.get_gradient_edge(t)
    return found.node, found.output_nr


def inert() -> bool:
    """Under no_grad, torch.func transforms and tracing there is no graph of ours to write on."""
    return (not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None
            or torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling())


def write(node: Any, key: tuple[str, int], value: Any) -> None:
    """Put something on a node of autograd's graph."""
    node.metadata[key] = value


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and objects with fields."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors(v)]
    if hasattr(type(value), "__dataclass_fields__"):  # of the type: a proxy of torch.fx has every attribute
        return [t for name in value.__dataclass_fields__ for t in tensors(getattr(value, name))]
    return []
