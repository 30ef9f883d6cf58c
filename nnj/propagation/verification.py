"""sum_n B_n = dL/dp: the shares of samples at a parameter add up to autograd's own gradient, and
without a cotangent on a sample there is no share of it.

Both are asked once for each structure of graph (in each pass, where hooks change gradients), of a
random cotangent on all rows and of one on a random half of the samples. So wrong rules, layers that
do something else than their class says, hooks on gradients, functions that are not what their name
says, and samples that influence one another are seen, whatever the reason. Hooks that are linear
are taken (`hooks`), and it is asked again. Not seen are the order of samples, a backward that is
not linear, and what happens inside of the loss."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nnj.checks import ask_now
from nnj.errors import NNJError
from nnj.generators import OwnGenerator
from nnj.jacobians.factor import Factor
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Sweep, uses_of
from nnj.propagation.culprit import Tangents, culprit, differs
from nnj.propagation.hooks import OF_MODULE, find_hooks
from nnj.propagation.plan import device_of
from nnj.propagation.unharmed import OnBothSides, engine_vjp, leaf_edge, unharmed
from nnj.recording.records import Edge
from nnj.recording.tensor_parallel import is_distributed, local_as, shape_here

MODE = "NNJ_VERIFY"
KEPT = 256  # structures that are remembered for each model
AGAIN = 0.7  # a factor by which rounding becomes another


class _Known(NamedTuple):
    """What is kept of a structure.

    Attributes:
        rules: held, so that none has their place.
        hooked: whether hooks have ever changed its gradients. What they do is no part of the
            structure, and is found out, and verified, in each pass.
    """

    rules: list[Any]
    hooked: bool


# by model, the structures that were found right
_verified: WeakKeyDictionary[nn.Module, dict[Any, _Known]] = WeakKeyDictionary()
_of_nobody: dict[Any, _Known] = {}
runs = 0  # how many structures were verified in this process


def verify(
    sweep: Sweep,
    rows: dict[Edge, SampleIndex],
    wanted: Iterable[Tensor],
    owner: nn.Module | None,
    hooks: bool = True,
    memory: float = math.inf,
) -> None:
    """Compare a sweep with autograd, unless that was done for another one of the same structure.
    One whose gradients linear hooks change is told of them, and compared in each pass.

    Args:
        sweep: which is to be trusted.
        rows: for each root edge, whose its entries are.
        wanted: the leaves at which results will be taken.
        owner: the model, or a layer, with which what was verified is forgotten; None where no layer
            has a record.
        hooks: whether columns may go through hooks.
        memory: bytes that gradients of autograd may take, of which those of one leaf at least are
            compared at a time.

    Errors: `NNJError` that names the culprit.
    """
    mode = os.environ.get(MODE, "first")
    if mode == "never":
        return
    if mode not in ("first", "always"):
        raise NNJError(f"{MODE}={mode!r} in the environment, expected never, first or always")
    known = _of_nobody if owner is None else _verified.setdefault(owner, {})
    key = signature(sweep)
    there = known.get(key)
    hooked = there is not None and there.hooked
    if mode == "first" and there is not None and not hooked:
        return
    _Verification(sweep, rows, wanted, memory).run(hooks, hooked)
    while len(known) >= KEPT:
        known.pop(next(iter(known)))
    rules = [s.record.entry for s in sweep.graph.steps if s.record is not None]
    known[key] = _Known(rules, hooked or sweep.hooks is not None)


def signature(sweep: Sweep) -> tuple[Any, ...]:
    """What two sweeps have in common of which one need not be verified: steps, rules, modules,
    shapes, dtypes, how the steps are connected, how columns cross them, and which hooks there may
    be.
    """
    graph, number = sweep.graph, dict[Edge, int]()
    shapes, dtypes = graph.shapes, graph.dtypes
    parts: list[Any] = [sweep.n, sweep.assume, len(graph.roots), *_hooks(sweep)]
    for edge in graph.roots:
        number.setdefault(edge, len(number))
    for step in graph.steps:
        for edge in step.into:
            parts.append((number.setdefault(edge, len(number)), shapes[edge], dtypes[edge]))
        for out in step.out:
            parts.append(None if out is None else number.setdefault(out, len(number)))
        record = step.record
        if record is not None:
            module = record.module
            parts.append((id(module), id(record.entry), type(module).forward))
        else:
            parts.append((step.name, step.leaf is None))
            parts += [None if route is None else route.way for route in sweep.routes[step]]
        parts += [(slot, *(p._backward_hooks or ())) for slot, p in step.params]
        if step.leaf is not None:
            parts.append((None, *(step.leaf._backward_hooks or ())))
    return tuple(parts)


def _hooks(sweep: Sweep) -> list[Any]:
    """How many hooks, on whatever, were registered since the calls of the models began: nobody says
    which tensors of a graph have hooks. Of modules with hooks on gradients, which these are.
    """
    graph = sweep.graph
    begun = [mark.hooks for mark in graph.outputs.values()]
    found: list[Any] = [RemovableHandle.next_id - min(begun)] if begun else []
    if any(step.name == OF_MODULE for step in graph.steps):
        found += [(*m._backward_hooks, None, *m._backward_pre_hooks) for m in graph.paths]
    return found


class _At(NamedTuple):
    """A leaf: what the sweep has for it, and autograd's gradients of both cotangents."""

    leaf: Tensor
    factor: Factor | None
    grads: list[Tensor]

    @property
    def size(self) -> float:
        """That of the largest shares: the root of the largest sum of squares of an entry."""
        if self.factor is None or not self.leaf.numel():
            return 0.0
        if self.factor.dtype.is_complex:
            return float(self.factor.dense().abs().max())
        return float(self.factor.square_sum().max().sqrt())


