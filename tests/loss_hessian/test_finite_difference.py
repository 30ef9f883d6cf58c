"""A gradient that is detached inside a loss is seen, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import nnj

pytestmark = pytest.mark.usefixtures("seeded")


class Square(torch.autograd.Function):
    """Right, also when it is differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Detached(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g


class WithoutGrad(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return 2 * x * g


class Absolute(Square):
    """Has a kink at zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return x.sign() * g


def hooked(z):
    h = z * 1
    h.register_hook(lambda g: g.detach())
    return h.square().sum()


def hooked_lightly(z):
    h = z * 1
    h.register_hook(lambda g: None)
    return h.square().sum()


WRONG = {
    "detached": lambda z: Detached.apply(z).sum(),
    "under no_grad": lambda z: WithoutGrad.apply(z).sum(),
    "in part": lambda z: Detached.apply(z).sum() + z.square().sum(),
    "in one entry": lambda z: Detached.apply(z[0, :1]).sum() + z.logsumexp(1).sum(),
    "hook": hooked,
}
RIGHT = {
    "function": (lambda z: Square.apply(z).sum(), lambda z: z.square().sum()),
    "hook that looks": (hooked_lightly, lambda z: z.square().sum()),
    "kink": (
        lambda z: (Absolute.apply(z) + Square.apply(z)).sum(),
        lambda z: z.square().sum(),
    ),
    "large": (lambda z: Square.apply(1e3 * z).sum(), lambda z: (1e3 * z).square().sum()),
    "linear": (lambda z: 3 * Absolute.apply(z).sum(), lambda z: 0.0 * z.square().sum()),
    "detached by the loss": (
        lambda z: ((1 - z.softmax(1)[:, 0]).detach() * z.logsumexp(1)).sum(),
        None,
    ),
}
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_detached_gradient(name, dtype):
    with pytest.raises(nnj.NNJError, match=r"mine: differentiating.*loss rule"):
        nnj.autodiff_hessian(WRONG[name], (torch.randn(4, 3, dtype=dtype),), "mine")


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e3])
def test_what_is_right(name, dtype, size):
    call, truth = RIGHT[name]
    z = size * torch.randn(4, 3, dtype=dtype)
    h = nnj.autodiff_hessian(call, (z,))
    dense = torch.func.hessian(truth or call)(z).reshape(12, 12)
    torch.testing.assert_close(h.diagonal().flatten(), dense.diagonal(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss(backend):
    """As it is in eager mode, or refused."""
    torch.compiler.reset()
    target = torch.randint(3, (4,))
    loss = torch.compile(lambda z, y: 2 * F.cross_entropy(z, y), backend=backend)
    model = nnj.extend(torch.nn.Linear(2, 3))
    x = torch.randn(4, 2)
    value = nnj.extend(loss)(model(x), target)
    (expected,) = torch.autograd.grad(value, [model.weight], retain_graph=True)
    try:
        with nnj.collect("ggn_diag"):
            value.backward()
    except nnj.NNJError as error:
        assert "twice" in str(error) or "differentiating" in str(error)
        assert backend == "aot_eager"
    assert torch.equal(model.weight.grad, expected)


def test_a_loss_on_the_way_to_nowhere():
    z = torch.rand(3, 2, dtype=torch.float64) / 1e12

    def call(z):
        if bool((z < 0).any() | (z > 1e-9).any()):
            raise ValueError
        return Square.apply(z).sum()

    h = nnj.autodiff_hessian(call, (z,))
    torch.testing.assert_close(h.diagonal().flatten(), 2 * torch.ones(6, dtype=torch.float64))
