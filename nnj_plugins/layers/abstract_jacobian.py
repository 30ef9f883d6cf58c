"""dy = J dx with J written down by the layer itself, in the original nnj's way, a subclass of
`nnj.AbstractJacobian`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nnj


def own(m: Any) -> str | None:
    """The name under which the class gives its Jacobian."""
    base = nnj.AbstractJacobian
    return next(
        (
            name
            for name in ("_jacobian", "jacobian")
            if getattr(type(m), name) is not getattr(base, name)
        ),
        None,
    )


class Given(nnj.Jacobian):
    """J as the layer gives it, when it is asked for: columns start to stop of what `entries` makes,
    (N, out, …).
    """

    def __init__(
        self,
        entries: Callable[[], Tensor],
        columns: slice,
        inputs: torch.Size,
        outputs: torch.Size,
        like: Tensor,
    ):
        super().__init__(inputs, outputs, like)
        self.entries, self.columns = entries, columns

    def dense(self) -> Tensor:
        return self.entries()[..., self.columns]


def given(m: Any, x: Tensor, y: Tensor, wrt: str, size: int) -> Tensor:
    """What `_jacobian` says, (N, out, size). Errors: `PluginError` for another shape."""
    name = own(m)
    assert name is not None
    with torch.no_grad():
        j = getattr(m, name)(x, y, wrt=wrt)
    shape = (len(y), y[0].numel(), size)
    if not isinstance(j, Tensor) or tuple(j.shape) != shape:
        what = tuple(j.shape) if isinstance(j, Tensor) else type(j).__name__
        axes = "(N, out, in)" if wrt == "input" else "(N, out, P)"
        raise nnj.PluginError(
            f"{type(m).__name__}.{name}(wrt={wrt!r}) returned {what}, expected {axes} = {shape}"
        )
    return j.to(y.dtype)


def custom(m: nn.Module, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = J dx and dy = J_w dw, over flattened axes, the parameters in the order of
    `parameters()`.
    """
    into = functools.cache(lambda: given(m, x, y, "input", x[0].numel()))
    slots: dict[str, nnj.Jacobian] = {}
    if x.is_floating_point():
        slots["input"] = Given(into, slice(None), x.shape[1:], y.shape[1:], y)
    params = dict(m.named_parameters())
    size, start = sum(p.numel() for p in params.values()), 0
    weights = functools.cache(lambda: given(m, x, y, "weight", size))
    for name, p in params.items():
        slots[name] = Given(weights, slice(start, start + p.numel()), p.shape, y.shape[1:], y)
        start += p.numel()
    return slots


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    register(nnj.AbstractJacobian, custom, when=lambda m: own(m) is not None)
