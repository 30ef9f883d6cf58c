"""y = (A1 x A2 x ...) x, one matrix of weights of interpolation for each spatial axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj

NAMES = {
    "nearest": "upsample_nearest{}d",
    "nearest-exact": "_upsample_nearest_exact{}d",
    "linear": "upsample_linear{}d",
    "bilinear": "upsample_bilinear{}d",
    "bicubic": "upsample_bicubic{}d",
    "trilinear": "upsample_trilinear{}d",
}


def per_axis(value: Any, axes: int) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * axes


def upsample(m: nn.Upsample, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = (A1 x A2 x ...) dx."""
    axes = x.dim() - 2
    exact = "nearest" in m.mode
    scales = per_axis(None if m.recompute_scale_factor else m.scale_factor, axes)
    back = getattr(torch.ops.aten, NAMES[m.mode].format(axes) + "_backward")
    corners = [] if exact else [bool(m.align_corners)]

    def adjoint(u: Tensor) -> Tensor:
        found: Tensor = back(u, y.shape[2:], [len(u), *x.shape[1:]], *corners, *scales)
        return found

    # zeros and ones
    squared = (lambda: upsample(m, x, y)["input"]) if exact else (lambda: squares(m, x, y))
    return {
        "input": nnj.LinearMap(m.forward, adjoint, x.shape[1:], y.shape[1:], y, squared=squared)
    }


def matrix(m: nn.Upsample, axis: int, length: int, axes: int, like: Tensor) -> Tensor:
    """A of one axis, (places, length): what the layer makes of a one at each entry."""
    shape = [length if i == axis else 1 for i in range(axes)]
    size = (
        None
        if m.size is None
        else [s if i == axis else 1 for i, s in enumerate(per_axis(m.size, axes))]
    )
    scale = (
        None
        if m.scale_factor is None
        else [s if i == axis else 1.0 for i, s in enumerate(per_axis(m.scale_factor, axes))]
    )
    eye = torch.eye(length, dtype=like.dtype, device=like.device).reshape(length, 1, *shape)
    return (
        F.interpolate(eye, size, scale, m.mode, m.align_corners, m.recompute_scale_factor)
        .reshape(length, -1)
        .mT
    )


def squares(m: nn.Upsample, x: Tensor, y: Tensor) -> nnj.Jacobian:
    """The squares of a Kronecker product are the product of the squares."""
    axes = x.dim() - 2

    def apply(v: Tensor, back: bool) -> Tensor:
        for i in range(axes):
            a = matrix(m, i, x.shape[2 + i], axes, v).square()
            v = (v.movedim(2 + i, -1) @ (a if back else a.mT)).movedim(-1, 2 + i)
        return v

    return nnj.LinearMap(
        lambda v: apply(v, False), lambda u: apply(u, True), x.shape[1:], y.shape[1:], y
    )


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    register(nn.Upsample, upsample, uses="")
