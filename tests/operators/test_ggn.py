"""The GGN and the Hessian of a data set as operators, against dense matrices by torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from tests.support.fitting import CLASSES as Y
from tests.support.fitting import C, N, X, mlp

BATCHES = [(X[:3], Y[:3]), (X[3:4], Y[3:4]), (X[4:], Y[4:])]
LOSSES: dict[str, Any] = {
    "cross entropy": (nn.CrossEntropyLoss(), F.cross_entropy, Y),
    "square": (nn.MSELoss(), F.mse_loss, torch.randn(N, C).double()),
}


def net() -> nn.Module:
    return mlp().eval()


def dense(model: nn.Module, loss: Any, y: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(GGN, Hessian), with parameters in the order of `parameters()`."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = [model.get_parameter(name).numel() for name in names]
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def f(w: Tensor) -> Tensor:
        parts = {
            name: t.reshape(model.get_parameter(name).shape)
            for name, t in zip(names, w.split(sizes), strict=True)
        }
        return torch.func.functional_call(model, parts, (X,))

    z = f(flat)
    value = lambda z: loss(z, y, reduction=reduction)
    h = torch.autograd.functional.hessian(value, z.detach()).reshape(z.numel(), z.numel())
    j = torch.func.jacrev(f)(flat).reshape(z.numel(), -1)
    hessian = torch.func.hessian(lambda w: value(f(w)))(flat)
    return j.mT @ h @ j, hessian


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_against_dense_matrices(name, scale):
    module, loss, y = LOSSES[name]
    data = [(X[:3], y[:3]), (X[3:4], y[3:4]), (X[4:], y[4:])]
    model = net()
    model[0].bias.requires_grad_(False)
    for cls, a in zip((nnj.GGN, nnj.HessianOperator), dense(model, loss, y, scale), strict=True):
        operator = cls(model, module, data, scale=scale)
        p = operator.shape[0]
        assert a.shape == operator.shape and operator.T is operator
        close = torch.testing.assert_close
        close(operator @ torch.eye(p).double(), a)
        v = torch.randn(p).double()
        close(operator @ v, a @ v)
        close(operator.diagonal(), a.diagonal())
        close(operator.trace(), a.trace())
        assert (operator @ v[:, None].expand(p, 0)).shape == (p, 0)
        assert all(q.grad is None for q in model.parameters()) and not model[2].training
    ggn = nnj.GGN(model, module, data, scale=scale)
    damped = dense(model, loss, y, scale)[0] + 0.1 * torch.eye(p).double()
    b = torch.randn(p, 2).double()
    close(ggn.solve(b, 0.1, tolerance=1e-12), torch.linalg.solve(damped, b))
    close(ggn.solve(b[:, 0], 0.1, tolerance=1e-12), torch.linalg.solve(damped, b[:, 0]))


def test_as_fit_and_of_some_modules():
    model = net()
    fit = nnj.fit(model, nn.CrossEntropyLoss(), BATCHES, "ggn", scale="mean")
    ggn = nnj.GGN(model, nn.CrossEntropyLoss(), BATCHES, scale="mean")
    torch.testing.assert_close(ggn @ torch.eye(43).double(), fit["ggn"])
    last = nnj.GGN(model, nn.CrossEntropyLoss(), BATCHES, modules=model[3], scale="mean")
    torch.testing.assert_close(last @ torch.eye(18).double(), fit["ggn"][25:, 25:])
    torch.testing.assert_close(last.diagonal(), fit["ggn"].diagonal()[25:])


def test_dicts_forward_and_losses_of_ones_own():
    model = net()
    data = [{"x": x, "labels": y} for x, y in BATCHES]
    forward = lambda model, batch: model(batch["x"])
    mine = lambda z, y: F.cross_entropy(z, y)
    found = nnj.GGN(model, mine, data, forward=forward, reduction="mean")
    expected = nnj.GGN(model, nn.CrossEntropyLoss(), BATCHES)
    v = torch.randn(43).double()
    torch.testing.assert_close(found @ v, expected @ v)


def test_estimates_of_the_trace():
    ggn = nnj.GGN(net(), nn.CrossEntropyLoss(), BATCHES)
    exact = ggn.trace()
    draws = torch.stack([ggn.trace(6, torch.Generator().manual_seed(seed)) for seed in range(60)])
    assert abs(draws.mean() - exact) < 5 * draws.std() / 60**0.5
    torch.testing.assert_close(ggn.trace(140), exact)  # thirds that span all of it
    with pytest.raises(nnj.NNJError, match=r"^samples=0: the number of products is at least 1$"):
        ggn.trace(0)


def test_through_scipy():
    pytest.importorskip("scipy", reason="the extra scipy is not installed")
    ggn = nnj.GGN(net(), nn.CrossEntropyLoss(), BATCHES)
    a = ggn @ torch.eye(43).double()
    values = torch.linalg.eigvalsh(a)
    found, columns = ggn.eigsh(k=4)
    torch.testing.assert_close(found, values[-4:])
    torch.testing.assert_close(a @ columns, columns * found)
    operator = ggn.scipy()
    v = torch.randn(43, 2).double()
    torch.testing.assert_close(torch.from_numpy(operator @ v.numpy()), a @ v)
    torch.testing.assert_close(torch.from_numpy(operator.T @ v[:, 0].numpy()), a @ v[:, 0])
    points = torch.linspace(-1, float(values[-1]) + 1, 400).double()
    density = ggn.spectral_density(
        points, width=0.2, steps=25, samples=40, generator=torch.Generator().manual_seed(0)
    )
    away = points[:, None] - values
    exact = torch.exp(-((away / 0.2) ** 2) / 2).mean(1) / (0.2 * (2 * torch.pi) ** 0.5)
    assert abs(torch.trapezoid(density, points) - 1) < 1e-3
    assert torch.trapezoid((density - exact).abs(), points) < 0.25


class Noisy(nn.Module):
    """Gives something else each time."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x + torch.randn_like(x))


