"""Hooks that change gradients, on tensors, parameters and layers: what they do to columns, where
that is linear.

A hook stands on an edge of autograd's graph, and is a map h of what arrives there. The engine runs
it, and nothing else, where the gradient at an edge is asked of a gradient at the same edge. Nobody
can say that a function is linear: it is asked with random gradients, small and large, of both
signs, and what comes of it is compared with autograd afterwards (`verification`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from typing_extensions import override

from nnj.generators import OwnGenerator
from nnj.graph.builder import Graph
from nnj.jacobians.factor import DenseFactor, Factor
from nnj.propagation.plan import device_of
from nnj.propagation.unharmed import leaf_edge
from nnj.recording.records import Edge

LARGE = 1024.0  # how much larger, and how much smaller, a gradient is with which a hook is asked
OF_MODULE = "BackwardHookFunctionBackward"  # torch's node before and behind a module with hooks
ROUNDINGS = 64  # so many may lie between two ways of computing one product


class EdgeMap:
    """What the hooks on an edge do to a gradient that arrives there.

    Args:
        edge: where they are.
        give_back: that of `unharmed`, called after each time that they were.

    Attributes:
        scale: d, of the shape of the edge, where h(v) = d v; None where h is another map.
    """

    def __init__(self, edge: Edge, give_back: Callable[[], None]):
        self.edge, self.give_back = edge, give_back
        self.scale: Tensor | None = None
        meta = edge[0]._input_metadata[edge[1]]
        self.shape, self.dtype = tuple(meta.shape), meta.dtype

    def __call__(self, columns: Tensor) -> Tensor:
        """(*lead, *shape) -> the same. A hook is given one gradient at a time, as it always is:
        what it keeps or asks of it may not be a part of vmap.
        """
        if self.scale is not None:
            return columns * self.scale.to(columns.dtype)
        rows = columns.reshape(-1, *self.shape).to(self.dtype)
        if not len(rows):
            return columns
        return (
            torch.stack([self.engine(row) for row in rows]).to(columns.dtype).reshape(columns.shape)
        )

    def engine(self, v: Tensor) -> Tensor:
        """h(v), as autograd's engine runs it."""
        at = GradientEdge(*self.edge)
        try:  # a hook may write over what it is given
            (found,) = torch.autograd.grad([at], [at], [v.clone()], retain_graph=True)
        finally:
            self.give_back()
        return found.to_dense() if found.is_sparse else found

    def find_scale(self, generator: torch.Generator) -> None:
        """Note whether h multiplies each entry by a number of its own: masks and factors do."""
        u = self.random(generator)
        d, found = self.engine(torch.ones_like(u)), self.engine(u)
        slack = ROUNDINGS * torch.finfo(self.dtype).eps
        if bool(((found - d * u).abs() <= slack * (d * u).abs()).all()):
            self.scale = d.detach().clone()

    def is_identity(self, generator: torch.Generator) -> bool:
        u = self.random(generator)
        return torch.equal(self.engine(u), u)

    def is_linear(self, generator: torch.Generator) -> bool:
        """Whether h(a u + v) = a h(u) + h(v), for a that is large, small, and negative, and
        h(0) = 0.
        """
        u, v = self.random(generator), self.random(generator)
        hu, hv = self.engine(u), self.engine(v)
        if bool(self.engine(torch.zeros_like(u)).any()):
            return False
        large = LARGE if self.dtype != torch.float16 else 16.0
        scales: list[complex] = [large, -large, 1 / large, -1 / large]
        if self.dtype.is_complex:
            scales += [1j, -1j * large]
        slack = torch.finfo(self.dtype).eps ** 0.5
        for a in scales:
            for w, hw in ((v, hv), (0 * v, 0 * hv)):
                expected = a * hu + hw
                gap = (self.engine(a * u + w) - expected).abs().max()
                if not bool(gap <= slack * expected.abs().max()):
                    return False
        return True

    def random(self, generator: torch.Generator) -> Tensor:
        """A gradient without zeros, with entries of both signs."""
        draw = torch.complex128 if self.dtype.is_complex else torch.float64
        u = torch.rand(2, *self.shape, generator=generator, dtype=torch.float64) - 0.5
        u = u.sign() * (0.5 + u.abs())
        found = torch.complex(u[0], u[1]) if draw.is_complex else u[0]
        return found.to(device_of(self.edge), self.dtype)


