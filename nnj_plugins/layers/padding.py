"""y holds x with a margin around it: zeros, or entries of x. A negative margin cuts entries off."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj


def padding(
    m: nn.ConstantPad2d, x: Tensor, y: Tensor, mode: str, axes: int
) -> dict[str, nnj.Jacobian]:
    """dy[p] = dx[the entry that y[p] is a copy of], 0 where it is a constant: a matrix of zeros and
    ones.
    """
    if x.dim() <= axes:
        raise NotImplementedError("it pads the batch axis")
    space = torch.Size(x.shape[-axes:])

    def pad(v: Tensor) -> Tensor:
        return F.pad(v.reshape(len(v), -1, *space), list(m.padding), mode)

    def forward(v: Tensor) -> Tensor:
        return pad(v).reshape(len(v), *y.shape[1:])

    def adjoint(u: Tensor) -> Tensor:
        number = torch.arange(1, 1 + space.numel(), dtype=torch.float64).reshape(1, *space)
        # of each entry of y: 0 is a constant
        source = pad(number).flatten().to(u.device, torch.long)
        u = u.reshape(len(u), -1, len(source))
        return (
            u.new_zeros(*u.shape[:2], 1 + space.numel())
            .index_add_(2, source, u)[..., 1:]
            .reshape(len(u), *x.shape[1:])
        )

    squared = lambda: padding(m, x, y, mode, axes)["input"]
    return {"input": nnj.LinearMap(forward, adjoint, x.shape[1:], y.shape[1:], y, squared=squared)}


MODES = {
    "ConstantPad": "constant",
    "ZeroPad": "constant",
    "ReflectionPad": "reflect",
    "ReplicationPad": "replicate",
    "CircularPad": "circular",
}


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    for (kind, mode), axes in itertools.product(MODES.items(), (1, 2, 3)):
        register(
            getattr(nn, f"{kind}{axes}d"), functools.partial(padding, mode=mode, axes=axes), uses=""
        )
