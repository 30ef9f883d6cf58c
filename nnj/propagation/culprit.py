"""Who it was, where a sweep is not what autograd computes: each step is compared with autograd's
own between the same edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.generators import OwnGenerator
from nnj.graph.acceptance import call_vjp
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import own_task, sum_to
from nnj.graph.step import Step, describe
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Cotangents, Sweep
from nnj.propagation.hooks import NONE, EdgeMap
from nnj.propagation.plan import device_of
from nnj.propagation.unharmed import OnBothSides, engine_vjp, leaf_edge
from nnj.recording.records import Edge
from nnj.registry.blame import at_work, blame


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


def culprit(
    sweep: Sweep,
    tangents: Tangents,
    leaves: Sequence[Tensor],
    eps: float,
    give_back: Callable[[], None],
) -> NNJError:
    """The error for a sweep that differs from autograd: it names the first step that does.
    `give_back` is that of `unharmed`.
    """
    graph = sweep.graph
    for fact in _Search(sweep, leaves, eps, give_back).facts(tangents):
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


def differs(
    sweep: Sweep,
    tangents: Tangents,
    leaves: Sequence[Tensor],
    eps: float,
    give_back: Callable[[], None],
) -> bool:
    """Whether a step by itself differs from autograd's; the arguments are those of `culprit`."""
    search = _Search(sweep, leaves, eps, give_back)
    return next(search.facts(tangents), None) is not None


def _name(leaf: Tensor, paths: Mapping[nn.Module, str]) -> str:
    for module, path in paths.items():
        for name, p in module._parameters.items():
            if p is leaf:
                return f"parameter '{path}.{name}'" if path else f"parameter '{name}'"
    return "the input" if not isinstance(leaf, nn.Parameter) else "a parameter"


