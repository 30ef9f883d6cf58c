"""The diagonal of the empirical Fisher: of the rows' squares, not of the square of their sum."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import nnj
from tests.support.collecting import X, Y, base, pair
from tests.support.fitting import CLASSES, LOADER, agree, mlp
from tests.support.fitting import X as DATA
from tests.support.oracle import close


def test_it_is_of_degree_two():
    found = []
    for reduction in ("sum", "mean"):
        model, loss = pair(base(loss=partial(nn.CrossEntropyLoss, reduction=reduction)))
        with nnj.collect("ggn_diag_empirical", "batch_grad"):
            loss(model(X), Y).backward()
        p = model.one.weight
        assert close(p.ggn_diag_empirical, p.batch_grad.square().sum(0)) == ""
        assert not torch.allclose(p.ggn_diag_empirical, p.grad.square())
        found.append(p.ggn_diag_empirical)
    assert close(found[1], found[0] / len(X) ** 2) == ""


def test_two_losses_of_the_same_samples_are_refused_and_gradients_stay():
    model, loss = pair()
    other = nnj.extend(nn.MSELoss())
    model(X)
    out = model(X)
    message = (
        "^ggn_diag_empirical: two losses of the same samples are in one backward pass, and what "
        "is quadratic in a sample's gradient is not the sum of theirs"
    )
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn_diag_empirical"):
        (loss(out, Y) + other(out, torch.zeros_like(out))).backward()
    plain, _ = pair()
    out = plain(X)
    (nn.CrossEntropyLoss()(out, Y) + out.square().mean()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert close(p.grad, q.grad) == ""


def test_a_loss_of_more_calls_than_another_is_refused():
    """Its samples are those of the other one and more."""
    model, loss = pair()
    first, second = model(X[:2]), model(X[2:])
    every = lambda: loss(first, Y[:2]) + loss(torch.cat([first, second]), Y)
    message = "^ggn_diag_empirical: one loss is given the outputs of more calls of the model than"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn_diag_empirical"):
        every().backward(retain_graph=True)
    with nnj.collect("ggn_diag"):
        every().backward()


def test_complex_parameters_are_refused():
    """Their rows' squares are no squares of absolute values."""

    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

        def forward(self, x):
            return (x.to(torch.complex128) @ self.w).abs()

    model, loss = nnj.extend(Complex()), nnj.extend(nn.CrossEntropyLoss())
    with pytest.raises(nnj.NNJError, match="ggn_diag_empirical: a parameter"):
        with nnj.collect("ggn_diag_empirical"):
            loss(model(X), Y).backward()
    with nnj.collect("batch_grad"):
        loss(model(X), Y).backward()


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_a_fit_is_one_batch_of_all_data(scale):
    quantities = ("ggn_diag_empirical", "batch_grad")
    loss = nn.CrossEntropyLoss()
    parts = nnj.fit(mlp(), loss, LOADER, *quantities, scale=scale)
    whole = nnj.fit(mlp(), loss, [(DATA, CLASSES)], *quantities, scale=scale)
    agree(parts["ggn_diag_empirical"], whole["ggn_diag_empirical"])
    rows = {name: g.square().sum(0) for name, g in whole["batch_grad"].items()}
    agree(whole["ggn_diag_empirical"], rows)
    assert (
        close(parts.matrix("ggn_diag_empirical").diagonal(), whole.vector("ggn_diag_empirical"))
        == ""
    )
