"""y = f(x), entry by entry; or y = softmax(x) along one axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nnj

aten = torch.ops.aten
Rule = Callable[[Any, Tensor, Tensor], dict[str, nnj.Jacobian]]


def known_if(fact: bool, reason: str) -> None:
    if not fact:
        raise NotImplementedError(reason)


# -- f' told from y, which in-place activations leave alone. At a kink f' is what torch's own backwa


def leaky(y: Tensor, slope: float) -> Tensor:
    """f' of y = x where x > 0, slope x elsewhere."""
    return torch.where(y > 0, torch.ones_like(y), slope)


def elu(y: Tensor, top: float, at: float, rate: float) -> Tensor:
    """f' of y = top x where x > 0, at (exp(rate x) - 1) elsewhere."""
    return torch.where(y > 0, top, rate * (y + at))


# Klambauer et al. 2017: lambda and alpha
SELU = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
FROM_Y: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.ReLU: lambda m, y: aten.threshold_backward(torch.ones_like(y), y, 0),  # one pass over y
    nn.ReLU6: lambda m, y: ((y > 0) & (y < 6)).to(y.dtype),
    nn.Hardtanh: lambda m, y: ((y > m.min_val) & (y < m.max_val)).to(y.dtype),
    nn.Hardsigmoid: lambda m, y: aten.hardsigmoid_backward(
        ((y > 0) & (y < 1)).to(y.dtype), torch.zeros_like(y)
    ),
    nn.LeakyReLU: lambda m, y: leaky(y, m.negative_slope),
    nn.RReLU: lambda m, y: leaky(y, (m.lower + m.upper) / 2),
    nn.Threshold: lambda m, y: (y > m.threshold).to(y.dtype),
    nn.ELU: lambda m, y: elu(y, 1, m.alpha, 1),
    nn.CELU: lambda m, y: elu(y, 1, m.alpha, 1 / m.alpha),
    nn.SELU: lambda m, y: elu(y, SELU[0], SELU[0] * SELU[1], 1),
    nn.Sigmoid: lambda m, y: y * (1 - y),
    nn.Tanh: lambda m, y: 1 - y.square(),
}
SLOPE = "with a negative slope y does not tell x"


def _rrelu(m: nn.RReLU) -> None:
    known_if(not m.training, "the slopes of this call are known to autograd's node alone")
    known_if(m.lower + m.upper >= 0, SLOPE)


# where the options of a module decide whether y tells x
IF: dict[type[nn.Module], Callable[[Any], None]] = {
    nn.LeakyReLU: lambda m: known_if(m.negative_slope >= 0, SLOPE),
    nn.RReLU: _rrelu,
    nn.Threshold: lambda m: known_if(
        m.value <= m.threshold, "with a value above the threshold y does not tell x"
    ),
    nn.ELU: lambda m: known_if(m.alpha >= 0, "with a negative alpha y does not tell x"),
}

# -- f' told from x --------------------------------------------------------------------------------

FROM_X: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.GELU: lambda m, x: aten.gelu_backward(torch.ones_like(x), x, approximate=m.approximate),
    nn.SiLU: lambda m, x: aten.silu_backward(torch.ones_like(x), x),
    nn.Mish: lambda m, x: aten.mish_backward(torch.ones_like(x), x),
    nn.Hardswish: lambda m, x: aten.hardswish_backward(torch.ones_like(x), x),
    nn.Softplus: lambda m, x: torch.where(m.beta * x > m.threshold, 1.0, torch.sigmoid(m.beta * x)),
    nn.LogSigmoid: lambda m, x: torch.sigmoid(-x),
    nn.Softsign: lambda m, x: (1 + x.abs()).reciprocal().square(),
    nn.Hardshrink: lambda m, x: (~(x.abs() <= m.lambd)).to(x.dtype),
    nn.Softshrink: lambda m, x: (~(x.abs() <= m.lambd)).to(x.dtype),
    nn.Tanhshrink: lambda m, x: x.tanh().square(),
}


