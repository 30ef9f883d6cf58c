"""A second backward pass over the user's graph, which leaves everything as it was."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import checkpoint

from nnj.graph.nodes import refuse_freed
from nnj.recording.records import Edge

# Functions that belong to an engine, which counts on it that they run once in a pass: with respect
# to the model they are the identity.
ENGINE = frozenset({"_DDPSinkBackward"})
_FRAME: type = checkpoint._CheckpointFrame


def behind_engine(edge: Edge) -> Edge | None:
    """Where an edge leads behind nodes that belong to an engine; None for nowhere."""
    while edge[0].name() in ENGINE:
        edge = edge[0].next_functions[edge[1]]
        if edge[0] is None:
            return None
    return edge


def leaf_edge(leaf: Tensor) -> Edge:
    """The edge at which a leaf's gradient arrives, whatever functions of its own the leaf has."""
    with torch._C.DisableTorchFunctionSubclass():
        found = torch.autograd.graph.get_gradient_edge(leaf)
    return found.node, found.output_nr


def engine_vjp(roots: dict[Edge, Tensor], inputs: list[Edge]) -> list[Tensor | None]:
    """Autograd's own gradients at some edges, with every hook on the way; sparse ones as plain
    tensors. The graph is kept.
    """
    if not inputs or not roots:
        return [None] * len(inputs)
    try:
        found: Any = torch.autograd.grad(
            [GradientEdge(*edge) for edge in roots],
            [GradientEdge(*edge) for edge in inputs],
            list(roots.values()),
            retain_graph=True,
            allow_unused=True,
        )
    except RuntimeError as error:
        refuse_freed(error)
        raise
    return [None if g is None else g.to_dense() if g.is_sparse else g for g in found]


class _Alive(NamedTuple):
    """What there is in the process: tensors that retain their .grad, and whether a checkpoint may
    compute something anew.
    """

    retaining: list[Tensor]
    checkpoints: bool

    @classmethod
    def now(cls) -> _Alive:
        tensor = _subclasses(Tensor)
        kinds = {_FRAME, *tensor}
        found = [thing for thing in gc.get_objects() if type(thing) in kinds]
        with torch._C.DisableTorchFunctionSubclass():
            retaining = [t for t in found if type(t) in tensor and t.retains_grad]
        return cls(retaining, any(type(thing) is _FRAME for thing in found))


def _subclasses(kind: type) -> set[type]:
    found = {kind}
    below: type
    for below in kind.__subclasses__():
        found |= _subclasses(below)
    return found


@contextmanager
def unharmed(modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> Iterator[None]:
    """Afterwards the `.grad` of tensors that retain it, the generators and, over the recomputation
    of a checkpoint, buffers with their versions are what they were.

    All tensors of the process are looked at, which takes some milliseconds: once for each
    structure.
    """
    alive = _Alive.now()
    grads = [(t, t.grad) for t in alive.retaining]
    buffers: list[Tensor] = []
    if alive.checkpoints:
        buffers = list(
            dict.fromkeys(b for m in modules for b in m._buffers.values() if b is not None)
        )
    before = [(b, b._version, b.detach().clone()) for b in buffers]
    state = random.getstate()
    cuda = [d.index or 0 for d in dict.fromkeys(devices) if d.type == "cuda"]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        keep: Any = torch.autograd
        for b in buffers:  # older torch takes one at a time
            stack.enter_context(keep._unsafe_preserve_version_counter(b))
        try:
            yield
        finally:
            random.setstate(state)
            for t, grad in grads:
                t.grad = grad
            with torch.no_grad():
                for b, version, value in before:
                    if b._version != version:
                        b.copy_(value)
