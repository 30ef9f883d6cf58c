"""y holds the numbers of x in another shape, or in another order."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

import nnj

Map = Callable[[Tensor], Tensor]


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


def zeros_and_ones(forward: Map, back: Map, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = A dx with a matrix A of zeros and ones, a permutation perhaps: its squared entries are
    its entries.
    """
    squared = lambda: zeros_and_ones(forward, back, x, y)["input"]
    return {"input": nnj.LinearMap(forward, back, x.shape[1:], y.shape[1:], y, squared=squared)}


def pixel_shuffle(m: nn.PixelShuffle, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx, r^2 channels side by side in squares of r by r."""
    if x.dim() < 4:
        raise NotImplementedError("it shuffles one sample without a batch axis")
    return zeros_and_ones(m.forward, lambda u: F.pixel_unshuffle(u, m.upscale_factor), x, y)


def pixel_unshuffle(m: nn.PixelUnshuffle, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx, the entries of squares of r by r as r^2 channels."""
    if x.dim() < 4:
        raise NotImplementedError("it shuffles one sample without a batch axis")
    return zeros_and_ones(m.forward, lambda u: F.pixel_shuffle(u, m.downscale_factor), x, y)


def channel_shuffle(m: nn.ChannelShuffle, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx, channels of (groups, C / groups) as (C / groups, groups)."""
    return zeros_and_ones(m.forward, lambda u: F.channel_shuffle(u, x.shape[1] // m.groups), x, y)


def unfold(m: nn.Unfold, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx, every window of it as a column."""
    if x.dim() != 4:
        raise NotImplementedError("it unfolds one sample without a batch axis")
    back = lambda u: F.fold(u, x.shape[2:], m.kernel_size, m.dilation, m.padding, m.stride)
    return zeros_and_ones(m.forward, back, x, y)


def fold(m: nn.Fold, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = sum of the columns of dx where they are windows of y."""
    if x.dim() != 3:
        raise NotImplementedError("it folds one sample without a batch axis")
    return zeros_and_ones(
        m.forward, lambda u: F.unfold(u, m.kernel_size, m.dilation, m.padding, m.stride), x, y
    )


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    register(nn.Identity, identity, uses="")
    register(nn.Flatten, flatten, uses="")
    register(nn.Unflatten, unflatten, uses="")
    register(nn.PixelShuffle, pixel_shuffle, uses="")
    register(nn.PixelUnshuffle, pixel_unshuffle, uses="")
    register(nn.ChannelShuffle, channel_shuffle, uses="")
    register(nn.Unfold, unfold, uses="")
    register(nn.Fold, fold, uses="")
