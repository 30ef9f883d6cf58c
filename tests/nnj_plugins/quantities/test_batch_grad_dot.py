"""Inner products of rows of the gradient: of one pass alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.collecting import X, Y, pair, same_grad
from tests.support.fitting import CLASSES, LOADER, mlp
from tests.support.fitting import X as DATA
from tests.support.oracle import close

APART = "^batch_grad_dot: samples of two backward passes, or of two calls of the model, have inner"


def test_products_and_their_sum():
    model, loss = pair()
    with nnj.collect("batch_grad_dot", "batch_grad") as context:
        loss(model(X), Y).backward()
    rows = torch.cat([p.batch_grad.flatten(1) for p in model.parameters()], 1)
    assert close(context.batch_grad_dot, rows @ rows.mT) == ""
    for p in model.parameters():
        g = p.batch_grad.flatten(1)
        assert close(p.batch_grad_dot, g @ g.mT) == ""


def test_a_second_pass_is_refused_and_changes_nothing():
    model, loss = pair()
    with nnj.collect("ggn_diag", "batch_grad_dot") as context:
        loss(model(X), Y).backward()
        before = [(p.ggn_diag.clone(), p.batch_grad_dot.clone()) for p in model.parameters()]
        with pytest.raises(nnj.NNJError, match=APART):
            loss(model(X), Y).backward()
    assert context.passes == 1
    for p, (diag, dot) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.ggn_diag, diag) and torch.equal(p.batch_grad_dot, dot)


def test_samples_of_two_calls_are_refused_and_gradients_stay():
    model, loss = pair()
    with pytest.raises(nnj.NNJError, match=APART), nnj.collect("batch_grad_dot"):
        (loss(model(X[:2]), Y[:2]) + loss(model(X[2:]), Y[2:])).backward()
    plain, _ = pair()
    (loss(plain(X[:2]), Y[:2]) + loss(plain(X[2:]), Y[2:])).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert same_grad(p.grad, q.grad)


def test_parameters_that_one_of_two_groups_reaches_are_refused():
    """No two states ever meet, and yet the products between the groups are missing."""
    model, loss = pair()
    with pytest.raises(nnj.NNJError, match=APART):
        with nnj.collect("batch_grad_dot", modules=[model.one]):
            loss(model(X[:2]), Y[:2]).backward()
            loss(model.two(model.one(X[2:]).detach()), Y[2:]).backward()


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_a_fit_of_one_batch(scale, tmp_path):
    fit = nnj.fit(
        mlp(), nn.CrossEntropyLoss(), [(DATA, CLASSES)], "batch_grad_dot", "batch_grad", scale=scale
    )
    rows = fit.vector("batch_grad")
    assert close(fit.context["batch_grad_dot"], rows @ rows.mT) == ""
    fit.save(tmp_path / "fit")
    again = nnj.Fit.load(tmp_path / "fit")
    assert torch.equal(again.context["batch_grad_dot"], fit.context["batch_grad_dot"])
    with pytest.raises(nnj.NNJError, match=APART):
        nnj.Fit.merge([fit, again])
    with pytest.raises(nnj.NNJError, match=APART):
        nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, "batch_grad_dot")
