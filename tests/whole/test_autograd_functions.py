"""Functions of one's own (torch.autograd.Function): known by what they do, whatever their name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import nnj
from nnj.graph.op_names import ALONG, BATCHED, BILINEAR, ELEMENTWISE, FLAT, LINEAR, TRUSTED
from tests.support.oracle import close

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
T = torch.zeros(4, 2).double()


class Net(nn.Module):
    """A function of a layer's output and a bare parameter, between two layers."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)
        self.w = nn.Parameter(torch.randn(3))
        self.function = function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x), self.w))


class Leaf(nn.Module):
    """The same function as a layer that no rule knows."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(3)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def layered(function: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), Leaf(function), nn.Linear(3, 2)).double()


def dense(model: nn.Module) -> Tensor:
    """J of all outputs in all parameters, by autograd one by one, (N, C, P)."""
    y, params = model(X), list(model.parameters())
    rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in y.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(*y.shape, -1)


def collected(model: nn.Module) -> tuple[Tensor, Tensor]:
    """ggn_diag and batch_grad of the summed squared output."""
    loss = nnj.extend(nn.MSELoss(reduction="sum"))
    nnj.extend(model)
    with nnj.collect("ggn_diag", "batch_grad"):
        loss(model(X), T).backward()
    params = list(model.parameters())
    return (
        torch.cat([p.ggn_diag.flatten() for p in params]),
        torch.cat([p.batch_grad.flatten(1) for p in params], 1),
    )


# -- arguments that are no tensors -----------------------------------------------------------------


class Scaled(Function):
    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor) -> Tensor:
        ctx.factor = factor
        return factor * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, ctx.factor * g


class Times(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flag: str, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g * w, None, (g * x).sum(0)


class Several(Function):
    """Results between which no gradient flows, arguments of every kind, Nones at the end."""

    @staticmethod
    def forward(ctx: Any, a: int, x: Tensor, b: None, w: Tensor, c: str, d: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return x * w, x.long(), x + w

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any, h: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return None, g * w + h, None, (g * x + h).sum(0), None, None, None


def several(z: Tensor, w: Tensor) -> Tensor:
    a, _, b = Several.apply(1, z, None, w, "c", torch.ones(2))
    return a * b


ARGUMENTS = {
    "a number first": lambda z, w: Scaled.apply(2.0, z) + w,
    "a flag between": lambda z, w: Times.apply(z, "flag", w),
    "a constant first": lambda z, w: Times.apply(torch.ones(4, 3).double(), "flag", w) + z,
    "a constant last": lambda z, w: Times.apply(z, "flag", torch.ones(3).double()) + w,
    "of every kind": several,
}


@pytest.mark.parametrize("make", [Net, layered])
@pytest.mark.parametrize("function", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_are_no_tensors(make, function):
    model = make(function)
    j, y = dense(model), model(X).detach()
    ggn_diag, batch_grad = collected(model)
    assert close(ggn_diag, 2 * j.square().sum((0, 1))) == ""
    assert close(batch_grad, (2 * y[..., None] * j).sum(1)) == ""
    assert close(nnj.jacobian(model, X, "weight"), j) == ""
    v = torch.randn(j.shape[0], j.shape[2], generator=torch.Generator().manual_seed(1)).double()
    assert close(nnj.jvp(model, X, v, "weight"), (j @ v[..., None])[..., 0]) == ""


# -- names -----------------------------------------------------------------------------------------

NAMES = [
    *sorted(ELEMENTWISE | ALONG | BATCHED.keys() | FLAT | LINEAR | BILINEAR | TRUSTED),
    "AccumulateGrad",
    "MkldnnRnnLayer",
    "ScaledDotProductFusedAttention",
    "CompiledFunction",
]


class Mixing(Function):
    """The rows of a batch are mixed in the backward pass alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + 0.5 * g.flip(0)


class Squared(Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return loss**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def named(name: str, like: type[Function]) -> Any:
    """The same function under the name of an operation of torch."""
    return type(name, (Function,), {"forward": like.forward, "backward": like.backward})


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_torch_for_a_function_that_mixes_rows(name):
    function = named(name, Mixing)
    with pytest.raises(nnj.NNJError, match="samples influence one another"):
        collected(Net(lambda z, w: function.apply(z) + w))


@pytest.mark.parametrize("name", sorted(LINEAR | BILINEAR | {"Div"}))
def test_a_name_of_torch_for_a_function_that_squares_the_loss(name):
    function, model, loss = named(name, Squared), Net(torch.mul), nnj.extend(nn.MSELoss())
    nnj.extend(model)
    with pytest.raises(nnj.NNJError, match=rf"not linear in this loss \(autograd's {name}Backward"):
        with nnj.collect("ggn_diag"):
            (function.apply(loss(model(X), T)) + loss(model(X), T)).backward()


# -- backward passes that are not linear -----------------------------------------------------------


class _Straight(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Clamped(_Straight):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-5, 5)


class Normalised(_Straight):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / (g.norm() + 1e-9)


class RowsNormalised(_Straight):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / (g.norm(dim=-1, keepdim=True) + 1e-9)


class Guided(_Straight):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.relu()


class Signs(_Straight):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.sign()


class Affine(_Straight):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + 1


class Counting(_Straight):
    calls = 0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Counting.calls += 1
        return g * Counting.calls


class Noisy(_Straight):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.rand(())


class InNumpy(_Straight):
    """What cannot go under vmap, too."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(g.numpy() ** 3)


NOT_LINEAR = [
    Clamped, Normalised, RowsNormalised, Guided, Signs, Affine, Counting, Noisy, InNumpy
]  # fmt: skip


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("make", [Net, layered])
@pytest.mark.parametrize("function", NOT_LINEAR)
def test_a_backward_that_is_not_linear(function, make, outputs):
    """Also where one column alone walks."""
    model = make(lambda z, w: function.apply(z) + w)
    model = nn.Sequential(model, nn.Linear(2, 1).double()) if outputs == 1 else model
    loss = nnj.extend(nn.MSELoss(reduction="sum"))
    words = rf"^the backward of the autograd\.Function {function.__name__} is not linear"
    with pytest.raises(nnj.NNJError, match=words), nnj.collect("ggn_diag"):
        loss(nnj.extend(model)(X), T[:, :outputs]).backward()
    with pytest.raises(nnj.NNJError, match=words):
        nnj.jacobian(model, X, "weight")


class Rounded(_Straight):
    """Linear but for the precision in which it computes."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.bfloat16().float()


def test_a_backward_in_less_precision_is_linear():
    model = nnj.extend(Net(lambda z, w: Rounded.apply(z) + w).float())
    loss = nnj.extend(nn.MSELoss(reduction="sum"))
    with nnj.collect("ggn_diag"):
        loss(model(X.float()), T.float()).backward()
    found = torch.cat([p.ggn_diag.flatten() for p in model.parameters()])
    expected, _ = collected(Net(lambda z, w: z + w))
    assert torch.allclose(found.double(), expected, rtol=0.02)
