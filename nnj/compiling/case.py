"""One case of a program: what modules and a batch are, beside the numbers in their tensors, and the
graph that stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnj.compiling.backends import Run, compiled
from nnj.compiling.guards import State
from nnj.compiling.program import Untraceable
from nnj.generators import place_of

if TYPE_CHECKING:
    from nnj.compiling.trace import Traced


class Case:
    """What the modules and a batch are, beside the numbers in their tensors.

    Attributes:
        reason: why there is no graph for it; None if there is one, or may be.
        traced: its graph, once it is there.
        missed: how often a graph was thrown away.
        confirmed: whether the graph was compared with the eager run.
    """

    def __init__(self, state: State, leaves: list[Any], around: Any):
        self.state, self.around, self.kept = state, around, len(state.tensors)
        self.arguments = state.frozen(leaves, "the batch")
        state.finish()
        self.reason = _refused(leaves) or state.refused
        self.traced: Traced | None = None
        self.layout: Any = None
        self.run: Run | None = None
        self.missed, self.confirmed = 0, False
        # autocast that is on in this case
        self._kinds = [k for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)]
        self._saved: list[tuple[Any, Tensor]] = []

    def inputs(self, leaves: list[Any], around: Any) -> list[Tensor] | None:
        """All tensors as they are now; None if it is another case."""
        if around != self.around:
            return None
        return self.state.now(leaves, self.arguments)

    def changed(self, leaves: list[Any]) -> str | None:
        """What is not as it is in this case, beside tensors; None if that is not known."""
        return self.state.difference(None, leaves, self.arguments)

    def keep(self, traced: Traced, layout: Any) -> None:
        self.traced, self.layout = traced, layout
        self.confirmed = False

    @torch.no_grad()
    def compile(self, inputs: list[Tensor], backend: str) -> None:
        """Have the graph run by a backend."""
        assert self.traced is not None
        given = [*inputs, *(draw.value for draw in self.traced.draws)]
        with self._plainly():
            self.run = compiled(self.traced.graph, given, self.kept, backend)

    @torch.no_grad()
    def replay(self, inputs: list[Tensor], exactly: bool = False) -> Sequence[Tensor] | None:
        """What the graph gives; None where its flag says that it is not to be trusted.

        Args:
            exactly: draw the random numbers that the eager run would.
        """
        assert self.traced is not None and self.run is not None
        draws = [draw.again() for draw in self.traced.draws]
        run = self.traced.graph.forward if exactly and self.traced.random else self.run
        with self._plainly():
            results = list(run(*inputs, *draws))
        if self.traced.asks and bool(results.pop()):
            return None
        return results

    def _plainly(self) -> AbstractContextManager[Any]:
        """Without autocast, whose casts are in the graph."""
        if not self._kinds:
            return nullcontext()
        stack = ExitStack()
        for kind in self._kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    # -- random numbers ----------------------------------------------------------------------------

    @torch.no_grad()
    def check_draws(self, traced: Traced, inputs: list[Tensor]) -> None:
        """Errors: `Untraceable` where a pass sets a generator back, as checkpoints do, to draw the
        same numbers twice: a graph would draw others.
        """
        if not traced.random:
            return
        after = [(g, g.get_state()) for g, _ in self._saved]
        self.rewind()
        with self._plainly():
            traced.graph.forward(*inputs, *(draw.value for draw in traced.draws))
        same = all(torch.equal(g.get_state(), state) for g, state in after)
        for g, state in after:
            g.set_state(state)
        if not same:
            raise Untraceable(
                "a pass sets a random generator back (as torch.utils.checkpoint does), and a graph "
                "would draw other numbers"
            )

    def save_drawn(self) -> None:
        """Note where generators stand, where the graph draws from any."""
        assert self.traced is not None
        self._saved = []
        if self.traced.random or self.traced.draws:
            self.save()

    def save(self) -> None:
        """Note where generators stand."""
        found: list[Any] = [torch.default_generator]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found.append(torch.cuda.default_generators[torch.cuda.current_device()])
        if self.traced is not None:
            users = [draw.kwargs["generator"] for draw in self.traced.draws]
            found += {place_of(g): g for g in users}.values()
        self._saved = [(g, g.get_state()) for g in found]

    def rewind(self) -> None:
        """Generators stand where they stood."""
        for g, state in self._saved:
            g.set_state(state)


def _refused(leaves: list[Any]) -> str | None:
    """Why a batch cannot be an input of a graph."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                return "a tensor of the batch requires grad, and its gradient would be lost"
            if type(leaf) is not Tensor or leaf.layout != torch.strided:
                return f"the batch has a {type(leaf).__name__} of layout {leaf.layout}"
        elif not isinstance(leaf, (bool, int, float, complex, str, bytes, type(None))):
            return f"the batch has a {type(leaf).__name__}, which nobody can compare"
    return None