def from_y(
    slope: Callable[[Any, Tensor], Tensor], check: Callable[[Any], None] | None = None
) -> Rule:
    """dy = f'(x) dx, with f'(x) told from y; `check` declines where y does not tell."""

    def rule(m: Any, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
        if check is not None:
            check(m)
        return {"input": nnj.Diagonal(lambda: slope(m, y), y)}

    return rule


def from_x(slope: Callable[[Any, Tensor], Tensor]) -> Rule:
    """dy = f'(x) dx."""

    def rule(m: Any, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
        known_if(
            not getattr(m, "inplace", False), "inplace=True has destroyed x, and y does not tell it"
        )
        return {"input": nnj.Diagonal(lambda: slope(m, x), x)}

    return rule


def prelu(m: nn.PReLU, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = dx where x > 0, w dx elsewhere;  dy = dw min(x, 0), one w for each channel or for
    all.
    """
    w = m.weight.detach()
    w = w.reshape(-1, *[1] * (x.dim() - 2)) if len(w) > 1 else w
    weight = nnj.ScaleShift(m.weight.shape, x.shape[1:], x, m=lambda: x.clamp(max=0), last=False)
    return {"input": nnj.Diagonal(torch.where(x > 0, torch.ones_like(w), w)), "weight": weight}


def glu(m: nn.GLU, x: Tensor, y: Tensor, power: int = 1) -> dict[str, nnj.Jacobian]:
    """y = a sigmoid(b) with (a, b) the halves of x along an axis:  dy = sigmoid(b) da + a
    sigmoid'(b) db.

    No two entries of y share one of x, so the entries of J can be raised to a power one by one.
    """
    axis = m.dim % x.dim()
    known_if(axis != 0, "it halves the batch axis")

    def slopes() -> Tensor:
        a, b = x.chunk(2, axis)
        s = b.sigmoid()
        return torch.cat([s, a * s * (1 - s)], axis).pow(power)

    def forward(v: Tensor) -> Tensor:
        left, right = (v * slopes()).chunk(2, axis + 1)
        return left + right

    adjoint = lambda u: torch.cat([u, u], axis + 1) * slopes()
    return {
        "input": nnj.LinearMap(
            forward,
            adjoint,
            x.shape[1:],
            y.shape[1:],
            x,
            per_row=True,
            squared=lambda: glu(m, x, y, 2 * power)["input"],
        )
    }


# -- softmax ---------------------------------------------------------------------------------------


class Softmax(nnj.Jacobian):
    """J = s (diag(y) - y y^T) along an axis, which is symmetric; s = -1 for the softmin."""

    def __init__(self, y: Tensor, axis: int, sign: int):
        super().__init__(y.shape[1:], y.shape[1:], y)
        self.y, self.axis, self.sign = y, axis, sign

    def jvp(self, v: Tensor) -> Tensor:
        w = v * self.y
        return self.sign * (w - self.y * w.sum(self.axis, keepdim=True))

    def vjp(self, u: Tensor) -> Tensor:
        return self.jvp(u)


class LogSoftmax(nnj.Jacobian):
    """J = 1 - 1 p^T along an axis, with p = exp(y)."""

    def __init__(self, y: Tensor, axis: int):
        super().__init__(y.shape[1:], y.shape[1:], y)
        self.p, self.axis = y.exp(), axis

    def jvp(self, v: Tensor) -> Tensor:
        return v - (self.p * v).sum(self.axis, keepdim=True)

    def vjp(self, u: Tensor) -> Tensor:
        return u - self.p * u.sum(self.axis, keepdim=True)


def axis_of(m: Any, y: Tensor) -> int:
    """The axis of a softmax, counted from the end, where it is the same for tangents with axes in
    front.
    """
    dim = -3 if isinstance(m, nn.Softmax2d) else m.dim
    dim = (0 if y.dim() in (0, 1, 3) else 1) if dim is None else dim  # torch's choice
    known_if(dim % y.dim() != 0, "it normalizes over the batch axis")
    return dim % y.dim() - y.dim()


def softmax(m: Any, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = (diag(y) - y y^T) dx, and minus that for the softmin."""
    return {"input": Softmax(y, axis_of(m, y), -1 if isinstance(m, nn.Softmin) else 1)}


def log_softmax(m: nn.LogSoftmax, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = (1 - 1 exp(y)^T) dx."""
    return {"input": LogSoftmax(y, axis_of(m, y))}


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    for cls, slope in FROM_Y.items():
        register(cls, from_y(slope, IF.get(cls)), uses="y")
    for cls, slope in FROM_X.items():
        register(cls, from_x(slope), uses="x")
    register(nn.PReLU, prelu, uses="x")
    register(nn.GLU, glu, uses="x")
    for cls in (nn.Softmax, nn.Softmin, nn.Softmax2d):
        register(cls, softmax, uses="y")
    register(nn.LogSoftmax, log_softmax, uses="y")