class _Verification:
    """One comparison.

    Args: as those of `verify`.
    """

    def __init__(
        self,
        sweep: Sweep,
        rows: dict[Edge, SampleIndex],
        wanted: Iterable[Tensor],
        memory: float = math.inf,
    ):
        self.sweep, self.memory, graph = sweep, memory, sweep.graph
        wanted = dict.fromkeys(p for p in wanted if graph.wanted(p))
        in_order = [p for p in uses_of(graph.steps) if p in wanted]  # the same in all processes
        self.leaves = list(dict.fromkeys([*in_order, *wanted]))
        self.farthest = in_order[-1:]
        self.tangents = _tangents(sweep, rows)
        self.eps = coarsest(sweep)
        self.give_back: Callable[[], None] = lambda: None  # that of `unharmed`
        self.devices = {device_of(edge) for edge in graph.roots}

    def run(self, hooks: bool, hooked: bool) -> None:
        """Tell the sweep of hooks, if there are any that change gradients.

        Args:
            hooks: whether columns may go through them.
            hooked: whether there were some at the last time.

        Errors: `NNJError` where the sweep is wrong.
        """
        global runs
        sweep = self.sweep
        if self.tangents is None or not self.leaves:
            return
        ask_now()  # numbers that are not finite would let everything pass
        runs += 1
        unchecked = dict(sweep._unchecked)
        with (
            unharmed(sweep.graph.paths, self.devices) as self.give_back,
            torch.no_grad(),
            suppress(OnBothSides),  # nobody but the engine can say then what is right
        ):
            wrong = hooked or self._wrong(self.tangents)
            if wrong and hooks:
                sweep.hooks = find_hooks(sweep.graph, self.leaves, self.give_back) or None
                if hooked or sweep.hooks is not None:
                    wrong = self._wrong(self.tangents)
            if wrong:
                raise culprit(sweep, self.tangents, self.leaves, self.eps, self.give_back)
        sweep._unchecked = unchecked  # what the user's columns have yet to be checked for

    def _wrong(self, tangents: Tangents) -> bool:
        """Whether a leaf differs from autograd's, by more than rounding."""
        sizes, gaps = dict[Tensor, float](), dict[Tensor, float]()
        suspects = dict[Tensor, _At]()
        for at in self._both(tangents):
            leaf = at.leaf
            sizes[leaf], gaps[leaf] = at.size, self._gap(at)
            if gaps[leaf] > self.slack(sizes[leaf]):
                suspects[leaf] = at
        largest = max(sizes.values(), default=0.0)
        # Below it nothing can be told from the rounding of the forward pass, which is the same for
        # every cotangent: a norm over one feature has J = 0, of which autograd has 1e-14.
        least_of_all = self.eps**0.75
        least = least_of_all * (largest or 1.0)
        off = {leaf: gaps[leaf] for leaf in suspects if gaps[leaf] > least}
        if not off:
            return False
        # What would be zero without rounding, such as the gradient at the bias of keys, is told
        # from what is small by being computed again with other rounding.
        often = max(10.0, min(1e3, 0.1 * self.eps**-0.5))
        rounding = {
            at.leaf: _rounding(suspects[at.leaf], at)
            for at in self._both(tangents.times(AGAIN))
            if at.leaf in off
        }
        if any(gap > often * rounding[leaf] for leaf, gap in off.items()):
            return True
        large = [leaf for leaf, gap in off.items() if gap > self.slack(largest)]
        if not large:
            return False
        # Nothing but rounding is left of any of them, as of all that a norm takes away, if every
        # step by itself is right. The cotangents are about 1.
        if max(rounding[leaf] for leaf in large) > least_of_all:
            return True
        return differs(self.sweep, tangents, self.leaves, self.eps, self.give_back)

    def slack(self, size: float) -> float:
        """How far numbers of a size may be from what they should be."""
        result: float = self.eps**0.5 * size
        return result

    def _both(self, tangents: Tangents) -> Iterator[_At]:
        """All leaves; what autograd has for them is computed for as many at a time as there is room
        for.
        """
        factors: dict[Tensor, Factor] = {}
        self.sweep.run(tangents.stacked(), 2, factors.__setitem__)
        for some in self._fitting():
            # with the leaf that is farthest behind, to which gradients pass the others: torch's
            # GroupNorm of channels last crashes where that of its input is not asked for
            beside = self.farthest if len(some) < len(self.leaves) else []
            edges = [leaf_edge(leaf) for leaf in (*some, *beside)]
            answers = []
            for roots in (tangents.whole, tangents.half):
                answers.append(engine_vjp(roots, edges)[: len(some)])
                self.give_back()
            for i, leaf in enumerate(some):
                grads = [_plain(answer[i], leaf) for answer in answers]
                yield _At(leaf, factors.pop(leaf, None), grads)

    def _fitting(self) -> Iterator[list[Tensor]]:
        """The leaves in parts whose gradients of both cotangents have room."""
        part, room = list[Tensor](), self.memory
        for leaf in self.leaves:
            size = 2 * leaf.numel() * leaf.element_size()
            if part and size > room:
                yield part
                part, room = [], self.memory
            part.append(leaf)
            room -= size
        yield part

    def _gap(self, at: _At) -> float:
        """By how much the shares at a leaf do not add up to the gradients, or are outside of the
        half; 0 where numbers are not finite, of which nothing can be said.
        """
        factor, gaps = at.factor, []
        if not at.leaf.numel():
            return 0.0
        if factor is None:
            gaps = [g.abs().max() for g in at.grads]
        elif at.leaf is self.sweep.graph.batched:
            b = factor.dense()
            gaps = [(b[c] - g.to(b.dtype)).abs().max() for c, g in enumerate(at.grads)]
        else:
            n, half = factor.n, self.tangents.samples if self.tangents else None
            c = torch.zeros(2, n, dtype=factor.dtype, device=factor.device)
            for column, g in enumerate(at.grads):
                c.zero_()[column] = 1
                gaps.append((factor.rmatvec(c) - g.to(factor.dtype)).abs().max())
            if half is not None and not bool(half.all()):
                weights = torch.rand(n, generator=_generator(), dtype=torch.float64) + 0.5
                c.zero_()[1] = (weights * ~half).to(c)
                gaps.append(factor.rmatvec(c).abs().max())
        worst = float(torch.stack([g.to(torch.float64).cpu() for g in gaps]).max())
        return worst if worst < float("inf") else 0.0


