"""y[n] = f(x[n:n + 1])[0], with f any module: torch.func differentiates it for each sample on its
own.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import nnj

Run = Callable[[dict[str, Tensor], Tensor], Tensor]


class PerSample(nnj.Jacobian):
    """J[n] is the derivative of run(state, x[n]) with respect to x[n], or to one entry of
    `state`.
    """

    def __init__(self, run: Run, state: dict[str, Tensor], slot: str, x: Tensor, y: Tensor):
        super().__init__(x.shape[1:] if slot == "input" else state[slot].shape, y.shape[1:], y)
        self.run, self.state, self.slot, self.x = run, state, slot, x

    def _at(self, row: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """A function of the slot alone, and where it is differentiated."""
        if self.slot == "input":
            return lambda z: self.run(self.state, z), row
        return lambda p: self.run({**self.state, self.slot: p}, row), self.state[self.slot]

    def jvp(self, v: Tensor) -> Tensor:
        def of(row: Tensor, v: Tensor) -> Tensor:
            f, at = self._at(row)
            tangents: Tensor = vmap(lambda t: jvp(f, (at,), (t,))[1])(v)
            return tangents

        shared = v.shape[1] != self.n
        by_row = vmap(of, in_dims=(0, None if shared else 1))
        try:
            with _generators_kept(v.device):
                found: Tensor = by_row(self.x, v[:, 0] if shared else v)
            return found.movedim(0, 1)
        except NotImplementedError:  # an operation of torch's that knows no forward derivative
            return super().jvp(v)

    def vjp(self, u: Tensor) -> Tensor:
        def of(row: Tensor, u: Tensor) -> Tensor:
            cotangents: Tensor = vmap(lambda t: vjp(*self._at(row))[1](t)[0])(u)
            return cotangents

        # (out_dims=1 fails where nothing depends on the row: a parameter that is not used)
        with _generators_kept(u.device):
            found: Tensor = vmap(of, in_dims=(0, 1))(self.x, u)
        return found.movedim(0, 1)

    def summed_vjp(self, u: Tensor) -> Tensor:
        if self.slot == "input":
            return super().summed_vjp(u)
        rows = lambda p: vmap(lambda row: self._at(row)[0](p))(self.x)
        with _generators_kept(u.device):
            back: Any = vjp(rows, self.state[self.slot])[1]
        found: Tensor = vmap(lambda t: back(t)[0])(u)
        return found


def _own_container(value: Any) -> Any:
    """Lists, dicts and sets in which a forward may keep something, as ours, with the same
    contents.
    """
    if isinstance(value, dict):
        own = copy.copy(value) if type(value) is defaultdict else {}
        own.update((k, _own_container(v)) for k, v in value.items())
        return own
    if type(value) is list:
        return [_own_container(v) for v in value]
    return copy.copy(value) if type(value) in (set, deque) else value


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """What a forward draws here is drawn a second time: torch's and Python's generators stand
    afterwards where the user's own call has left them.
    """
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)


def _copy(m: nn.Module) -> nn.Module:
    """The same module with the same tensors, on which a forward that sets attributes leaves no
    trace in the user's.
    """
    new = object.__new__(type(m))
    new.__dict__ = {k: _own_container(v) for k, v in m.__dict__.items()}
    new.__dict__["_modules"] = {k: None if c is None else _copy(c) for k, c in m._modules.items()}
    return new


def fallback(m: nn.Module, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy[n] = df(x[n]) for the input and for each parameter, provided that f, run on each sample
    alone, gives y.

    So what couples samples, draws random numbers or updates buffers is declined: it raises under
    vmap, or gives another y."""
    m = _copy(m)
    state: dict[str, Tensor] = {name: p.detach() for name, p in m.named_parameters()}
    state |= {name: b.clone() if m.training else b for name, b in m.named_buffers()}

    def run(state: dict[str, Tensor], row: Tensor) -> Tensor:
        # the other kernels of attention have no forward derivative
        with sdpa_kernel(SDPBackend.MATH):
            alone: Tensor = functional_call(m, state, (row[None],))[0]
            return alone

    try:  # the y of the call is the test of all that is assumed here
        with _generators_kept(x.device):
            alone: Any = vmap(lambda row: run(state, row))(x)
    except Exception as error:
        raise NotImplementedError(f"torch.func cannot run it for each sample: {error}") from error
    if not isinstance(alone, Tensor) or alone.shape != y.shape:
        raise NotImplementedError("its output does not have the batch in axis 0")
    tolerance = torch.finfo(y.dtype).eps ** 0.5 * y.abs().max()
    if bool(((alone - y).abs() > tolerance).any()):
        raise NotImplementedError(
            "run on each sample alone it gives something else than on the batch"
        )
    slots = [name for name, _ in m.named_parameters()] + (
        ["input"] if x.is_floating_point() else []
    )
    return {slot: PerSample(run, state, slot, x, y) for slot in slots}


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    register(nn.Module, fallback)
