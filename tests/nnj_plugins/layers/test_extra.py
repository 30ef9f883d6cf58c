"""The further layers of the original nnj, against dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj import L2Norm, Reshape, Sinusoidal, SkipConnection, TruncExp
from tests.support.products import N, dense_jacobian, r, same


@pytest.mark.parametrize(
    "layer, shape",
    [
        (Sinusoidal(), (2, 3)),
        (TruncExp(), (3,)),
        (L2Norm(), (2, 3)),
        (Reshape(3, 2), (6,)),
        (SkipConnection(nn.Linear(3, 2), nn.Tanh()), (3,)),
    ],
)
def test_the_further_layers(layer, shape):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Flatten(1), nn.Unflatten(1, shape), layer, nn.Flatten(1)).double(),
        r(N, *shape) * 8,
    )
    for wrt in ("input", "weight"):
        same(nnj.jacobian(model, x, wrt), dense_jacobian(model, x, wrt))
    j = dense_jacobian(model, x, "input")
    v = r(*x.shape)
    same(nnj.jvp(model, x, v), torch.func.jvp(model, (x,), (v,))[1])
    same(nnj.jTmjp(model, x, to_diag=True), j.square().sum(1))
    assert layer(x).shape == {"Reshape": (N, 3, 2), "SkipConnection": (N, 5)}.get(
        type(layer).__name__, x.shape
    )


def test_l2norm_at_zero():
    same(
        nnj.jacobian(L2Norm(0.5), torch.zeros(1, 2, dtype=torch.float64)),
        2 * torch.eye(2, dtype=torch.float64)[None],
    )
