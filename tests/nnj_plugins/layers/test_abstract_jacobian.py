"""Layers that give a Jacobian of their own, by methods of the original nnj."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj.testing import check_layer
from tests.support.products import N, dense_jacobian, r, same


class Quadratic(nnj.AbstractJacobian, nn.Module):
    """y_o = x^T A_o x + b: neither square nor symmetric."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 3, 3)), nn.Parameter(torch.randn(2))
        self.asked = []

    def forward(self, x):
        return torch.einsum("oij,ni,nj->no", self.a, x, x) + self.b

    def _jacobian(self, x, val=None, wrt="input"):
        self.asked.append(wrt)
        if wrt == "input":
            return torch.einsum("oij,nj->noi", self.a + self.a.mT, x)
        eye = torch.eye(2, dtype=x.dtype)
        return torch.cat(
            [torch.einsum("op,ni,nj->nopij", eye, x, x).flatten(2), eye.expand(len(x), 2, 2)], 2
        )


class Named(Quadratic):
    _jacobian = nnj.AbstractJacobian._jacobian

    def jacobian(self, x, value=None, wrt="input"):
        return Quadratic._jacobian(self, x, value, wrt)


@pytest.mark.parametrize("make", (Quadratic, Named))
def test_a_layer_that_gives_its_jacobian(make):
    torch.manual_seed(0)
    layer, x, x2 = make().double(), r(N, 3), r(N, 3)
    check_layer(layer, x)
    for wrt in ("input", "weight"):
        j, k = dense_jacobian(layer, x, wrt), dense_jacobian(layer, x2, wrt)
        layer.asked.clear()
        same(layer._jacobian(x, wrt=wrt), j)
        same(nnj.jacobian(layer, x, wrt), j)
        assert set(layer.asked) == {wrt}  # and not what nobody wants to know
        d, m, big = j.shape[2], r(N, 2, 2), r(N, j.shape[2], j.shape[2])
        same(layer.jvp(x, None, big[0, :N], wrt), torch.einsum("nod,nd->no", j, big[0, :N]))
        same(layer._vjp(x, None, m[0, :1].expand(N, 2), wrt), m[0, 0] @ j)
        same(layer._jmp(x, None, big, wrt), j @ big)
        same(layer._mjp(x, None, m, wrt), m @ j)
        same(layer._jmjTp(x, None, big, wrt), j @ big @ j.mT)
        same(layer._jTmjp(x, None, m, wrt), j.mT @ m @ j)
        same(
            layer._jTmjp(x, None, m, wrt, to_diag=True, diag_backprop=True),
            (j.mT @ m @ j).diagonal(dim1=1, dim2=2),
        )
        same(
            list(layer._jTmjp_batch2(x, x2, None, None, (m, m, m), wrt)),
            [j.mT @ m @ j, j.mT @ m @ k, k.mT @ m @ k],
        )
        assert layer._n_params == 20 and d in (3, 20)


def test_such_a_layer_takes_part_in_models_and_in_collect():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), Quadratic(), nn.Tanh()).double()
    x, m = r(N, 2), r(N, 2, 2)
    j = dense_jacobian(model, x, "weight")
    same(nnj.jacobian(model, x, "weight"), j)
    same(
        nnj.utils.convert_to_nnj(model)._jTmjp(x, None, m, "weight", to_diag=True),
        (j.mT @ m @ j).diagonal(dim1=1, dim2=2),
    )
    assert "weight" in model[1].asked
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.MSELoss(reduction="sum"))(model(x), r(N, 2)).backward()
    same(torch.cat([p.ggn_diag.flatten() for p in model.parameters()]), 2 * j.square().sum((0, 1)))


def test_a_layer_with_no_jacobian_of_its_own_goes_through_autograd():
    class Plain(nnj.AbstractJacobian, nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(2, 3), nn.Parameter(torch.randn(3))

        def forward(self, x):
            return self.scale * torch.tanh(self.inner(x))

    layer, x = Plain().double(), r(N, 2)
    same(layer._jacobian(x, wrt="weight"), dense_jacobian(layer, x, "weight"))
    same(layer.jacobian(x), dense_jacobian(layer, x, "input"))


WRONG = {
    "shape": (
        lambda x, wrt: x[:, None],
        r"Bad._jacobian\(wrt='input'\) returned \(3, 1, 2\), expected \(N, out, in\) = \(3, 2, 2\)",
    ),
    "none": (lambda x, wrt: None, r"returned NoneType, expected \(N, out, in\) = \(3, 2, 2\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_jacobian_of_the_wrong_shape(what):
    class Bad(nnj.AbstractJacobian, nn.Module):
        def forward(self, x):
            return 2 * x

        def _jacobian(self, x, val=None, wrt="input"):
            return WRONG[what][0](x, wrt)

    with pytest.raises(nnj.PluginError, match=WRONG[what][1]):
        nnj.vjp(Bad(), r(N, 2), r(N, 2))
