"""A part of the table of layers: those that move, copy or interpolate entries, and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]
r = torch.randn


def case(
    name: str, cls: Callable[..., nn.Module], args: Any, shape: tuple[int, ...], **options: Any
) -> Case:
    return name, lambda: cls(*args, **options), lambda: r(*shape)


SPACE = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}
PADS = {1: (2, 1), 2: (1, 0, 2, 1), 3: (0, 1, 2, 1, 1, 0)}
PADDING: list[Case] = [
    case(
        f"{kind.lower()}{axes}d",
        getattr(nn, f"{kind}{axes}d"),
        (PADS[axes], *more),
        (2, 2, *SPACE[axes]),
    )
    for kind, more in (("ConstantPad", (1.5,)), ("ZeroPad", ()), ("ReplicationPad", ()))
    for axes in (1, 2, 3)
]
PADDING += [
    case(f"reflectionpad{axes}d", getattr(nn, f"ReflectionPad{axes}d"), (1,), (2, 2, *SPACE[axes]))
    for axes in (1, 2, 3)
]
PADDING += [
    case(
        f"circularpad{axes}d",
        getattr(nn, f"CircularPad{axes}d"),
        (PADS[axes],),
        (2, 2, *SPACE[axes]),
    )
    for axes in (1, 2, 3)
]
PADDING += [
    case("constantpad1d-one-number", nn.ConstantPad1d, (1, -2.0), (4, 3)),
    case("constantpad2d-negative", nn.ConstantPad2d, ((-1, 1, 2, -1), 3.0), (2, 2, 4, 3)),
    case("zeropad2d-negative", nn.ZeroPad2d, (-1,), (2, 2, 3, 4)),
    case("zeropad2d-many-axes", nn.ZeroPad2d, ((1, -1, 0, 1),), (2, 1, 2, 2, 3)),
    case("zeropad3d-negative", nn.ZeroPad3d, ((-1, 0, 1, 0, 0, -1),), (2, 1, 2, 2, 3)),
    case("replicationpad1d-negative", nn.ReplicationPad1d, ((-1, 2),), (2, 2, 4)),
    case("replicationpad2d-negative", nn.ReplicationPad2d, ((-1, 2, 1, -1),), (2, 2, 3, 3)),
    case("reflectionpad2d-negative", nn.ReflectionPad2d, ((2, -1, -1, 1),), (2, 2, 3, 3)),
    case("circularpad2d-negative", nn.CircularPad2d, ((2, -1, -1, 1),), (2, 2, 3, 3)),
    case("reflectionpad1d-rows", nn.ReflectionPad1d, (2,), (4, 3)),
    case("replicationpad2d-rows", nn.ReplicationPad2d, (1,), (4, 2, 3)),
]

SHUFFLE: list[Case] = [
    case("pixelshuffle", nn.PixelShuffle, (2,), (2, 8, 1, 2)),
    case("pixelshuffle-axes", nn.PixelShuffle, (3,), (2, 2, 9, 1, 1)),
    case("pixelunshuffle", nn.PixelUnshuffle, (2,), (2, 1, 4, 2)),
    case("pixelunshuffle-axes", nn.PixelUnshuffle, (2,), (2, 2, 1, 2, 2)),
    case("channelshuffle", nn.ChannelShuffle, (2,), (2, 6, 2)),
    case("channelshuffle-space", nn.ChannelShuffle, (3,), (2, 6, 1, 2)),
]

UPSAMPLE: list[Case] = [
    case(f"upsample-{mode}{axes}d-{name}", nn.Upsample, (), (2, 2, *space), mode=mode, **options)
    for mode, spaces in (
        ("nearest", (1, 2, 3)),
        ("nearest-exact", (1, 2, 3)),
        ("linear", (1,)),
        ("bilinear", (2,)),
        ("bicubic", (2,)),
        ("trilinear", (3,)),
    )
    for axes in spaces
    for space in [{1: (3,), 2: (3, 2), 3: (2, 1, 2)}[axes]]
    for name, options in (
        ("size", {"size": {1: (5,), 2: (4, 5), 3: (3, 2, 3)}[axes]}),
        ("scale", {"scale_factor": {1: 2.4, 2: (2.5, 1.7), 3: (1.5, 2.0, 1.0)}[axes]}),
        ("recomputed", {"scale_factor": 1.7, "recompute_scale_factor": True}),
    )
]
UPSAMPLE += [
    case(
        f"upsample-{mode}-corners-{name}",
        nn.Upsample,
        (),
        (2, 1, *space),
        mode=mode,
        align_corners=True,
        **options,
    )
    for mode, space in (
        ("linear", (3,)),
        ("bilinear", (3, 2)),
        ("bicubic", (2, 3)),
        ("trilinear", (2, 1, 2)),
    )
    for name, options in (("size", {"size": 4}), ("scale", {"scale_factor": 1.6}))
]
UPSAMPLE += [
    case("upsample-smaller", nn.Upsample, (), (2, 1, 5, 4), mode="bilinear", scale_factor=0.6),
    case("upsample-one-number", nn.Upsample, (4,), (2, 2, 2, 3)),
    case("upsamplingnearest2d", nn.UpsamplingNearest2d, (), (2, 2, 2, 3), scale_factor=2),
    case("upsamplingbilinear2d", nn.UpsamplingBilinear2d, ((3, 4),), (2, 2, 2, 3)),
]

GATES: list[Case] = [
    case("glu", nn.GLU, (), (4, 6)),
    case("glu-channels", nn.GLU, (1,), (2, 4, 3)),
    case("glu-middle", nn.GLU, (-2,), (2, 2, 4, 2)),
]

CASES: list[Case] = [*PADDING, *SHUFFLE, *UPSAMPLE, *GATES]
