"""y[p] = max of x over the window of p, or y[p] = sum of x / size, where a window is a box: one
matrix for each axis.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """An option of torch's, one number or one for each axis, as one for each axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))


def batched(x: Tensor, axes: int) -> None:
    if x.dim() != axes + 2:
        raise NotImplementedError("pooling of one sample without a batch axis")


# -- the largest of a window -----------------------------------------------------------------------


def largest(x: Tensor, y: Tensor, where: Callable[[], Tensor]) -> dict[str, nnj.Jacobian]:
    """dy = dx[where], a matrix of zeros and ones; its adjoint adds u up at `where`,
    (N, C, *places), flat over the space.
    """
    space, places = x.shape[2:], y.shape[2:]

    def forward(v: Tensor) -> Tensor:
        index = where().flatten(2).expand(*v.shape[:3], -1)
        return v.flatten(3).gather(3, index).reshape(*v.shape[:3], *places)

    def adjoint(u: Tensor) -> Tensor:
        index = where().flatten(2).expand(*u.shape[:3], -1)
        flat = u.new_zeros(*u.shape[:3], space.numel())
        return flat.scatter_add_(3, index, u.flatten(3)).reshape(*u.shape[:3], *space)

    squared = lambda: largest(x, y, where)["input"]
    return {
        "input": nnj.LinearMap(
            forward,
            adjoint,
            x.shape[1:],
            y.shape[1:],
            x,
            squared=squared,
            per_row=True,
            makes_new=True,
        )
    }


def max_pool(m: nn.MaxPool2d, x: Tensor, y: Tensor, axes: int) -> dict[str, nnj.Jacobian]:
    """dy[p] = dx[argmax of the window of p]."""
    batched(x, axes)
    if m.return_indices:
        raise NotImplementedError("return_indices=True: the output is not one tensor")
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
    options = m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode
    return largest(x, y, functools.cache(lambda: pool(x, *options, return_indices=True)[1]))


def adaptive_max_pool(
    m: nn.AdaptiveMaxPool2d, x: Tensor, y: Tensor, axes: int
) -> dict[str, nnj.Jacobian]:
    """dy[p] = dx[argmax of the window of p]."""
    batched(x, axes)
    if m.return_indices:
        raise NotImplementedError("return_indices=True: the output is not one tensor")
    pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[axes - 1]
    return largest(x, y, functools.cache(lambda: pool(x, y.shape[2:], return_indices=True)[1]))


# -- the mean of a window --------------------------------------------------------------------------


Window = Callable[[int, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def boxes(x: Tensor, y: Tensor, window: Window, power: int = 1) -> dict[str, nnj.Jacobian]:
    """dy = (A1 x A2 x ...) dx, one matrix A_i for each spatial axis: 1 / size from start to end of
    each place's window.

    Args:
        window: gives start, end and size of the windows, from the number of the axis, its places
            and its length.
        power: of the entries of the matrices.
    """

    def matrix(i: int, like: Tensor) -> Tensor:
        places, length = torch.arange(y.shape[2 + i], device=like.device), x.shape[2 + i]
        start, end, size = window(i, places, length)
        at = torch.arange(length, device=like.device)
        return ((at >= start[:, None]) & (at < end[:, None])).to(like.dtype) / size.clamp(min=1)[
            :, None
        ]

    def apply(v: Tensor, back: bool) -> Tensor:
        for i in reversed(range(v.dim() - 2)):
            a = matrix(i, v).pow(power)
            v = (v.movedim(2 + i, -1) @ (a if back else a.mT)).movedim(-1, 2 + i)
        return v

    squared = lambda: boxes(x, y, window, 2 * power)["input"]
    return {
        "input": nnj.LinearMap(
            lambda v: apply(v, False),
            lambda u: apply(u, True),
            x.shape[1:],
            y.shape[1:],
            x,
            squared=squared,
            by_channel=True,
        )
    }


def avg_pool(m: nn.AvgPool2d, x: Tensor, y: Tensor, axes: int) -> dict[str, nnj.Jacobian]:
    """dy[p] = sum of dx in [p s - a, p s - a + k) / size, the size clipped to the padded or to the
    bare input.
    """
    batched(x, axes)
    kernel, stride, padding = (
        per_axis(value, axes) for value in (m.kernel_size, m.stride, m.padding)
    )
    divisor = getattr(m, "divisor_override", None)

    def window(i: int, places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        start = places * stride[i] - padding[i]
        end = (start + kernel[i]).clamp(max=length + padding[i])
        size = end - start if m.count_include_pad else end.clamp(max=length) - start.clamp(min=0)
        if divisor is not None:
            size = torch.full_like(start, divisor if i == 0 else 1)
        return start, end, size

    return boxes(x, y, window)


def adaptive_avg_pool(
    m: nn.AdaptiveAvgPool2d, x: Tensor, y: Tensor, axes: int
) -> dict[str, nnj.Jacobian]:
    """dy[p] = mean of dx in [floor(p i / o), ceil((p + 1) i / o)) for i entries and o places."""
    batched(x, axes)

    def window(i: int, places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        start, end = places * length // len(places), -((places + 1) * -length // len(places))
        return start, end, end - start

    return boxes(x, y, window)


def lp_pool(m: nn.LPPool2d, x: Tensor, y: Tensor, axes: int) -> dict[str, nnj.Jacobian]:
    """y = (sum of x^p)^(1/p), so dy = y^(1 - p) sum of x^(p - 1) dx; torch makes the sum of a mean,
    clipped at the end.
    """
    batched(x, axes)
    kernel = per_axis(m.kernel_size, axes)
    stride = per_axis(m.kernel_size if m.stride is None else m.stride, axes)

    def window(i: int, places: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        start = places * stride[i]
        end = (start + kernel[i]).clamp(max=length)
        return start, end, end - start

    p, j = float(m.norm_type), boxes(x, y, window)["input"]
    before, after = x.pow(p - 1), y.pow(1 - p) * math.prod(kernel)
    return {
        "input": nnj.LinearMap(
            lambda v: after * j.jvp(v * before),
            lambda u: before * j.vjp(u * after),
            x.shape[1:],
            y.shape[1:],
            x,
            per_row=True,
        )
    }


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    rules: dict[str, Callable[..., Any]] = {
        "MaxPool": max_pool,
        "AdaptiveMaxPool": adaptive_max_pool,
        "AvgPool": avg_pool,
        "AdaptiveAvgPool": adaptive_avg_pool,
        "LPPool": lp_pool,
    }
    for (name, rule), axes in itertools.product(rules.items(), (1, 2, 3)):
        register(
            getattr(nn, f"{name}{axes}d"),
            functools.partial(rule, axes=axes),
            uses="xy" if "LP" in name else "x" if "Max" in name else "",
            node="MaxPool2DWithIndicesBackward0" if (name, axes) == ("MaxPool", 2) else "",
        )
