"""A second backward pass over the user's graph, which leaves everything as it was."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

from nnj.graph.nodes import refuse_freed
from nnj.graph.traverse import reachable
from nnj.recording.engine import Edge, behind_engine, is_engine
from nnj.recording.tensor_parallel import local_of, parallel_at

_FRAME: type = checkpoint._CheckpointFrame


def leaf_edge(leaf: Tensor) -> Edge:
    """The edge at which a leaf's gradient arrives, whatever functions of its own the leaf has."""
    with torch._C.DisableTorchFunctionSubclass():
        found = torch.autograd.graph.get_gradient_edge(leaf)
    return found.node, found.output_nr


class OnBothSides(Exception):
    """What is asked for is before and behind a node that belongs to an engine, so that autograd
    would run it.
    """


def engine_vjp(roots: dict[Edge, Tensor], inputs: list[Edge]) -> list[Tensor | None]:
    """Autograd's own gradients at some edges, with every hook on the way; sparse ones as plain
    tensors. The graph is kept.

    No node that belongs to an engine is run: what arrives at it goes on behind it.

    Errors: `OnBothSides` where that cannot be had."""
    before: Callable[[Any], list[Any]] = lambda n: [] if is_engine(n) else _children(n)
    met = set(reachable((node for node, _ in roots), before))
    owned = [node for node in met if is_engine(node)]
    if not owned:
        return _autograd(roots, inputs)
    behind = set(reachable((child for node in owned for child in _children(node)), _children))
    if any(node in behind and node in met for node in (*owned, *(node for node, _ in inputs))):
        raise OnBothSides
    ends = [(node, nr) for node in owned for nr in range(len(node._input_metadata))]
    near = [edge for edge in inputs if edge[0] not in behind]
    found = _autograd(roots, ends + near)
    arrived = dict[Edge, Tensor]()
    for end, u in zip(ends, found, strict=False):
        edge = behind_engine(end)
        if u is not None and edge is not None:
            arrived[edge] = arrived[edge] + u if edge in arrived else u
    answers = dict(zip(near, found[len(ends) :], strict=True))
    far = [edge for edge in inputs if edge[0] in behind]
    answers.update(zip(far, engine_vjp(arrived, far), strict=True))
    return [answers[edge] for edge in inputs]


def _children(node: Any) -> list[Any]:
    """The nodes to which autograd sends what a node makes of a gradient."""
    return [child for child, _ in node.next_functions if child is not None]


def _autograd(roots: dict[Edge, Tensor], inputs: list[Edge]) -> list[Tensor | None]:
    """What `torch.autograd.grad` gives."""
    if not inputs or not roots:
        return [None] * len(inputs)
    try:
        found: Any = torch.autograd.grad(
            [GradientEdge(*edge) for edge in roots],
            [GradientEdge(*edge) for edge in inputs],
            [_for_engine(edge, u) for edge, u in roots.items()],
            retain_graph=True,
            allow_unused=True,
        )
    except RuntimeError as error:
        refuse_freed(error)
        raise
    return [
        None if g is None else _from_engine(edge, g.to_dense() if g.is_sparse else g)
        for edge, g in zip(inputs, found, strict=True)
    ]


def _for_engine(edge: Edge, u: Tensor) -> Tensor:
    """A cotangent as autograd has it on an edge."""
    parallel = parallel_at(edge)
    return u if parallel is None else parallel.for_engine(u)


def _from_engine(edge: Edge, g: Tensor) -> Tensor:
    """A gradient as columns have it on an edge: of layers that are distributed, the part here."""
    return g if parallel_at(edge) is None else local_of(g)


class _Alive(NamedTuple):
    """What there is in the process: tensors that retain their .grad, whether a checkpoint may
    compute something anew, and hooks that may be removed, by themselves for instance.
    """

    retaining: list[Tensor]
    checkpoints: bool
    handles: list[RemovableHandle]

    @classmethod
    def now(cls) -> _Alive:
        tensor = _subclasses(Tensor)
        kinds = {_FRAME, RemovableHandle, *tensor}
        everything = gc.get_objects()
        found = list(compress(everything, map(kinds.__contains__, map(type, everything))))
        with torch._C.DisableTorchFunctionSubclass():
            retaining = [t for t in found if type(t) in tensor and _retains_grad(t)]
        handles = [thing for thing in found if type(thing) is RemovableHandle]
        return cls(retaining, any(type(thing) is _FRAME for thing in found), handles)

    def hooks(self) -> list[dict[Any, Any]]:
        """The tables in which the hooks are."""
        refs = [ref for h in self.handles for ref in (h.hooks_dict_ref, *h.extra_dict_ref)]
        return list({id(table): table for ref in refs if (table := ref()) is not None}.values())


def _retains_grad(t: Tensor) -> bool:
    try:
        return t.retains_grad
    except RuntimeError:  # of a tensor that is none, as DistributedDataParallel keeps in torch 2.6
        return False


def _subclasses(kind: type) -> set[type]:
    found = {kind}
    below: type
    for below in kind.__subclasses__():
        found |= _subclasses(below)
    return found


@contextmanager
def unharmed(
    modules: Iterable[nn.Module], devices: Iterable[torch.device]
) -> Iterator[Callable[[], None]]:
    """Afterwards the `.grad` of tensors that retain it, the generators, removed hooks and,
    over the recomputation of a checkpoint, buffers with their versions are what they were.

    All objects of the process are looked at, 10 to 50 ms where 300,000 are alive: once for each
    structure.

    Yields what gives hooks and `.grad` back in between: a hook that removes itself is there again.
    """
    alive = _Alive.now()
    grads = [(t, t.grad) for t in alive.retaining]
    hooks = [(table, dict(table)) for table in alive.hooks()]

    def give_back() -> None:
        for t, grad in grads:
            t.grad = grad
        for table, former in hooks:
            if table.keys() != former.keys():
                table.clear()
                table.update(former)

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
            yield give_back
        finally:
            random.setstate(state)
            give_back()
            with torch.no_grad():
                for b, version, value in before:
                    if b._version != version:
                        b.copy_(value)
