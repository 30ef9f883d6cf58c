"""The truth, from torch.func alone: dense float64 Jacobians of a model that was never extended.

`Truth` is that of a case of the table, `dense` that of any model. A case is a piece of user code,
`run(model, loss, *data) -> scalar`. Here it is run with a functional model and with a loss that
notes what it is given: these are the outputs. The same code with other outputs put in their place
is the scalar as a function of the outputs, so that reductions, factors, sums of losses and weighted
sums are all in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.support.cases import CASES, EITHER, Case


def build(case: Case, twin: bool = False) -> nn.Module:
    """The model of a case in float64, with parameters that are neither zero nor one, always the
    same.
    """
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
    """Inputs and targets in float64, always the same."""
    torch.manual_seed(1)
    return tuple(
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case.data()
    )


def losses_of(case: Case) -> tuple[Any, ...]:
    """The losses in float64, always the same."""
    torch.manual_seed(3)
    made = case.loss()
    return tuple(
        l.double() if isinstance(l, nn.Module) else l
        for l in (made if isinstance(made, tuple) else (made,))
    )


def run(
    case: Case, model: Any, losses: tuple[Any, ...], data: tuple[Any, ...] | None = None
) -> Tensor:
    """The user's code, with its random numbers always the same."""
    data = data_of(case) if data is None else data
    torch.manual_seed(2)
    return case.run(model, losses[0] if len(losses) == 1 else losses, *data)


class Notes:
    """A loss that notes the outputs which it is given, or puts others in their place."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.put: list[Tensor] | None = None
        # for each call of a loss, which leaves of its arguments are outputs
        self.which: list[list[int]] = []
        self.first = True
        self.calls = 0

    def start(self, put: list[Tensor] | None = None) -> None:
        self.seen, self.calls, self.put = [], 0, put

    def wrap(self, loss: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            if self.first:
                self.which.append(
                    [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
                )
            which = self.which[self.calls]
            self.calls += 1
            for i in which:
                if self.put is not None:
                    leaves[i] = self.put[len(self.seen)]
                self.seen.append(leaves[i])
            args, kwargs = tree_unflatten(leaves, spec)
            return loss(*args, **kwargs)

        return noting


@dataclass
class Dense:
    """J of all D outputs in each parameter, and H and g of the scalar in the outputs.

    Args:
        jacobian: {name of a parameter: (D, *shape of it)}.
        hessian: (D, D).
        gradient: (D,).
        samples: (D,), the sample of each output.
        n: the number of samples.
    """

    jacobian: dict[str, Tensor]
    hessian: Tensor
    gradient: Tensor
    samples: Tensor
    n: int

    def columns(self, name: str) -> Tensor:
        """The Jacobian of all outputs in one parameter, (D, P)."""
        return self.jacobian[name].reshape(len(self.hessian), -1)

    def block(self, names: list[str]) -> Tensor:
        """J^T H J of these parameters together."""
        j = torch.cat([self.columns(name) for name in names], 1)
        return j.T @ self.hessian @ j

    def diag(self, name: str) -> Tensor:
        """diag(J^T H J), in the shape of the parameter."""
        j = self.columns(name)
        return ((self.hessian @ j) * j).sum(0).reshape(self.jacobian[name].shape[1:])

    def shares(self, v: Tensor, name: str) -> Tensor:
        """v^T J of each sample, (N, *shape of the parameter)."""
        rows = v[:, None] * self.columns(name)
        total = rows.new_zeros(self.n, rows.shape[1]).index_add_(0, self.samples, rows)
        return total.reshape(self.n, *self.jacobian[name].shape[1:])

    def batch_grad(self, name: str) -> Tensor:
        """The gradient's share of each sample."""
        return self.shares(self.gradient, name)


