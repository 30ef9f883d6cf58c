"""The truth, from torch.func alone: dense Jacobians of a model that was never extended, and the Hessian of its scalar.

A case is a piece of user code, `run(model, loss, *data) -> scalar`. Here it is run with a functional model and with a loss that
notes what it is given: these are the outputs. The same code with other outputs put in their place is the scalar as a
function of the outputs, so that reductions, factors, sums of losses and weighted sums are all in it.
"""
from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils._pytree import tree_flatten, tree_unflatten

from cases import CASES, Case


def build(case: Case, twin: bool = False) -> nn.Module:
    """The model of a case in float64, with parameters that are neither zero nor one, always the same."""
    torch.manual_seed(0)
    model = case.make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    if not twin or case.twin is None:
        return model
    other = case.twin().double()
    other.load_state_dict(model.state_dict())
    return other


def data_of(case: Case) -> tuple[Any, ...]:
    torch.manual_seed(1)
    return tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case.data())


def losses_of(case: Case) -> tuple[Any, ...]:
    made = case.loss()
    return tuple(l.double() if isinstance(l, nn.Module) else l for l in (made if isinstance(made, tuple) else (made,)))


def run(case: Case, model: Any, losses: tuple[Any, ...]) -> Tensor:
    """The user's code, with its random numbers always the same."""
    torch.manual_seed(2)
    return case.run(model, losses[0] if len(losses) == 1 else losses, *data_of(case))


class _Notes:
    """A loss that notes the outputs which it is given, or puts others in their place."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.put: list[Tensor] | None = None
        self.which: list[list[int]] = []  # for each call of a loss, which leaves of its arguments are outputs
        self.first = True
        self.calls = 0

    def start(self, put: list[Tensor] | None = None) -> None:
        self.seen, self.calls, self.put = [], 0, put

    def wrap(self, loss: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            if self.first:
                self.which.append([i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad])
            which = self.which[self.calls]
            self.calls += 1
            for i in which:
                if self.put is not None:
                    leaves[i] = self.put[len(self.seen)]
                self.seen.append(leaves[i])
            args, kwargs = tree_unflatten(leaves, spec)
            return loss(*args, **kwargs)

        return noting


class Truth:
    """Dense truth of one case: `diag`, `block` and `batch_grad` by the names of parameters."""

    def __init__(self, case: Case):
        model = build(case, twin=True)
        notes = _Notes()
        losses = tuple(notes.wrap(loss) for loss in losses_of(case))
        self.value = run(case, model, losses).detach()
        notes.first = False
        calls, outs = notes.which, notes.seen
        shapes = [t.shape for t in outs]
        params = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}

        def outputs(p: dict[str, Tensor]) -> Tensor:
            notes.start()
            run(case, lambda *args, **kwargs: functional_call(model, p, args, kwargs), losses)
            return torch.cat([t.flatten() for t in notes.seen])

        def scalar(flat: Tensor) -> Tensor:
            parts = [t.reshape(s) for t, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
            notes.start(parts)
            return run(case, lambda *args, **kwargs: functional_call(model, params, args, kwargs), losses)

        z = torch.cat([t.detach().flatten() for t in outs])
        j = jacrev(outputs)(params)
        self.jacobian = {name: t.detach().reshape(len(z), *params[name].shape) for name, t in j.items()}
        self.gradient = jacrev(scalar)(z).detach()
        self.hessian = jacrev(jacrev(scalar))(z).detach()
        numbers = case.numbers([t.detach() for t in outs], data_of(case))
        self.owners = torch.cat([w.reshape(-1, *[1] * (t.dim() - 1)).expand(t.shape).flatten()
                                 for w, t in zip(numbers, outs, strict=True)])
        assert len(calls) > 0

    def columns(self, name: str) -> Tensor:
        """The Jacobian of all outputs in one parameter, (D, P)."""
        return self.jacobian[name].flatten(1)

    def block(self, names: list[str]) -> Tensor:
        j = torch.cat([self.columns(name) for name in names], 1)
        return j.T @ self.hessian @ j

    def diag(self, name: str) -> Tensor:
        return self.block([name]).diagonal().reshape(self.jacobian[name].shape[1:])

    def batch_grad(self, name: str) -> Tensor:
        n = int(self.owners.max()) + 1
        share = torch.zeros(n, len(self.owners), dtype=self.gradient.dtype)
        at = torch.arange(len(self.owners))
        share[self.owners, at] = self.gradient[at]
        return (share @ self.columns(name)).reshape(n, *self.jacobian[name].shape[1:])


@functools.cache
def truth(name: str) -> Truth:
    return Truth(CASES[name])


def close(found: Any, expected: Tensor) -> str:
    """"" if equal to rtol 1e-8 of each entry, or of 1e-4 of the largest; else what is the matter."""
    if not isinstance(found, Tensor):
        return f"is {found!r}"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"is {found.dtype}, expected {expected.dtype}"
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = (found - expected).abs()
    bad = ~(error <= 1e-8 * expected.abs() + 1e-12 * max(scale, 1e-3))
    if not bool(bad.any()):
        return ""
    return f"is off by {float(error.max()):.3g} of {scale:.3g} in {int(bad.sum())} of {bad.numel()} entries"
