"""y = x W^T + b, on any number of sequence axes."""

from __future__ import annotations

from torch import Tensor, nn

import nnj


def through(w: Tensor, x: Tensor, y: Tensor) -> nnj.Jacobian:
    """dy = dx W^T."""
    return nnj.LinearMap(
        lambda v: v @ w.mT,
        lambda u: u @ w,
        x.shape[1:],
        y.shape[1:],
        x,
        squared=lambda: through(w.square(), x, y),
        matrix=w if y.dim() == 2 else None,
        makes_new=True,
    )


def linear(m: nn.Linear, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx W^T;  dy = x dW^T, a product with the places of the sequence;  dy = db at every
    place.
    """
    if x.dim() < 2:
        raise NotImplementedError("x is one vector, without a batch")
    w, outputs = m.weight.detach(), y.shape[1:]
    patches = lambda rows: (
        x[rows].flatten(1, -2).mT[:, None] if x.dim() > 2 else x[rows, None, :, None]
    )
    weight = nnj.PatchMatmul(patches, w.shape, outputs, x, shared=lambda v: x @ v.mT)
    slots: dict[str, nnj.Jacobian] = {"input": through(w, x, y), "weight": weight}
    if m.bias is not None:
        slots["bias"] = nnj.ScaleShift(m.bias.shape, outputs, x)
    return slots


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    register(nn.Linear, linear, uses="x")
