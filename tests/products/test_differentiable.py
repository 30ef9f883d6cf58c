"""Products with a graph of their own: equal to the others, and their gradients by finite
differences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nnj


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_as_the_others_with_gradients(wrt: Any) -> None:
    m, x = model(), X.clone().requires_grad_()
    j = nnj.jacobian(m, x, wrt, differentiable=True)
    torch.testing.assert_close(j, nnj.jacobian(m, x, wrt))
    u = torch.randn(5, 2).double()
    v = nnj.vjp(m, x, u, wrt, differentiable=True)
    torch.testing.assert_close(v, nnj.vjp(m, x, u, wrt))
    v.square().sum().backward()
    for p in (x, m[0].weight, m[2].weight):
        (index,) = [tuple(torch.zeros(p.dim(), dtype=torch.long).tolist())]
        slope = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p[index] += step
                slope.append(float(nnj.vjp(m, x.detach(), u, wrt).square().sum()))
                p[index] -= step
        expected = (slope[0] - slope[1]) / 2e-6
        assert abs(float(p.grad[index]) - expected) < 1e-6 * (1 + abs(expected))


def test_of_some_modules() -> None:
    m = model()
    j = nnj.jacobian(m, X, "weight", modules=[m[2]], differentiable=True)
    torch.testing.assert_close(j, nnj.jacobian(m, X, "weight", modules=[m[2]]))
    assert j.shape == (5, 2, 10) and j.requires_grad


def test_what_cannot_be_mapped() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if float(x.sum()) > 0 else -self.a(x)

    with pytest.raises(nnj.NNJError, match=r"^differentiable=True maps Asks over its samples by"):
        nnj.jacobian(Asks().double(), X, differentiable=True)
    with pytest.raises(nnj.NNJError, match=r"^differentiable=True is of a model of one tensor"):
        nnj.jacobian(model(), (X,), "weight", differentiable=True)
    with pytest.raises(nnj.NNJError, match=r"^modules= says in which parameters J is"):
        nnj.jacobian(model(), X, modules=[model()], differentiable=True)
