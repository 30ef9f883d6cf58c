"""y[o, p] = b[o] + sum over c and offsets k of w[o, c, k] pad(x)[c, s p + d k], on any number of
spatial axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def edges(m: nn.Conv2d | nn.ConvTranspose2d) -> list[tuple[int, int]]:
    """What is put before and after each spatial axis. "same" puts the odd one after."""
    if m.padding == "valid":
        return [(0, 0)] * len(m.kernel_size)
    if m.padding == "same":
        total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(int(p), int(p)) for p in m.padding]


def pad(v: Tensor, by: list[tuple[int, int]], mode: str) -> Tensor:
    """(B, C, *space) -> (B, C, *padded)."""
    flat = [p for pair in reversed(by) for p in pair]
    return F.pad(v, flat, mode="constant" if mode == "zeros" else mode) if any(flat) else v


def unpad(u: Tensor, by: list[tuple[int, int]], mode: str, space: torch.Size) -> Tensor:
    """The adjoint of `pad`: every padded entry goes back to the one that it is a copy of."""
    if mode == "zeros" or not any(a or b for a, b in by):
        return pad(u, [(-a, -b) for a, b in by], "zeros")
    source = torch.arange(space.numel(), dtype=torch.float64).reshape(1, 1, *space)
    source = pad(source, by, mode).flatten().to(u.device, torch.long)
    flat = u.new_zeros(*u.shape[:2], space.numel())
    return flat.index_add_(2, source, u.flatten(2)).reshape(*u.shape[:2], *space)


def patches(m: nn.Conv2d, x: Tensor) -> Tensor:
    """U of (N, G, I, L): what each of the L places of y sees of x."""
    seen = pad(x, edges(m), m.padding_mode)
    for axis, (k, s, d) in enumerate(
        zip(m.kernel_size, m.stride, m.dilation, strict=True), start=2
    ):
        seen = seen.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    space = len(m.kernel_size)
    places = tuple(range(2, 2 + space))
    seen = seen.permute(0, 1, *(a + space for a in places), *places)  # (N, C, *kernel, *places)
    return seen.reshape(len(x), m.groups, -1, seen.shape[-space:].numel())


def through(m: nn.Conv2d, w: Tensor, x: Tensor, y: Tensor) -> nnj.Jacobian:
    """dy = w * pad(dx)."""
    by, mode, space = edges(m), m.padding_mode, x.shape[2:]
    convolve, axes = CONVOLVE[len(space)], len(space)
    inside = mode == "zeros" and all(a == b for a, b in by)  # torch's convolution pads by itself
    own, around = ([a for a, _ in by], [(0, 0)] * len(by)) if inside else ([0] * len(by), by)
    options = m.stride, own, m.dilation, m.groups
    wide = [s + a + b for s, (a, b) in zip(space, around, strict=True)]

    def forward(v: Tensor) -> Tensor:
        return convolve(pad(v, around, mode), w, None, *options)

    def adjoint(u: Tensor) -> Tensor:
        like = u.new_empty(len(u), m.in_channels, *wide)  # of which only the shape is read
        found = torch.ops.aten.convolution_backward(
            u,
            like,
            w,
            None,
            m.stride,
            own,
            m.dilation,
            False,
            [0] * axes,
            m.groups,
            [True, False, False],
        )
        return unpad(found[0], around, mode, space)

    # With other modes a copied entry meets several weights, and the square of a sum is not the sum
    # of squares.
    squared = (lambda: through(m, w.square(), x, y)) if mode == "zeros" else None
    return nnj.LinearMap(
        forward, adjoint, x.shape[1:], y.shape[1:], x, squared=squared, makes_new=True
    )


def conv(m: nn.Conv2d, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = w * pad(dx);  dy = dw U, a product with the patches U of pad(x);  dy = db at every
    place.
    """
    if x.dim() != m.weight.dim():
        raise NotImplementedError("a convolution of one sample without a batch axis")
    w, outputs = m.weight.detach(), y.shape[1:]
    weight = nnj.PatchMatmul(
        lambda rows: patches(m, x[rows]),
        w.shape,
        outputs,
        x,
        groups=m.groups,
        last=False,
        shared=lambda v: m._conv_forward(x, v, None),
    )
    slots: dict[str, nnj.Jacobian] = {"input": through(m, w, x, y), "weight": weight}
    if m.bias is not None:
        slots["bias"] = nnj.ScaleShift(m.bias.shape, outputs, x, last=False)
    return slots