class ModuleMap(EdgeMap):
    """What hooks of a module do to a gradient that has come through the hooks on an edge.

    A node that torch puts before and behind a module runs them, with what the other of both has
    noted: they are called here, and `verification` says whether that is what the engine does.

    Args:
        run: one hook of a module, (hook, (g,)) -> what it gives.
    """

    def __init__(
        self,
        edge: Edge,
        give_back: Callable[[], None],
        hooks: Iterable[Callable[..., Any]],
        run: Callable[[Callable[..., Any], tuple[Tensor]], Any],
    ):
        super().__init__(edge, give_back)
        self.hooks, self.run = list(hooks), run

    @override
    def engine(self, v: Tensor) -> Tensor:
        given = (super().engine(v),)
        for hook in self.hooks:
            found = self.run(hook, given)
            if found is None:
                continue
            if not isinstance(found, tuple) or len(found) != 1 or found[0] is None:
                raise RuntimeError("a hook of a module gives something else than one gradient")
            given = found
        self.give_back()
        return given[0]


def _module_maps(
    graph: Graph, generator: torch.Generator, give_back: Callable[[], None]
) -> dict[Edge, EdgeMap]:
    """Those of the hooks of layers with a record, at torch's nodes around them."""
    found: dict[Edge, EdgeMap] = {}
    around = {
        edge: step for step in graph.steps if step.name == OF_MODULE for edge in step.out if edge
    }
    for step in graph.steps:
        if step.record is None:
            continue
        module, inside = step.record.module, step.out[0]
        for edge in step.into:
            if edge in around and (hooks := module._get_backward_pre_hooks()):
                run = lambda hook, given, m=module: hook(m, given)
                (above,) = around[edge].into
                found[above] = ModuleMap(above, give_back, hooks, run)
        if inside is not None and graph.step_at(inside).name == OF_MODULE:
            output = EdgeMap(step.into[0], give_back)
            # of random gradients of the output, so that one that asks for these is not linear
            last = lambda hook, given, m=module, y=output: hook(m, given, (y.random(generator),))
            found[inside] = ModuleMap(inside, give_back, module._get_backward_hooks()[0], last)
    return found


class HookedFactor(Factor):
    """h of each row of another factor's B; of few columns at a time, as all chunks are.

    Args:
        factor: B at a parameter.
        hook: h, at the edge of the parameter.
    """

    def __init__(self, factor: Factor, hook: EdgeMap):
        self.factor, self.hook = factor, hook
        self.k, self.n, self.shape = factor.k, factor.n, factor.shape
        self.device, self.dtype = factor.device, factor.dtype

    @override
    def dense(self) -> Tensor:
        return self.hook(self.factor.dense())

    @override
    def columns(self, which: slice) -> Factor:
        return DenseFactor(self.hook(self.factor.columns(which).dense()))


class Hooks(NamedTuple):
    """Linear hooks that change gradients.

    Attributes:
        at_edges: on tensors between steps.
        at_leaves: on parameters.
    """

    at_edges: dict[Edge, EdgeMap]
    at_leaves: dict[Tensor, EdgeMap]

    def __bool__(self) -> bool:
        return bool(self.at_edges or self.at_leaves)

    def factor(self, p: Tensor, factor: Factor) -> Factor:
        """What stands at a parameter behind its hooks."""
        hook = self.at_leaves.get(p)
        if hook is None:
            return factor
        return HookedFactor(factor, hook) if hook.scale is None else factor.scale(hook.scale)


NONE = Hooks({}, {})


def _taken(hook: EdgeMap, generator: torch.Generator) -> bool:
    """Whether columns may go through the hooks of a module. If not, its other hooks are not at
    fault.
    """
    try:
        return hook.is_linear(generator)
    except (RuntimeError, TypeError):
        return False


def find_hooks(graph: Graph, leaves: Iterable[Tensor], give_back: Callable[[], None]) -> Hooks:
    """The hooks on the edges between the steps of a graph and at some leaves, as far as they change
    gradients; `NONE` where one of them is not linear.

    To be called where whatever hooks do does no harm (`unharmed`)."""
    generator = OwnGenerator.seeded()
    of_modules = _module_maps(graph, generator, give_back)

    def changing(edge: Edge) -> EdgeMap | None:
        """What hooks on an edge do; None where they leave a gradient as it is, and where autograd
        cannot be asked.
        """
        try:
            hook = of_modules.get(edge) or EdgeMap(edge, give_back)
            return None if hook.is_identity(generator) else hook
        except (RuntimeError, TypeError):
            return None

    edges = [e for step in graph.steps if step.leaf is None for e in step.into]
    at_edges = {
        edge: h
        for edge in edges
        if (h := changing(edge)) is not None and (edge not in of_modules or _taken(h, generator))
    }
    at_leaves = {p: h for p in leaves if (h := changing(leaf_edge(p))) is not None}
    found = [*at_edges.values(), *at_leaves.values()]
    try:
        if not all(h.is_linear(generator) for h in found):
            return NONE
        for h in found:
            h.find_scale(generator)
    except RuntimeError:  # of the hook, which does not take what may arrive
        return NONE
    return Hooks(at_edges, at_leaves)
