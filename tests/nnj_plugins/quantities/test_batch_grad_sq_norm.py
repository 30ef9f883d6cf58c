"""Norms of rows of the gradient: over passes and files, in half precision, and their sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.collecting import X, Y, net, pair
from tests.support.fitting import CLASSES, LOADER, mlp
from tests.support.fitting import X as DATA
from tests.support.oracle import close


def test_of_several_passes_and_with_zeros_where_a_pass_did_not_come():
    model, loss = pair()
    model.extra = nn.Linear(4, 3).double()
    with nnj.collect("batch_grad_sq_norm", "batch_grad") as context:
        loss(model(X[:4]), Y[:4]).backward()
        loss(model(X[4:]) + model.extra(X[4:]), Y[4:]).backward()
    total = torch.zeros(6).double()
    for p in model.parameters():
        norms = p.batch_grad.square().flatten(1).sum(1)
        assert close(p.batch_grad_sq_norm, norms) == ""
        total += norms
    assert not bool(model.extra.weight.batch_grad_sq_norm[:4].any())
    assert close(context.batch_grad_sq_norm, total) == ""


def test_a_sum_over_modules_is_over_these_alone():
    model, loss = pair()
    with nnj.collect("batch_grad_sq_norm", modules=[model.two]) as context:
        loss(model(X), Y).backward()
    total = model.two.weight.batch_grad_sq_norm + model.two.bias.batch_grad_sq_norm
    assert close(context.batch_grad_sq_norm, total) == ""
    assert not hasattr(model.one.weight, "batch_grad_sq_norm")


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_fits_of_parts_are_one_of_all(scale, tmp_path):
    loss = nn.CrossEntropyLoss()
    whole = nnj.fit(mlp(), loss, [(DATA, CLASSES)], "batch_grad_sq_norm", "batch_grad", scale=scale)
    fits = [nnj.fit(mlp(), loss, [b], "batch_grad_sq_norm", scale=scale) for b in LOADER]
    fits[0].save(tmp_path / "fit")
    merged = nnj.Fit.merge([nnj.Fit.load(tmp_path / "fit"), *fits[1:]])
    by_batches = nnj.fit(mlp(), loss, LOADER, "batch_grad_sq_norm", scale=scale)
    for name, g in whole["batch_grad"].items():
        for fit in (whole, merged, by_batches):
            expected = g.square().flatten(1).sum(1)
            assert close(fit["batch_grad_sq_norm"][name], expected) == ""
    total = sum(whole["batch_grad_sq_norm"].values())
    for fit in (whole, merged, by_batches):
        assert close(fit.context["batch_grad_sq_norm"], total) == ""


def test_in_half_precision_sums_are_wide():
    model = nnj.extend(net().bfloat16())
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("batch_grad_sq_norm", "batch_grad") as context:
        loss(model(X.bfloat16()), Y).backward()
    for p in model.parameters():
        assert p.batch_grad_sq_norm.dtype == torch.bfloat16
        norms = p.batch_grad.float().square().flatten(1).sum(1)
        torch.testing.assert_close(p.batch_grad_sq_norm.float(), norms, rtol=2e-2, atol=1e-6)
    assert context.batch_grad_sq_norm.dtype == torch.float32
