"""Each layer of tests/support/layers_shape.py inside a small model, and dropout with the mask of
its call.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj.registry.layer_rules import Declined, ask_rule, find_rule
from nnj.testing import check_model
from tests.support.layers_shape import CASES


def around(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    """A model with the layer between two that have parameters."""
    with torch.no_grad():
        width = layer(x).flatten(1).shape[1]
    return nn.Sequential(
        nn.Linear(x.shape[-1], x.shape[-1]), nn.Tanh(), layer, nn.Flatten(), nn.Linear(width, 3)
    )


@pytest.mark.parametrize("layer, x", [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_inside_a_model(layer, x):
    torch.manual_seed(0)
    layer, x = layer(), x()
    check_model(around(layer, x), nn.CrossEntropyLoss(), x, torch.randint(3, (len(x),)))


DROPOUTS = {
    nn.Dropout: (6,),
    nn.Dropout1d: (3, 2),
    nn.Dropout2d: (3, 1, 2),
    nn.Dropout3d: (3, 1, 2, 1),
    nn.AlphaDropout: (6,),
    nn.FeatureAlphaDropout: (3, 2),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("cls", DROPOUTS)
def test_dropout_in_training_has_the_mask_of_its_call(cls, inplace):
    """After a layer that gives zeros, which are zeros with any mask; the mask is then known to
    autograd's node alone.
    """
    torch.manual_seed(0)
    shape, n = DROPOUTS[cls], 5
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.Hardshrink(0.3),
        nn.Unflatten(1, shape),
        cls(0.4, inplace=inplace),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()
    x, y = torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))

    def output(params):
        torch.manual_seed(1)  # the same mask at each call
        return torch.func.functional_call(model, params, (x,))

    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    j = {name: t.detach() for name, t in torch.func.jacrev(output)(params).items()}
    z = output(params)
    h = torch.func.hessian(lambda t: nn.functional.cross_entropy(t, y))(z).detach()
    g = torch.func.grad(lambda t: nn.functional.cross_entropy(t, y))(z).detach()
    nnj.extend(model)
    with nnj.collect("ggn_diag", "batch_grad"):
        torch.manual_seed(1)
        found = model(x)
        nnj.extend(nn.CrossEntropyLoss())(found, y).backward()
    assert torch.equal(found, z) and model.training
    for name, p in model.named_parameters():
        expected = torch.einsum("abcd,ab...,cd...->...", h, j[name], j[name])
        torch.testing.assert_close(p.ggn_diag, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            p.batch_grad, torch.einsum("na,na...->n...", g, j[name]), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.GLU(0), (2, 3)),
        (nn.ZeroPad2d(1), (2, 3)),
        (nn.PixelShuffle(2), (4, 2, 2)),
        (nn.PixelUnshuffle(2), (1, 2, 2)),
        (nn.ConstantPad1d(1, 0.0), (4,)),
    ],
)
def test_what_would_touch_the_batch_is_declined(layer, shape):
    x = torch.randn(shape)
    assert isinstance(ask_rule(find_rule(layer), layer, x, layer(x)), Declined)
