"""What the programs of the fuzzer call beside torch: functions with a backward of their own,
parametrizations, convex functions, routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from tests.support.cases.table import settled


class Cube(torch.autograd.Function):
    """x^3, with what it saves and a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * g


class Scaled(torch.autograd.Function):
    """s x, of which the first argument is a number and the last a word."""

    @staticmethod
    def forward(ctx: Any, s: float, x: Tensor, word: str) -> Tensor:
        ctx.s = s
        return s * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.s * g, None


class Product(torch.autograd.Function):
    """a * b, with a gradient for both."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return g * b, g * a


class Positive(nn.Module):
    """A parametrization by softplus."""

    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w)


def positive(layer: nn.Module) -> nn.Module:
    """The layer with a weight that is softplus of a parameter."""
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


def with_weight_of(other: Any, layer: Any) -> Any:
    """The layer with the weight of another one: one parameter of two layers."""
    layer.weight = other.weight
    return layer


def routed(f: Callable[[Tensor], Tensor], x: Tensor, index: Tensor) -> Tensor:
    """Some rows go through f, and are added where they came from."""
    return x.index_add(0, index, f(x[index]))


class Affine(nn.Module):
    """A layer that nobody knows: a scale and a shift in a forward of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.randn(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.scale) + self.shift


class Doubled(nn.Linear):
    """A subclass of a known layer that overrides its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


# -- losses of a user, convex in their first argument -------------------------------------------


def quartic(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().square().sum()


def log_cosh(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).cosh().log().mean()


def of_differences(z: Tensor, y: Tensor) -> Tensor:
    """Its Hessian is not diagonal within a row."""
    return ((z - y).flatten(1).cumsum(1)).square().sum()


def soft_max(z: Tensor, y: Tensor) -> Tensor:
    """The softmax of all entries of a row."""
    return ((2 * z).flatten(1).logsumexp(1) - (z * y).flatten(1).sum(1)).sum()


# -- and one that is not --------------------------------------------------------------------------


def wavy(z: Tensor, y: Tensor) -> Tensor:
    return (1.5 * z + y).sin().sum()


NAMES = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "checkpoint": checkpoint,
    "parametrizations": parametrizations,
    "settled": settled,
    "Cube": Cube,
    "Scaled": Scaled,
    "Product": Product,
    "positive": positive,
    "with_weight_of": with_weight_of,
    "routed": routed,
    "Affine": Affine,
    "Doubled": Doubled,
    "quartic": quartic,
    "log_cosh": log_cosh,
    "of_differences": of_differences,
    "soft_max": soft_max,
    "wavy": wavy,
}
