"""y holds the numbers of x in another shape."""
from __future__ import annotations

from torch import Tensor, nn

import nnj


def identity(m: nn.Module, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx."""
    return {"input": nnj.Identity(x.shape[1:], y.shape[1:], y)}


def flatten(m: nn.Flatten, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx, reshaped."""
    if m.start_dim % x.dim() == 0:
        raise NotImplementedError("it flattens the batch axis")
    return identity(m, x, y)


def unflatten(m: nn.Unflatten, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx, reshaped."""
    if not isinstance(m.dim, int) or m.dim % x.dim() == 0:
        raise NotImplementedError("it unflattens the batch axis, or an axis by its name")
    return identity(m, x, y)


@nnj.hookimpl
def nnj_register_layers(register):
    register(nn.Identity, identity, uses="")
    register(nn.Flatten, flatten, uses="")
    register(nn.Unflatten, unflatten, uses="")