def dense(
    model: nn.Module,
    call: Callable[[Callable[..., Any]], list[Tensor]],
    scalar: Callable[[list[Tensor]], Tensor],
    samples: Tensor | None = None,
) -> Dense:
    """The truth of any model, in its parameters that require grad.

    Args:
        model: in float64, not extended.
        call: from a function that runs the model to a list of output tensors.
        scalar: from that list to the scalar that is differentiated.
        samples: (D,), the sample of each output; one for all if left out.
    """
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def outputs(params: dict[str, Tensor]) -> list[Tensor]:
        return call(lambda *args, **kwargs: functional_call(model, params | rest, args, kwargs))

    shapes = [t.shape for t in outputs(params)]
    flat = lambda params: torch.cat([t.flatten() for t in outputs(params)])
    of = lambda z: scalar(unflattened(z, shapes))
    z = flat(params).detach()
    samples = torch.zeros(len(z), dtype=torch.long) if samples is None else samples
    jacobian = {name: j.detach() for name, j in jacrev(flat)(params).items()}
    return Dense(
        jacobian,
        jacrev(jacrev(of))(z).detach(),
        grad(of)(z).detach(),
        samples,
        int(samples.max()) + 1,
    )


def unflattened(z: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """The tensors whose entries stand one behind the other in z."""
    parts = z.split([shape.numel() for shape in shapes])
    return [t.reshape(shape) for t, shape in zip(parts, shapes, strict=True)]


class Truth(Dense):
    """The truth of one case.

    Errors: AssertionError if torch.func computes another output (another mask of dropout), or
    another gradient, than autograd: the case then needs a twin.
    """

    def __init__(self, case: Case):
        model, data = build(case, twin=True), data_of(case)
        notes = Notes()
        losses = tuple(notes.wrap(loss) for loss in losses_of(case))
        self.value = run(case, model, losses, data).detach()
        notes.first = False
        outs = notes.seen
        shapes = [t.shape for t in outs]
        params = {name: p.detach().clone() for name, p in model.named_parameters()}

        def outputs(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            notes.start()
            run(case, lambda *args, **kwargs: functional_call(model, p, args, kwargs), losses, data)
            flat = torch.cat([t.flatten() for t in notes.seen])
            return flat, flat

        def scalar(flat: Tensor) -> Tensor:
            notes.start(unflattened(flat, shapes))
            functional = lambda *args, **kwargs: functional_call(model, params, args, kwargs)
            return run(case, functional, losses, data)

        z = torch.cat([t.detach().flatten() for t in outs])
        j, again = jacobians(outputs, params, has_aux=True)
        assert torch.allclose(again, z, rtol=1e-12, atol=1e-14), (
            f"{case.name}: torch.func computes another output"
        )
        jacobian = {name: t.detach().reshape(len(z), *params[name].shape) for name, t in j.items()}
        samples = every_entry(case.numbers([t.detach() for t in outs], data), outs)
        n = int(samples.max()) + 1 if case.n is None else case.n
        h, g = jacrev(jacrev(scalar))(z).detach(), jacrev(scalar)(z).detach()
        super().__init__(jacobian, h, g, samples, n)
        run(case, model, losses_of(case), data).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert torch.allclose(
                    self.batch_grad(name).sum(0), p.grad, rtol=1e-9, atol=1e-12
                ), f"{case.name}: {name}"


def jacobians(f: Callable[..., Any], at: Any, **options: Any) -> Any:
    """`jacrev(f)(at)`; row by row where vmap cannot take a backward that leaves one of its results
    out, as that of grid_sample in torch before 2.13.
    """
    try:
        return jacrev(f, **options)(at)
    except RuntimeError as error:
        if "undefined Tensor in C++" not in str(error):
            raise
        return jacrev(f, chunk_size=1, **options)(at)


def every_entry(numbers: list[Tensor], outs: list[Tensor]) -> Tensor:
    """The samples of all entries, from those of the leading axes of each output."""
    full = lambda w, t: w.reshape(w.shape + (1,) * (t.dim() - w.dim())).expand(t.shape).flatten()
    return torch.cat([full(w, t) for w, t in zip(numbers, outs, strict=True)])


@functools.cache
def truth(name: str) -> Truth:
    """The truth of a case of the table, once."""
    return Truth((CASES | EITHER)[name])


def close(found: Any, expected: Tensor) -> str:
    """Nothing if equal, to 1e-8 of each entry or 1e-12 of the largest; else what is the matter."""
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
    return (
        f"is off by {float(error.max()):.3g} of {scale:.3g} in {int(bad.sum())} of "
        f"{bad.numel()} entries"
    )
