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


@dataclass(eq=False)
class Point:
    """A tensor of a call, detached, and the version that it had; only its shape where the rule does not read it."""

    shape: torch.Size
    dtype: torch.dtype
    value: Tensor | None
    version: int
    place: tuple[Any, ...]  # where its numbers are

    @classmethod
    def of(cls, t: Tensor, keep: bool) -> Point:
        return cls(t.shape, t.dtype, t.detach() if keep else None, t._version, place_of(t))

    def tensor(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta") if self.value is None else self.value

    @property
    def stale(self) -> bool:
        """Whether something was written over the value after the call."""
        return self.value is not None and self.value._version != self.version


@dataclass(eq=False)
class Record:
    """One call of a module with a rule: from the edge of its output straight to the edge of its input."""

    module: nn.Module
    entry: Entry
    x: Point
    y: Point
    edge: Edge | None
    state: list[Any]

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
        found += [v for k, v in part.__dict__.items() if k[0] != "_" and isinstance(v, _PLAIN)]
        for t in (*part._parameters.values(), *part._buffers.values()):
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
        return tree_unflatten(leaves, self.spec)


def edge_of(t: Tensor) -> Edge | None:
    """The gradient edge of a tensor; None where no gradient flows."""
    if not t.requires_grad:
        return None
    if t.grad_fn is not None:
        return t.grad_fn, t.output_nr
    found = torch.autograd.graph.get_gradient_edge(t)
    return found.node, found.output_nr


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
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors(getattr(value, name))]
    return []
