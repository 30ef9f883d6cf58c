"""Who it was, where a sweep is not what autograd computes: each step is compared with autograd's
own between the same edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.graph.acceptance import call_vjp
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import own_task, sum_to
from nnj.graph.step import Step, describe
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Cotangents, Sweep
from nnj.propagation.plan import device_of
from nnj.propagation.unharmed import ENGINE, engine_vjp, leaf_edge
from nnj.recording.records import Edge
from nnj.registry.blame import at_work, blame

SEED = 0x6E6E6A


class Tangents(NamedTuple):
    """Cotangents on the roots: on all rows, and on those of some `samples` (n,) alone."""

    whole: dict[Edge, Tensor]
    half: dict[Edge, Tensor]
    samples: Tensor

    def times(self, factor: float) -> Tangents:
        return Tangents(
            {edge: u * factor for edge, u in self.whole.items()},
            {edge: u * factor for edge, u in self.half.items()},
            self.samples,
        )

    def stacked(self) -> dict[Edge, Tensor]:
        """As two columns."""
        return {edge: torch.stack([u, self.half[edge]]) for edge, u in self.whole.items()}


def culprit(sweep: Sweep, tangents: Tangents, leaves: Sequence[Tensor], eps: float) -> NNJError:
    """The error for a sweep that differs from autograd: it names the first step that does."""
    graph = sweep.graph
    for fact in _Search(sweep, leaves, eps).facts(tangents):
        return NNJError(fact)
    reached = {leaf for step in graph.steps for leaf in (step.leaf, *(p for _, p in step.params))}
    for leaf in leaves:
        if leaf not in reached:
            return NNJError(
                f"{_name(leaf, graph.paths)} gets a gradient from autograd by a way that nnj does "
                "not see: a layer or a function on the way to it is not what its name says. "
                "Freeze the parameter, or leave it out of modules="
            )
    return NNJError(
        "what nnj computes is not what autograd does, though each step by itself is the same: a "
        "function whose backward is not its forward's, or that keeps a state, or a gradient hook. "
        "Take it out of the model for this pass"
    )


def _name(leaf: Tensor, paths: Mapping[nn.Module, str]) -> str:
    for module, path in paths.items():
        for name, p in module._parameters.items():
            if p is leaf:
                return f"parameter '{path}.{name}'" if path else f"parameter '{name}'"
    return "the input" if not isinstance(leaf, nn.Parameter) else "a parameter"


class _Search:
    """Goes over the steps in the order of the sweep."""

    def __init__(self, sweep: Sweep, leaves: Sequence[Tensor], eps: float):
        self.sweep, self.graph, self.leaves, self.eps = sweep, sweep.graph, leaves, eps
        self.generator = torch.Generator().manual_seed(SEED)

    def facts(self, tangents: Tangents) -> Iterator[str]:
        """What is wrong, likeliest first."""
        steps = [s for s in self.graph.steps if s.record is not None or s.name not in ENGINE]
        for step in steps:
            yield from self._hooks(step)
        for step in steps:
            yield from self._rule(step) if step.record is not None else self._node(step)
        yield from self._own_hooks()
        yield from self._mixing(tangents)

    def _random(self, edge: Edge) -> Tensor:
        shape, dtype = self.graph.shapes[edge], self.graph.dtypes[edge]
        u = torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5
        return u.to(device_of(edge), dtype)

    def _differ(self, ours: Tensor | None, theirs: Tensor | None) -> bool:
        if ours is None or theirs is None:
            there = theirs if ours is None else ours
            return there is not None and bool(there.any())
        if ours.shape != theirs.shape:
            return True
        if not ours.numel():
            return False
        gap, size = (
            (ours - theirs.to(ours.dtype)).abs().max(),
            torch.maximum(ours.abs().max(), theirs.abs().max()),
        )
        return bool(gap > 2 * self.eps**0.5 * size)

    # -- hooks on tensors --------------------------------------------------------------------------

    def _hooks(self, step: Step) -> Iterator[str]:
        """Hooks on the tensors that a step gives: what goes in and out at the same edge."""
        for edge in step.into:
            u = self._random(edge)
            found = _engine({edge: u}, [edge])
            if found is not None and self._differ(u, found[0]):
                what = "the output of " if step.leaf is None else ""
                who = (
                    describe(step, self.graph.paths)
                    if step.leaf is None
                    else _name(step.leaf, self.graph.paths)
                )
                yield _hook(f"on {what}{who}")

    def _own_hooks(self) -> Iterator[str]:
        """Hooks on parameters, of which autograd's own gradient is another."""
        for leaf in self.leaves:
            u = torch.ones_like(leaf, requires_grad=False).detach()
            found = _engine({leaf_edge(leaf): u}, [leaf_edge(leaf)])
            if found is not None and self._differ(u, found[0]):
                yield _hook(f"on {_name(leaf, self.graph.paths)}")

    # -- steps -------------------------------------------------------------------------------------

    def _rule(self, step: Step) -> Iterator[str]:
        """A record: its rule against the nodes of the call, and these against the engine, which
        calls hooks.
        """
        record = step.record
        assert record is not None and step.dtype is not None
        u = self._random(step.into[0])
        who = blame(record.entry, record.module, self.graph.paths.get(record.module, ""))
        walked = own_task(lambda: call_vjp(step.node, record, u))
        if walked is None:
            yield _not_described(
                who, at_work(record.entry.source), "its output depends on other tensors"
            )
            return
        at_input, at_leaves = walked
        back = None
        if step.out[0] is not None:
            back = step.slots["input"].vjp(u[None].to(step.dtype))[0]
            if self._differ(back, at_input):
                yield _not_described(
                    who, at_work(record.entry.source), "autograd has another gradient at its input"
                )
        shared: dict[Tensor, Tensor] = {}
        for slot, p in step.params:
            factor = step.slots[slot].pullback(u[None].to(step.dtype), SampleIndex(len(u)))
            total = factor.rmatvec(torch.ones(1, factor.n, dtype=factor.dtype, device=u.device))
            shared[p] = shared[p] + total if p in shared else total
        for slot, p in step.params:
            if self._differ(shared[p], at_leaves.get(p)):
                yield _not_described(
                    who,
                    at_work(record.entry.source),
                    f"autograd has another gradient at its {slot!r}",
                )
        if back is not None and step.out[0] is not None:
            found = _engine({step.into[0]: u}, [step.out[0]])
            if found is not None and self._differ(back, found[0]):
                yield _hook(f"in, or on the input of, {describe(step, self.graph.paths)}")

    def _node(self, step: Step) -> Iterator[str]:
        """A node of autograd by itself, and as the engine runs it."""
        edges = [e for e in step.out if e is not None]
        if step.leaf is not None or not edges:
            return
        given = {edge: self._random(edge) for edge in step.into}
        args: list[Tensor | None] = [None] * len(step.node._input_metadata)
        for (_, number), u in given.items():
            args[number] = u[None]
        answers = own_task(lambda: call_node(step.node, args, 1))
        found = _engine(given, edges)
        if found is None:
            return
        theirs = dict(zip(edges, found, strict=True))
        ours: dict[Edge, Tensor] = {}
        for edge, back in zip(step.out, answers, strict=False):
            if edge is not None and back is not None:
                share = sum_to(back, self.graph.shapes[edge], 1)[0]
                ours[edge] = ours[edge] + share if edge in ours else share
        for edge in edges:
            if self._differ(ours.get(edge), theirs[edge]):
                yield _hook(f"at {describe(step, self.graph.paths)}, or on what goes into it")

    # -- rows that mix -----------------------------------------------------------------------------

    def _mixing(self, tangents: Tangents) -> Iterator[str]:
        """The step behind which a cotangent on some samples is on others, too."""
        seen: list[Step] = []

        def walk() -> None:
            values = Cotangents({edge: u[None] for edge, u in tangents.half.items()})
            for step in self.graph.steps:
                self.sweep.cross(step, values, 1, None)
                out = [e for e in step.out if e is not None and e in values]
                if any(self._foreign(e, values[e], tangents.samples) for e in out):
                    seen.append(step)
                    return

        own_task(walk)
        for step in seen:
            yield (
                f"samples influence one another at {describe(step, self.graph.paths)}, whose name "
                "says that they do not: a function whose backward is not its forward's, or that is "
                "not what its name says. Give it another name, or take it out of the model"
            )

    def _foreign(self, edge: Any, v: Tensor, samples: Tensor) -> bool:
        """Whether there is something at entries of other samples."""
        index = self.sweep.state[edge]
        if index is None:
            return False
        mine = samples.to(v.device)
        if index.by_column:
            outside = ~mine if len(v) == len(mine) else mine.new_zeros(len(v))
            return self._beyond(v, outside.reshape(-1, *[1] * (v.dim() - 1)))
        of = index.of
        if of is None:
            of = torch.arange(v.shape[1], device=v.device) // (v.shape[1] // index.n)
            of = of.reshape(-1, *[1] * (v.dim() - 2))
        return self._beyond(v[0], ~mine[of.clamp(min=0)] & (of >= 0))

    def _beyond(self, v: Tensor, outside: Tensor) -> bool:
        if not v.numel():
            return False
        return bool(((v.abs() > self.eps**0.5 * v.abs().max()) & outside).any())


def _engine(roots: dict[Any, Tensor], inputs: list[Any]) -> list[Tensor | None] | None:
    """`engine_vjp`; None where autograd cannot start or end at these edges."""
    try:
        return engine_vjp(roots, inputs)
    except (RuntimeError, TypeError):
        return None


def _hook(where: str) -> str:
    return (
        f"a gradient hook {where} changes the gradient, which columns do not go through. Write "
        "what it does as a function of the forward pass, or remove the hook while nnj collects"
    )


def _not_described(who: str, whose: str, fact: str) -> str:
    return (
        f"{who}: the rule does not say what this call does: {fact}. Either the rule is wrong, or "
        "the layer does something else than its class (a patched forward or function, a parameter "
        f"with functions of its own){whose}"
    )