# -- transposed: y[o, q] = b[o] + sum over c, p, k with q = s p - a + d k of w[c, o, k] x[c, p] ----


def beyond(m: nn.ConvTranspose2d, x: Tensor, y: Tensor) -> list[int]:
    """What the call has added to the output at the end of each axis."""
    options = zip(
        y.shape[2:], x.shape[2:], m.stride, edges(m), m.dilation, m.kernel_size, strict=True
    )
    return [
        length - ((i - 1) * s - 2 * p[0] + d * (k - 1) + 1) for length, i, s, p, d, k in options
    ]


def through_transposed(m: nn.ConvTranspose2d, w: Tensor, x: Tensor, y: Tensor) -> nnj.Jacobian:
    """dy = w *^T dx, the adjoint of a convolution, which is its own adjoint's."""
    axes, more = x.dim() - 2, beyond(m, x, y)
    own = [p for p, _ in edges(m)]
    inside: Any = (..., *[slice(length) for length in x.shape[2:]])
    transpose = TRANSPOSE[axes]
    forward = lambda v: transpose(v, w, None, m.stride, own, more, m.groups, m.dilation)
    adjoint = lambda u: CONVOLVE[axes](u, w, None, m.stride, own, m.dilation, m.groups)[inside]
    return nnj.LinearMap(
        forward,
        adjoint,
        x.shape[1:],
        y.shape[1:],
        x,
        squared=lambda: through_transposed(m, w.square(), x, y),
    )


def patches_transposed(m: nn.ConvTranspose2d, x: Tensor, y: Tensor) -> Tensor:
    """U of (N, G, I, L): what each of the L places of y sees of x with s - 1 zeros between entries,
    backwards from the end.
    """
    space = len(m.kernel_size)
    wide = x.new_zeros(
        *x.shape[:2], *((i - 1) * s + 1 for i, s in zip(x.shape[2:], m.stride, strict=True))
    )
    between: Any = (..., *[slice(None, None, s) for s in m.stride])
    wide[between] = x
    reach = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    by = [(r - p, r - p + e) for r, (p, _), e in zip(reach, edges(m), beyond(m, x, y), strict=True)]
    seen = pad(wide, by, "zeros")
    for axis, (r, d) in enumerate(zip(reach, m.dilation, strict=True), start=2):
        seen = seen.unfold(axis, r + 1, 1)[..., ::d].flip(-1)
    places = tuple(range(2, 2 + space))
    seen = seen.permute(0, 1, *(a + space for a in places), *places)
    return seen.reshape(len(x), m.groups, -1, seen.shape[-space:].numel())


def conv_transposed(m: nn.ConvTranspose2d, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = w *^T dx;  dy = dw U once channels in and out have changed places;  dy = db at
    every place.
    """
    if x.dim() != m.weight.dim():
        raise NotImplementedError("a convolution of one sample without a batch axis")
    w, outputs, groups = m.weight.detach(), y.shape[1:], m.groups
    split = (groups, w.shape[0] // groups, *w.shape[1:])
    inner = (m.out_channels, w.shape[0] // groups, *w.shape[2:])
    product = nnj.PatchMatmul(
        lambda rows: patches_transposed(m, x[rows], y), inner, outputs, x, groups=groups, last=False
    )
    view = nnj.View.permuted(w.shape, inner, split, (0, 2, 1, *range(3, len(split))))
    weight = nnj.ViewJacobian(product, view)
    slots: dict[str, nnj.Jacobian] = {"input": through_transposed(m, w, x, y), "weight": weight}
    if m.bias is not None:
        slots["bias"] = nnj.ScaleShift(m.bias.shape, outputs, x, last=False)
    return slots


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        register(cls, conv, uses="x")
    for transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        register(transposed, conv_transposed, uses="x")
