"""y holds x with a margin around it: zeros, or entries of x. A negative margin cuts entries off."""
from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

import nnj
from nnj_plugins.conv import pad, unpad


def padding(m: nn.ConstantPad2d, x: Tensor, y: Tensor, mode: str, axes: int) -> dict[str, nnj.Jacobian]:
    """dy[p] = dx[the entry that y[p] is a copy of], 0 where it is a constant: a matrix of zeros and ones."""
    if x.dim() <= axes:
        raise NotImplementedError("it pads the batch axis")
    space, places = x.shape[-axes:], y.shape[-axes:]
    by = list(zip(m.padding[::2], m.padding[1::2], strict=True))[::-1]

    def forward(v: Tensor) -> Tensor:
        return pad(v.reshape(len(v), -1, *space), by, mode).reshape(len(v), *y.shape[1:])

    def adjoint(u: Tensor) -> Tensor:
        return unpad(u.reshape(len(u), -1, *places), by, mode, torch.Size(space)).reshape(len(u), *x.shape[1:])

    squared = lambda: padding(m, x, y, mode, axes)["input"]
    return {"input": nnj.LinearMap(forward, adjoint, x.shape[1:], y.shape[1:], y, squared=squared)}


MODES = {"ConstantPad": "zeros", "ZeroPad": "zeros", "ReflectionPad": "reflect", "ReplicationPad": "replicate",
         "CircularPad": "circular"}


@nnj.hookimpl
def nnj_register_layers(register):
    for (kind, mode), axes in itertools.product(MODES.items(), (1, 2, 3)):
        register(getattr(nn, f"{kind}{axes}d"), functools.partial(padding, mode=mode, axes=axes), uses="")
