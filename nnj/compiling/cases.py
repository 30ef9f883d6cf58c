"""The cases of a program: each is run eagerly, traced, compared with the eager run, and from then
on replayed; what cannot be is run eagerly, saying why.

    1st call of a case   eager (nnj verifies the structure of its graph then)
    2nd                  traced: a run like any other, and a graph
    3rd                  replayed and run, which must agree
    4th and later        replayed, guarded

A replay whose flag says that something was answered otherwise while tracing (also: that a check
fails) is thrown away, and the pass run eagerly, which raises what there is to raise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from nnj.compiling.backends import check_backend
from nnj.compiling.case import Case
from nnj.compiling.guards import State
from nnj.compiling.program import Program, Untraceable
from nnj.compiling.surroundings import surroundings, unusual
from nnj.errors import NNJError

T = TypeVar("T")


class Cases(Generic[T]):
    """Runs a program, by a graph for each case where it can.

    Args:
        program: what is run.
        backend: "inductor", "aot" or "cudagraphs".
        limit: how many cases are traced, and how often each is traced anew.
        verify: whether a graph is compared with the eager run before it stands for it.
        ignored, is_own: as in `State`.
        never: why no case can be traced; None if one may be.

    Attributes:
        reasons: why something was run eagerly, each once.
        replays: how many calls were replayed.

    Errors: `NNJError` for an unknown backend, or a limit that is no number.
    """

    def __init__(
        self,
        program: Program[T],
        backend: str = "inductor",
        limit: int = 8,
        verify: bool = True,
        ignored: Collection[str] = (),
        is_own: Callable[[Any], bool] = lambda hook: False,
        never: str | None = None,
    ):
        check_backend(backend)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise NNJError(f"limit={limit!r}: how many cases are traced is a whole number")
        self.program, self.backend, self.limit, self.verify = program, backend, limit, verify
        self.reasons: list[str] = []
        self.replays = 0
        self._ignored, self._is_own, self.never = ignored, is_own, never
        self._changes: list[str] = []  # how passes have changed what they read
        self._cases: list[Case] = []
        self._full: str | None = None

    def __call__(self, batch: Any) -> T:
        """Run the program on a batch."""
        reason = self._never() or unusual()
        if reason is not None:
            return self._eagerly(batch, reason)
        leaves, spec = tree_flatten(batch)
        around = (spec, surroundings())
        for case in self._cases:
            inputs = case.inputs(leaves, around)
            if inputs is not None:
                return self._run(case, batch, leaves, inputs)
        if len(self._cases) >= self.limit:
            return self._eagerly(batch, self._too_many(leaves))
        case = Case(State(self.program.modules, self._ignored, self._is_own), leaves, around)
        self._cases.append(case)
        return self._first(case, batch, leaves)

    def _eagerly(self, batch: Any, reason: str) -> T:
        """Run it as it is, and say why, once."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            warnings.warn(f"nnj.compile runs eagerly: {reason}", stacklevel=4)
        return self.program.eager(batch)

    def _never(self) -> str | None:
        """Why no case is traced: as the program says, or since its passes go on changing what they
        read. (The first one may fill something that later ones find.)
        """
        return self.never or (self._changes[-1] if len(self._changes) > 2 else None)

    def _too_many(self, leaves: list[Any]) -> str:
        """Why there is no room for another case: what the first one too many has changed."""
        if self._full is None:
            what = self._cases[-1].changed(leaves) if self._cases else None
            said = f", of which the last is another by {what}" if what else ""
            self._full = f"there are more than limit={self.limit} cases{said}"
        return self._full

    # -- the life of a case ------------------------------------------------------------------------

    def _run(self, case: Case, batch: Any, leaves: list[Any], inputs: list[Tensor]) -> T:
        if case.reason is not None:
            return self._eagerly(batch, case.reason)
        if case.traced is None:
            return self._trace(case, batch, leaves, inputs)
        if self.verify and not case.confirmed:
            return self._confirm(case, batch, inputs)
        case.save_drawn()
        results = case.replay(inputs)
        if results is None:
            case.rewind()
            return self._again(case, batch)
        self.replays += 1
        return self.program.take(results, case.layout, inputs)

    def _first(self, case: Case, batch: Any, leaves: list[Any]) -> T:
        """Run eagerly, and see whether that changes what it reads."""
        inputs, case.state.tensors = case.state.tensors, []  # others may stand in their places
        if case.reason is not None:
            return self._eagerly(batch, case.reason)
        before = [t._version for t in inputs]
        found = self.program.eager(batch)
        self._look(case, before, inputs, leaves)
        return found

    def _look(
        self, case: Case, before: list[int], inputs: Sequence[Tensor], leaves: list[Any]
    ) -> None:
        """Refuse what a run has changed."""
        for i, (t, version) in enumerate(zip(inputs, before, strict=True)):
            if t._version != version:
                case.reason = f"a pass writes into {case.state.name(i)}, and a graph would not"
        changed = case.state.difference(inputs, leaves, case.arguments)
        if changed is not None:
            self._changes.append(f"a pass changes {changed}, and a graph would not")
            self._cases.remove(case)  # which is none that comes again

    def _trace(self, case: Case, batch: Any, leaves: list[Any], inputs: list[Tensor]) -> T:
        layouts: list[Any] = []

        def run() -> list[Tensor]:
            results, layout = self.program.run(batch, inputs)
            layouts.append(layout)
            return results

        from nnj.compiling.trace import trace  # which loads what few need

        before = [t._version for t in inputs]
        case.save()
        try:
            traced = trace(run, inputs)
            case.check_draws(traced, inputs)
        except Exception as error:
            case.rewind()
            found = self.program.eager(batch)  # raises what there is to raise
            known = isinstance(error, Untraceable)
            case.reason = str(error) if known else f"{type(error).__name__}: {error}"
            return found
        self._look(case, before, inputs, leaves)
        if case.reason is None:
            case.keep(traced, layouts[0])
            case.compile(inputs, self.backend)
        results = list(traced.results)
        traced.results.clear()  # which the graph needs no more
        return self.program.take(results, layouts[0], inputs)

    def _confirm(self, case: Case, batch: Any, inputs: list[Tensor]) -> T:
        """Replay and run."""
        case.save()
        found = case.replay(inputs, exactly=True)
        case.rewind()
        if found is None:
            return self._again(case, batch)
        try:
            expected, layout = self.program.run(batch, inputs)
        except NNJError:
            case.rewind()
            return self.program.eager(batch)
        gap = _gap(found, expected)
        if gap is not None:
            case.reason = f"what its graph gives is not what the eager pass gives ({gap})"
        case.confirmed = True
        return self.program.take([t.detach() for t in expected], layout, inputs)

    def _again(self, case: Case, batch: Any) -> T:
        """Something was answered otherwise than while tracing."""
        found = self.program.eager(batch)
        case.missed += 1
        case.traced = None
        if case.missed > self.limit:
            case.reason = f"what it asks of its tensors was answered otherwise {case.missed} times"
        return found


def _gap(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """How two lists of results differ; None if they do not, but for rounding."""
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"a result has shape {tuple(one.shape)} and {tuple(other.shape)}"
        if not other.numel() or torch.equal(one, other):
            continue
        if not (other.is_floating_point() or other.is_complex()):
            return "whole numbers are others"
        wide = torch.float64 if other.is_floating_point() else torch.complex128
        slack = torch.finfo(other.dtype).eps ** 0.5
        one, other = one.detach().to(wide), other.detach().to(wide)
        size = torch.where(other.isfinite(), other, 0.0).abs().max()
        if not torch.allclose(one, other, rtol=0, atol=float(slack * size), equal_nan=True):
            return f"by {float((one - other).abs().max()):.2g} where it is {float(size):.2g}"
    return None
