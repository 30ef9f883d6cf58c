"""What becomes of the result of nnj.fit: its vectors, its file, its dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.fitting import CLASSES, LOADER, N, X, mlp


def test_the_result(tmp_path):
    model = mlp()
    fit = nnj.fit(
        model,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double()),
        LOADER,
        "ggn_diag",
        "ggn_block",
        "batch_grad",
        scale="mean",
    )
    p = sum(q.numel() for q in model.parameters())
    assert fit.vector("ggn_diag").shape == (p,) and fit.vector("batch_grad").shape == (N, p)
    assert torch.equal(
        fit.vector("batch_grad")[2], torch.cat([t[2].flatten() for t in fit["batch_grad"].values()])
    )
    assert fit.total == sum([1.0, 2, 3][int(y)] for y in CLASSES)
    assert repr(fit).splitlines() == [
        "Fit(7 samples, scale='mean', loss=CrossEntropyLoss)",
        f"  ggn_diag    {p} numbers of 4 parameters",
        f"  ggn_block   {25**2 + 18**2} numbers of 2 modules",
        f"  batch_grad  {7 * p} numbers of 4 parameters",
    ]
    fit.save(tmp_path / "fit.pt")
    again = nnj.Fit.load(tmp_path / "fit.pt", map_location="cpu")
    assert repr(again) == repr(fit) and vars(again).keys() == vars(fit).keys()
    for quantity in fit:
        assert list(again[quantity]) == list(fit[quantity])
        assert all(torch.equal(again[quantity][name], t) for name, t in fit[quantity].items())
    assert (
        torch.equal(again.vector("batch_grad"), fit.vector("batch_grad"))
        and again.total == fit.total
    )
    with pytest.raises(
        nnj.NNJError,
        match=r"^'ggn_diag_mc' was not fitted\. Fitted: ggn_diag, ggn_block, batch_grad$",
    ):
        fit.vector("ggn_diag_mc")
    with pytest.raises(
        nnj.NNJError,
        match=r"^'ggn_block' belongs to modules, and has no vector of parameters\. Use fit\[",
    ):
        fit.vector("ggn_block")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(
        nnj.NNJError,
        match=r"other\.pt holds no nnj\.Fit that this version can read\. Write it with Fit\.save$",
    ):
        nnj.Fit.load(tmp_path / "other.pt")


def test_dtypes_are_those_of_the_parameters():
    fit = nnj.fit(
        mlp().float(),
        nn.CrossEntropyLoss(),
        [(X.float(), CLASSES)],
        "ggn_diag",
        "ggn_block",
        "batch_grad",
    )
    assert {t.dtype for quantity in fit.values() for t in quantity.values()} == {torch.float32}
    assert all(
        t.grad_fn is None and not t.requires_grad
        for quantity in fit.values()
        for t in quantity.values()
    )
