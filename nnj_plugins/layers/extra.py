"""Layers that the original nnj found useful beyond torch.nn, as plain modules, with their rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nnj

LIMIT = 15.0


class Sinusoidal(nn.Module):
    """y = sin(x), entry by entry."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class _TruncExp(torch.autograd.Function):
    """exp, with a slope of its own in both directions of differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return u * slope(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return v * slope(*ctx.saved_tensors)


def slope(x: Tensor) -> Tensor:
    """What TruncExp takes for its derivative."""
    return x.clamp(-LIMIT, LIMIT).exp()


class TruncExp(nn.Module):
    """y = exp(x), of which the derivative is *said to be* exp(min(max(x, -15), 15)), here and in
    autograd.

    Beyond these bounds that is not the derivative of y: it neither explodes nor vanishes.
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _TruncExp.apply(x)  # type: ignore[no-untyped-call]
        return y


class L2Norm(nn.Module):
    """y = x / (|x| + eps), with the norm over all entries of a sample."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x.flatten(1), dim=1)
        y: Tensor = x / (norm + self.eps).reshape(-1, *[1] * (x.dim() - 1))
        return y

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class Reshape(nn.Module):
    """The entries of each sample in the shape `dims`, one of which may be -1."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


class SkipConnection(nn.Sequential):
    """y = (x, F(x)) along axis 1, F being the layers one after the other.

    It needs no rule: its layers have theirs, and between layers autograd's own nodes do.
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return torch.cat([x, y], 1)


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


def sinusoidal(m: Sinusoidal, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = cos(x) dx."""
    return {"input": nnj.Diagonal(x.cos, x)}


def trunc_exp(m: TruncExp, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = exp(min(max(x, -15), 15)) dx."""
    return {"input": nnj.Diagonal(lambda: slope(x), x)}


def l2_norm(m: L2Norm, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = (dx - x (x . dx) / (|x| (|x| + eps))) / (|x| + eps)."""
    return {"input": Normalize(x, m.eps)}


def reshape(m: Reshape, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx, reshaped."""
    return {"input": nnj.Identity(x.shape[1:], y.shape[1:], y)}


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    register(Sinusoidal, sinusoidal, uses="x")
    register(TruncExp, trunc_exp, uses="x")
    register(L2Norm, l2_norm, uses="x")
    register(Reshape, reshape, uses="")
