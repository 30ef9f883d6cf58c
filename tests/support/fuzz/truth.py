"""The oracle of a case: dense Jacobians and Hessians by torch.func, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from tests.support.fuzz.case import Case
from tests.support.oracle import Dense, dense


class Recorded:
    """A model that notes what it gives, or gives what it is told to, some tensors at a time."""

    def __init__(
        self, model: Callable[..., Any] | None, give: list[Tensor] | None = None, several: int = 1
    ):
        self.model, self.give, self.several = model, list(give or ()), several
        self.outputs: list[Tensor] = []
        self.calls: list[int] = []  # for each output, of which call it is

    def __call__(self, *args: Any) -> Any:
        if self.model is not None:
            out = self.model(*args)
        else:
            given = tuple(self.give.pop(0) for _ in range(self.several))
            out = given if self.several > 1 else given[0]
        call = self.calls[-1] + 1 if self.calls else 0
        for t in out if isinstance(out, tuple) else (out,):
            self.outputs.append(t)
            self.calls.append(call)
        return out


class Truth:
    """What is true of a case.

    Attributes:
        passes: the dense derivatives of each backward pass.
        grads: {name: p.grad} of plain torch, after all passes, in the dtype of the case.
        values: the scalar of each pass.
    """

    def __init__(self, case: Case):
        self.case = case
        self.model = case.model(twin=True).double()
        self.passes = [self._pass(k) for k in range(case.passes)]
        plain, losses = case.model(), case.losses()
        self.values = []
        for k in range(case.passes):
            value = case.run(plain, losses, case.data(k))
            value.backward()
            self.values.append(value.detach())
        self.grads = {name: p.grad for name, p in plain.named_parameters()}

    def _pass(self, number: int) -> Dense:
        """One backward pass."""
        case, data = self.case, self.case.data(number, torch.float64)
        losses, run = case.losses(torch.float64), case.names["run"]

        def noted(model: Any) -> Recorded:
            notes = Recorded(model)
            run(notes, losses, *data)
            return notes

        with torch.no_grad():
            samples = samples_of(noted(self.model), case.output_axis)
        scalar = lambda outs: run(Recorded(None, outs, case.outputs), losses, *data)
        return dense(self.model, lambda model: noted(model).outputs, scalar, samples)

    def fault(self) -> str:
        """What is wrong with the oracle itself: its gradient is not that of plain torch."""
        if self.case.autocast:
            return ""
        tight = self.case.dtype == torch.float64
        for name, p in self.model.named_parameters():
            grad = self.grads[name]
            if not p.requires_grad or grad is None:
                continue
            own = sum(t.batch_grad(name).sum(0) for t in self.passes)
            error, size = (own - grad.double()).abs().max(), float(grad.abs().max())
            if float(error) > (1e-9 if tight else 1e-2) * size + (1e-11 if tight else 1e-4):
                return f"the gradient of {name} is off by {float(error):.3g} of {size:.3g}"
        return ""

    # -- sums over passes --------------------------------------------------------------------------

    def diag(self, name: str) -> Tensor:
        return sum((t.diag(name) for t in self.passes[1:]), self.passes[0].diag(name))

    def block(self, names: list[str]) -> Tensor:
        return sum((t.block(names) for t in self.passes[1:]), self.passes[0].block(names))

    def batch_grad(self, name: str) -> Tensor:
        return torch.cat([t.batch_grad(name) for t in self.passes])

    # -- of nnj.fit --------------------------------------------------------------------------------

    def as_one_batch(self, loss: Any) -> Dense:
        """The first data set, with this loss alone, and nothing made of its value."""
        case, term = self.case, self.case.terms[0]
        data = case.data(0, torch.float64)
        given = lambda z: eval(term.output, case.names | {"z": z})
        call = lambda model: [model(data[0])]
        scalar = lambda outs: loss(given(outs[0]), data[1])
        notes = Recorded(self.model)
        with torch.no_grad():
            notes(data[0])
        return dense(self.model, call, scalar, samples_of(notes, case.output_axis))

    # -- of products -------------------------------------------------------------------------------

    @functools.cached_property
    def in_input(self) -> Tensor:
        """(N, out, in)."""
        x, n = self.case.data(0, torch.float64)[0], self.case.n
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        out = lambda x: functional_call(self.model, params, (x.clone(),)).reshape(n, -1)
        j = jacrev(out)(x)
        return torch.stack([j[i, :, i].flatten(1) for i in range(n)]).detach()

    @functools.cached_property
    def in_weight(self) -> Tensor:
        """(N, out, P)."""
        jacobian = self.passes[0].jacobian.values()
        return torch.cat([j.reshape(self.case.n, -1, j[0].numel()) for j in jacobian], 2)


def samples_of(notes: Recorded, axis: int) -> Tensor:
    """The sample of each entry: those of later calls come after those of earlier ones."""
    found, first = [], {0: 0}
    for t, call in zip(notes.outputs, notes.calls, strict=True):
        n = t.shape[axis]
        first[call + 1] = first[call] + n
        shape = [n if k == axis else 1 for k in range(t.dim())]
        index = torch.arange(first[call], first[call] + n)
        found.append(index.reshape(shape).expand(t.shape).flatten())
    return torch.cat(found)