REFUSED: dict[str, Any] = {
    "an iterator": (lambda: nnj.GGN(net(), nn.MSELoss(), iter(BATCHES)), "an operator reads its"),
    "no data": (lambda: nnj.GGN(net(), nn.CrossEntropyLoss(), []), "the data have no samples"),
    "scale": (lambda: nnj.GGN(net(), nn.CrossEntropyLoss(), BATCHES, scale="x"), "scale='x', exp"),
    "noise": (
        lambda: nnj.GGN(Noisy().double(), nn.CrossEntropyLoss(), BATCHES),
        "the data, or the model, are others when they are read again",
    ),
    "modules": (
        lambda: nnj.GGN(net(), nn.CrossEntropyLoss(), BATCHES, modules=[nn.Linear(2, 2)]),
        "modules= names Linear, which is no module of",
    ),
    "frozen": (
        lambda: nnj.GGN(net().requires_grad_(False), nn.CrossEntropyLoss(), BATCHES),
        "no parameter of the model",
    ),
    "another length": (
        lambda: nnj.GGN(net(), nn.CrossEntropyLoss(), BATCHES) @ torch.ones(3).double(),
        r"\(3,\) is no vector of this operator: give \(P,\) or \(P, k\), P = 43",
    ),
    "another dtype": (
        lambda: nnj.GGN(net(), nn.CrossEntropyLoss(), BATCHES) @ torch.ones(43),
        "v is torch.float32 on cpu, expected torch.float64",
    ),
    "no reduction": (
        lambda: nnj.GGN(net(), lambda z, y: F.cross_entropy(z, y), BATCHES),
        "nnj does not guess how",
    ),
}  # fmt: skip


@pytest.mark.parametrize("ask, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(ask, message):
    with pytest.raises(nnj.NNJError, match=message):
        ask()


def test_noise_is_taken_if_it_is_asked_for():
    model = Noisy().double()
    ggn = nnj.GGN(model, nn.CrossEntropyLoss(), BATCHES, check=False)
    assert (ggn @ torch.ones(15).double()).isfinite().all()


def test_a_hessian_is_not_positive_everywhere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    hessian = nnj.HessianOperator(model, nn.CrossEntropyLoss(), BATCHES)
    v = torch.randn(27).double()
    with pytest.raises(nnj.NNJError, match=r"^a direction has no positive curvature"):
        hessian.solve(v, tolerance=1e-12)
