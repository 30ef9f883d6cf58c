"""A backward pass as a program that can be traced: the scalar, its gradients, and what its losses
add to the quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from typing_extensions import override

from nnj.collecting.accumulate import Contribution, ExactColumns, Holder
from nnj.collecting.passes import Capture
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
        leaves_of_more, spec = tree_flatten(more)
        layout = _Layout(capture.contributions, inputs, leaves_of_more, spec)
        for i, g in zip(leaves, found, strict=True) if self.gradients else ():
            if g is not None:
                layout.grads.append(i)
                grads.append(_laid_out_as(inputs[i], g))
        beside = [t for t in leaves_of_more if isinstance(t, Tensor)]
        return [value, *beside, *grads, *layout.values(capture.contributions)], layout

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
    """A contribution without its values.

    Attributes:
        holders: the numbers of tensors, and modules.
        values: for each quantity, at which of them it has a value.
    """

    calls: frozenset[int]
    n: int
    exact: ExactColumns
    holders: list[int | nn.Module]
    values: dict[str, list[int | nn.Module]]


class _Layout:
    """Where the results of a pass belong.

    Attributes:
        beside: how many tensors come with the scalar.
        grads: the numbers of the leaves that have a gradient.
    """

    def __init__(
        self,
        contributions: Sequence[Contribution],
        inputs: Sequence[Tensor],
        more: list[Any],
        spec: Any,
    ):
        self.grads, self._spec = list[int](), spec
        self.beside = sum(isinstance(t, Tensor) for t in more)
        self._more = [None if isinstance(t, Tensor) else t for t in more]
        self._tensors = [i for i, t in enumerate(more) if isinstance(t, Tensor)]
        number = {id(t): i for i, t in enumerate(inputs)}

        def place(holder: Holder) -> int | nn.Module:
            return number[id(holder)] if isinstance(holder, Tensor) else holder

        self.kept = [
            _Kept(
                c.calls,
                c.n,
                c.exact,
                [place(holder) for holder in c.holders],
                {name: [place(holder) for holder in c.values(name)] for name in c.names()},
            )
            for c in contributions
        ]

    def more(self, results: Sequence[Tensor]) -> Any:
        """What comes with the scalar, with other tensors."""
        leaves = list(self._more)
        for i, t in zip(self._tensors, results, strict=True):
            leaves[i] = t
        return tree_unflatten(leaves, self._spec)

    def values(self, contributions: Sequence[Contribution]) -> list[Tensor]:
        """All values, in the order of the layout."""
        return [v for c in contributions for name in c.names() for v in c.values(name).values()]

    def contributions(
        self, results: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> list[Contribution]:
        """The contributions with other values, at what the numbers stand for now."""
        found, given = [], iter(results)
        for kept in self.kept:
            new = Contribution(kept.calls, kept.n)
            new.exact = kept.exact
            new.holders = dict.fromkeys(
                inputs[h] if isinstance(h, int) else h for h in kept.holders
            )
            for name, places in kept.values.items():
                for h in places:
                    new.add(name, inputs[h] if isinstance(h, int) else h, next(given))
            found.append(new)
        return found


def why_never(request: Request) -> str | None:
    """Why passes of a request cannot be traced; None if they may be."""
    return "under tol= the number of columns follows the data" if request.tol else None


def names_of_results() -> frozenset[str]:
    """The attributes in which results stand, which no forward pass reads."""
    return frozenset(entry.key for entry in manager().entries("quantity"))