class _Search:
    """Goes over the steps in the order of the sweep."""

    def __init__(
        self,
        sweep: Sweep,
        leaves: Sequence[Tensor],
        eps: float,
        give_back: Callable[[], None],
    ):
        self.sweep, self.graph, self.leaves, self.eps = sweep, sweep.graph, leaves, eps
        self.give_back = give_back
        self.generator = OwnGenerator.seeded()
        self.hooks = sweep.hooks or NONE  # those through which columns go

    def facts(self, tangents: Tangents) -> Iterator[str]:
        """What is wrong, likeliest first."""
        steps = self.graph.steps
        # of two hooks the one that is not linear is at fault
        yield from sorted(self._hooks(), key=lambda fact: LINEAR in fact)
        for step in steps:
            yield from self._rule(step) if step.record is not None else self._node(step)
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

    def _hooks(self) -> Iterator[str]:
        """Hooks on the tensors that steps give and on parameters, but for those through which
        columns go: what goes in and out at the same edge.
        """
        for step in self.graph.steps:
            for edge in step.into if step.leaf is None else ():
                if edge not in self.hooks.at_edges:
                    yield from self._hook_at(edge, self._on(step))
        for leaf in self.leaves:
            if leaf not in self.hooks.at_leaves:
                yield from self._hook_at(leaf_edge(leaf), f"on {_name(leaf, self.graph.paths)}")

    def _on(self, step: Step) -> str:
        return f"on the output of {describe(step, self.graph.paths)}"

    def _hook_at(self, edge: Edge, where: str) -> Iterator[str]:
        hook = EdgeMap(edge, self.give_back)
        u = hook.random(self.generator)
        found = _engine({edge: u}, [edge])
        self.give_back()
        if found is None or not self._differ(u, found[0]):
            return
        try:
            linear = hook.is_linear(self.generator)
        except RuntimeError:  # of the hook
            linear = False
        yield _hook(where) if linear else _hook_not_linear(where)

    def _through(self, edge: Edge, v: Tensor) -> Tensor:
        """What columns are behind the hooks of an edge."""
        hook = self.hooks.at_edges.get(edge)
        return v if hook is None else hook(v)

    # -- steps -------------------------------------------------------------------------------------

    def _rule(self, step: Step) -> Iterator[str]:
        """A record: its rule against the nodes of the call, and these against the engine, which
        calls hooks.
        """
        record = step.record
        assert record is not None and step.dtype is not None
        given = self._random(step.into[0])
        u = self._through(step.into[0], given)
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
            found = _engine({step.into[0]: given}, [step.out[0]])
            if found is not None and self._differ(self._through(step.out[0], back), found[0]):
                yield _hook(f"in, or on the input of, {describe(step, self.graph.paths)}")

    def _node(self, step: Step) -> Iterator[str]:
        """A node of autograd by itself, and as the engine runs it."""
        edges = self._reached_once([e for e in step.out if e is not None])
        if step.leaf is not None or not edges:
            return
        given = {edge: self._random(edge) for edge in step.into}
        args: list[Tensor | None] = [None] * len(step.node._input_metadata)
        for into, u in given.items():
            args[into[1]] = self._through(into, u)[None]
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
            back = ours.get(edge)
            back = None if back is None else self._through(edge, back)
            if self._differ(back, theirs[edge]):
                yield _hook(f"at {describe(step, self.graph.paths)}, or on what goes into it")

    def _reached_once(self, edges: list[Edge]) -> list[Edge]:
        """Those of a node to which no other one leads, as the branch of a residual layer leads to
        its input: the engine would add up both ways.
        """
        if len(set(edges)) < 2:
            return edges
        below: dict[Edge, set[Edge]] = {}
        for start in set(edges):
            reached = {start}
            for step in self.graph.steps:  # in the order of the sweep
                if not reached.isdisjoint(step.into):
                    reached |= {out for out in step.out if out is not None}
            below[start] = reached
        return [e for e in edges if not any(e in below[o] for o in below if o != e)]

    # -- rows that mix -----------------------------------------------------------------------------

    def _mixing(self, tangents: Tangents) -> Iterator[str]:
        """The step behind which a cotangent on some samples is on others, too."""
        seen: list[str] = []

        def walk() -> None:
            values = Cotangents({edge: u[None] for edge, u in tangents.half.items()})
            for step in self.graph.steps:
                for e in self.hooks.at_edges.keys() & values.keys() & set(step.into):
                    if self._foreign(e, self._through(e, values[e]), tangents.samples):
                        seen.append(
                            f"by a gradient hook {self._on(step)}. Remove it while nnj collects"
                        )
                        return
                self.sweep.cross(step, values, 1, None)
                out = [e for e in step.out if e is not None and e in values]
                if any(self._foreign(e, values[e], tangents.samples) for e in out):
                    seen.append(
                        f"at {describe(step, self.graph.paths)}, whose name says that they do not: "
                        "a function whose backward is not its forward's, or that is not what its "
                        "name says. Give it another name, or take it out of the model"
                    )
                    return

        own_task(walk)
        for where in seen:
            yield f"samples influence one another {where}"

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
    except (RuntimeError, TypeError, OnBothSides):
        return None


LINEAR = "changes the gradient"  # in what is said of hooks that could be taken elsewhere


def _hook_not_linear(where: str) -> str:
    return (
        f"a gradient hook {where} is not linear in the gradient that it is given (it clamps or "
        "normalises it, adds to it, draws random numbers, or keeps a state), so that columns "
        "cannot go through it. Remove the hook while nnj collects"
    )


def _hook(where: str) -> str:
    return (
        f"a gradient hook {where} {LINEAR}, which columns do not go through here. Write "
        "what it does as a function of the forward pass, or remove the hook while nnj collects"
    )


def _not_described(who: str, whose: str, fact: str) -> str:
    return (
        f"{who}: the rule does not say what this call does: {fact}. Either the rule is wrong, or "
        "the layer does something else than its class (a patched forward or function, a parameter "
        f"with functions of its own){whose}"
    )
