"""A backward pass as a program that can be traced: the scalar, its gradients, and what its losses
add to the quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from typing_extensions import override

from nnj.collecting.contribution import Contribution, ExactColumns
from nnj.collecting.passes import Capture
from nnj.collecting.quantity import Holder, Whole
from nnj.collecting.request import Request
from nnj.compiling.program import Program
from nnj.registry.manager import manager


class Passed(NamedTuple):
    """What one pass gives.

    Attributes:
        value: the scalar, without its graph.
        more: what else the pass was asked for, without its graph.
        contributions: those of its losses.
    """

    value: Tensor
    more: Any
    contributions: list[Contribution]


class PassProgram(Program[Passed]):
    """`evaluate(batch).backward()`, and what a request collects in it.

    Args:
        evaluate: gives the scalar of a batch, and what is wanted beside it.
        modules: the model and the loss.
        request: what is collected.
        gradients: whether the pass adds to `.grad`.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], tuple[Tensor, Any]],
        modules: Sequence[nn.Module],
        request: Request,
        gradients: bool = True,
    ):
        self.evaluate, self.modules, self.request = evaluate, modules, request
        self.gradients = gradients

    @override
    def eager(self, batch: Any) -> Passed:
        value, more = self.evaluate(batch)
        with Capture(self.request).alone() as capture:
            if self.gradients:
                value.backward()
            else:
                leaves = [p for m in self.modules for p in m.parameters() if p.requires_grad]
                torch.autograd.grad(value, leaves, allow_unused=True)
        more = tree_map_only(Tensor, torch.detach, more)
        return Passed(value.detach(), more, capture.contributions)

    @override
    def run(self, batch: Any, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        value, more = self.evaluate(batch)
        leaves = [i for i, t in enumerate(inputs) if t.requires_grad]
        with Capture(self.request.trusted()).alone() as capture:
            found = torch.autograd.grad(value, [inputs[i] for i in leaves], allow_unused=True)
        grads = list[Tensor]()
        beside = _Form(more)
        layout = _Layout(capture.contributions, inputs, beside)
        for i, g in zip(leaves, found, strict=True) if self.gradients else ():
            if g is not None:
                layout.grads.append(i)
                grads.append(_laid_out_as(inputs[i], g))
        results = [value, *beside.tensors, *grads, *layout.tensors(capture.contributions)]
        beside.empty()
        return results, layout

    @override
    def take(self, results: Sequence[Tensor], layout: Any, inputs: Sequence[Tensor]) -> Passed:
        start = 1 + layout.beside
        end = start + len(layout.grads)
        _add_gradients([inputs[i] for i in layout.grads], results[start:end])
        contributions = layout.contributions(results[end:], inputs)
        return Passed(results[0], layout.more(results[1:start]), contributions)


def _laid_out_as(p: Tensor, g: Tensor) -> Tensor:
    """A gradient as `.grad` would be laid out in memory."""
    return g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)


@torch.no_grad()
def _add_gradients(leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """As a backward pass would."""
    there, more = [], []
    for p, g in zip(leaves, grads, strict=True):
        if p.grad is None:
            p.grad = g
        else:
            there.append(p.grad)
            more.append(g)
    if there:
        torch._foreach_add_(there, more)


@dataclass
class _Kept:
    """A contribution without its tensors.

    Attributes:
        holders: the numbers of tensors, and modules.
        together: the numbers of the tensors over which a joint state is.
        states: for each quantity, at which of them it has a state, and of what form, with the
            plain values in it.
    """

    calls: frozenset[int]
    n: int
    given: frozenset[int]
    wrappers: frozenset[nn.Module | None]
    together: list[int]
    exact: ExactColumns
    holders: list[Place]
    states: dict[str, list[tuple[Place, _Form]]]


Place: TypeAlias = "int | nn.Module | Whole"


class _Form:
    """What a value is without its tensors."""

    def __init__(self, value: Any):
        leaves, self._spec = tree_flatten(value)
        self.tensors = [t for t in leaves if isinstance(t, Tensor)]
        self._leaves = [None if isinstance(t, Tensor) else t for t in leaves]
        self._at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]

    def with_tensors(self, given: Iterator[Tensor]) -> Any:
        """The value with other tensors, of which as many are taken as there were."""
        leaves = list(self._leaves)
        for i in self._at:
            leaves[i] = next(given)
        return tree_unflatten(leaves, self._spec)

    def empty(self) -> _Form:
        """The same, keeping no tensor."""
        self.tensors = []
        return self


class _Layout:
    """Where the results of a pass belong.

    Attributes:
        beside: how many tensors come with the scalar.
        grads: the numbers of the leaves that have a gradient.
    """

    def __init__(
        self, contributions: Sequence[Contribution], inputs: Sequence[Tensor], more: _Form
    ):
        self.grads, self._more = list[int](), more
        self.beside = len(more.tensors)
        number = {id(t): i for i, t in enumerate(inputs)}

        def place(holder: Holder) -> Place:
            return number[id(holder)] if isinstance(holder, Tensor) else holder

        self.kept = [
            _Kept(
                c.calls,
                c.n,
                c.given,
                c.wrappers,
                [number[known] for known in c.together],
                c.exact,
                [place(holder) for holder in c.holders],
                {
                    name: [(place(holder), _Form(state).empty()) for holder, state in at.items()]
                    for name, at in c.states.items()
                },
            )
            for c in contributions
        ]

    def more(self, results: Sequence[Tensor]) -> Any:
        """What comes with the scalar, with other tensors."""
        return self._more.with_tensors(iter(results))

    def tensors(self, contributions: Sequence[Contribution]) -> list[Tensor]:
        """All tensors of states, in the order of the layout."""
        states = (state for c in contributions for at in c.states.values() for state in at.values())
        return [t for state in states for t in _Form(state).tensors]

    def contributions(
        self, results: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> list[Contribution]:
        """The contributions with other tensors, at what the numbers stand for now."""

        def holder(place: Place) -> Holder:
            return inputs[place] if isinstance(place, int) else place

        found, given = [], iter(results)
        for kept in self.kept:
            new = Contribution(kept.calls, kept.n, kept.given, kept.wrappers)
            new.exact = kept.exact
            new.together = tuple(id(inputs[i]) for i in kept.together)
            new.holders = dict.fromkeys(holder(place) for place in kept.holders)
            for name, forms in kept.states.items():
                new.states[name] = {holder(p): form.with_tensors(given) for p, form in forms}
            found.append(new)
        return found


def why_never(request: Request) -> str | None:
    """Why passes of a request cannot be traced; None if they may be."""
    return "under tol= the number of columns follows the data" if request.tol else None


def names_of_results(request: Request) -> frozenset[str]:
    """The attributes in which results stand, which no forward pass reads."""
    return frozenset([*(e.key for e in manager().entries("quantity")), *request.quantities])
