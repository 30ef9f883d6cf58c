"""Rules of the layers that the original nnj has beyond torch.nn."""

from __future__ import annotations

import torch
from torch import Tensor

import nnj


class Normalize(nnj.Jacobian):
    """J = (I - x x^T / (|x| (|x| + eps))) / (|x| + eps), which is symmetric; at x = 0 the identity
    over eps.
    """

    def __init__(self, x: Tensor, eps: float):
        super().__init__(x.shape[1:], x.shape[1:], x)
        self.x, self.eps = x, eps

    def jvp(self, v: Tensor) -> Tensor:
        x, flat = self.x.reshape(self.n, -1), v.reshape(*v.shape[:2], -1)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        wide = norm + self.eps
        along = (x * flat).sum(-1, keepdim=True) / (norm * wide).clamp(
            min=torch.finfo(x.dtype).tiny
        )
        found: Tensor = (flat - x * along) / wide
        return found.reshape(v.shape)

    def vjp(self, u: Tensor) -> Tensor:
        return self.jvp(u)


def sinusoidal(m: nnj.Sinusoidal, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = cos(x) dx."""
    return {"input": nnj.Diagonal(x.cos, x)}


def trunc_exp(m: nnj.TruncExp, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = exp(min(max(x, -15), 15)) dx."""
    return {"input": nnj.Diagonal(lambda: m.slope(x), x)}


def l2_norm(m: nnj.L2Norm, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = (dx - x (x . dx) / (|x| (|x| + eps))) / (|x| + eps)."""
    return {"input": Normalize(x, m.eps)}


def reshape(m: nnj.Reshape, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx, reshaped."""
    return {"input": nnj.Identity(x.shape[1:], y.shape[1:], y)}


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    register(nnj.Sinusoidal, sinusoidal, uses="x")
    register(nnj.TruncExp, trunc_exp, uses="x")
    register(nnj.L2Norm, l2_norm, uses="x")
    register(nnj.Reshape, reshape, uses="")
