"""One matrix over all parameters, of what was collected and what was fitted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.fitting import CLASSES, LOADER, X, mlp


def given() -> tuple[nn.Module, nn.Module]:
    return nnj.extend(mlp().eval()), nnj.extend(nn.CrossEntropyLoss(reduction="sum"))


def test_a_matrix_of_a_part_and_of_what_was_not_reached():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "unused": nn.Linear(2, 2), "b": nn.Linear(4, 3)})
    model.forward = lambda x: model["b"](torch.tanh(model["a"](x)))
    nnj.extend(model.double())
    loss = nnj.extend(nn.MSELoss())
    x, y = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    with nnj.collect("ggn_diag", "ggn_block", "kfac") as context:
        loss(model(x), y).backward()
    for name in ("ggn_diag", "ggn_block", "kfac"):
        matrix = context.matrix(name)
        assert list(matrix.layout.shapes) == [n for n, _ in model.named_parameters()]
        assert not matrix.block("unused").dense().any() and matrix.block("a").dense().any()
        assert matrix.solve(torch.ones(matrix.shape[0]).double(), 1.0).isfinite().all()
    with nnj.collect("ggn_diag", modules=[model["b"]]) as context:
        loss(model(x), y).backward()
    assert list(context.matrix("ggn_diag").layout.shapes) == ["b.weight", "b.bias"]


def test_what_is_no_matrix():
    model, loss = given()
    with nnj.collect("batch_grad", "ggn_diag") as context:
        loss(model(X), CLASSES).backward()
    with pytest.raises(nnj.NNJError, match=r"^'batch_grad' is no matrix over the parameters"):
        context.matrix("batch_grad")
    with pytest.raises(nnj.NNJError, match=r"^'kfac' is not collected here\. Collected: batch_"):
        context.matrix("kfac")
    with nnj.collect("ggn_diag"):
        loss(model(X), CLASSES).backward()
    with pytest.raises(nnj.NNJError, match=r"^a later nnj.collect of ggn_diag has taken"):
        context.matrix("ggn_diag")
    fit = nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "batch_grad")
    with pytest.raises(nnj.NNJError, match=r"^'batch_grad' is no matrix over the parameters"):
        fit.matrix("batch_grad")
    with pytest.raises(nnj.NNJError, match=r"^'kfac' was not fitted\. Fitted: batch_grad$"):
        fit.matrix("kfac")


def test_a_matrix_of_two_models():
    model, loss = given()
    other = nnj.extend(mlp())
    with nnj.collect("ggn_diag") as context:
        loss(model(X), CLASSES).backward()
        loss(other(X), CLASSES).backward()
    with pytest.raises(nnj.NNJError, match=r"^a matrix is over the parameters of one model, and 2"):
        context.matrix("ggn_diag")


def test_a_parameter_of_two_modules_is_with_the_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    nnj.extend(model)
    loss = nnj.extend(nn.MSELoss())
    with nnj.collect("ggn_block", "ggn_diag") as context:
        loss(model(torch.randn(5, 4).double()), torch.randn(5, 4).double()).backward()
    found = context.matrix("ggn_block")
    assert list(found.layout.shapes) == ["0.weight", "0.bias", "2.bias"]
    torch.testing.assert_close(found.diagonal(), context.matrix("ggn_diag").diagonal())
    torch.testing.assert_close(found.block("0").dense(), model[0].ggn_block)