def _plain(grad: Tensor | None, leaf: Tensor) -> Tensor:
    if is_distributed(leaf):  # each rank compares its part
        part = torch.zeros(shape_here(leaf), dtype=leaf.dtype, device=leaf.device)
        return part if grad is None else local_as(grad, leaf)
    return torch.zeros_like(leaf, requires_grad=False).detach() if grad is None else grad


def _rounding(one: _At, again: _At) -> float:
    """How far two computations of the same are apart, of which one is AGAIN times the other."""
    apart = [(b / AGAIN - a).abs().max() for a, b in zip(one.grads, again.grads, strict=True)]
    if one.factor is not None and again.factor is not None:
        c = torch.ones(2, one.factor.n, dtype=one.factor.dtype, device=one.factor.device)
        apart.append((again.factor.rmatvec(c) / AGAIN - one.factor.rmatvec(c)).abs().max())
    return max(float(a) for a in apart)


# -- the cotangents --------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    return OwnGenerator.seeded()


def _tangents(sweep: Sweep, rows: dict[Edge, SampleIndex]) -> Tangents | None:
    """A random cotangent, and the same on a random half of the samples; None where there is
    nothing to carry.
    """
    n, generator = sweep.n, _generator()
    if not n:
        return None
    samples = torch.ones(n, dtype=torch.bool)
    samples[torch.randperm(n, generator=generator)[: n // 2]] = False
    whole, half = dict[Edge, Tensor](), dict[Edge, Tensor]()
    for root, index in rows.items():
        shape, dtype = sweep.shapes[root], sweep.graph.dtypes[root]
        if 0 in shape or not (dtype.is_floating_point or dtype.is_complex):
            continue
        device = device_of(root)
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        u = ((u - 0.5).sign() * (0.5 + u)).to(device, dtype)
        of = index.of
        if of is None:
            of = torch.zeros((), dtype=torch.long, device=device)
            if n > 1:
                of = torch.arange(shape[0], device=device) // (shape[0] // n)
                of = of.reshape(-1, *[1] * (len(shape) - 1))
        whole[root] = u * (of >= 0)  # an entry of nobody has no share
        half[root] = u * (samples.to(device)[of.clamp(min=0)] & (of >= 0))
    return Tangents(whole, half, samples) if whole else None


def coarsest(sweep: Sweep) -> float:
    """The rounding error of the coarsest numbers that take part."""
    dtypes = {d for d in sweep.graph.dtypes.values() if d.is_floating_point or d.is_complex}
    dtypes |= {p.dtype for step in sweep.graph.steps for _, p in step.params}
    eps = max(torch.finfo(d).eps for d in dtypes)
    coarse = torch.get_float32_matmul_precision() != "highest"
    on_gpu = any(device_of(edge).type == "cuda" for edge in sweep.graph.roots)
    if coarse or (
        on_gpu and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    ):
        return max(eps, 2**-7 if torch.get_float32_matmul_precision() == "medium" else 2**-10)
    return eps
