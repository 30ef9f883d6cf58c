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
    with pytest.raises(KeyError, match=r"'kfac' was not fitted\. Fitted: ggn_diag, ggn_block"):
        fit["kfac"]
    assert "kfac" not in fit and fit.get("kfac") is None
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


@pytest.mark.parametrize("compiled", [False, "aot"])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_the_loss_of_the_data_set(scale, compiled):
    model, weight = mlp(), torch.tensor([1.0, 2, 3]).double()
    loss = nn.CrossEntropyLoss(weight=weight)
    loader = [(X[i : i + 1], CLASSES[i : i + 1]) for i in range(N)]
    for batches in (LOADER, loader):
        fit = nnj.fit(model, loss, batches, "ggn_diag", scale=scale, compile=compiled)
        z = model.eval()(X)
        expected = nn.functional.cross_entropy(z, CLASSES, weight, reduction=scale)
        assert fit.loss_value == pytest.approx(float(expected), rel=1e-12)
    parts = [nnj.fit(model, loss, [batch], "ggn_diag", scale=scale) for batch in LOADER]
    merged = nnj.Fit.merge(parts)
    assert merged.loss_value == pytest.approx(float(expected), rel=1e-12)


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


WRITTEN = {"nnj.Fit": 4, "values": {}, "samples": 1, "scale": "sum", "total": 1.0, "loss": ""}
WRITTEN |= {
    "loss_value": 0.0,
    "likelihood": "",
    "terms": 1.0,
    "trace": 0.0,
    "deficit": 0.0,
    "context": {},
    "states": {},
    "quantities": {},
}
WRITTEN["names"] = {"shapes": {}, "own": {}}
OF_ANOTHER_KIND = {
    "text": lambda path: path.write_text("hello world\n"),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x80\x02garbage"),
    "a model": lambda path: torch.save(nn.Linear(2, 2), path),
    "a list": lambda path: torch.save([1, 2], path),
    "no values": lambda path: torch.save({"nnj.Fit": 4}, path),
    "values are a number": lambda path: torch.save({**WRITTEN, "values": 3}, path),
    "values without tensors": lambda path: torch.save({**WRITTEN, "values": {"q": {"w": 1}}}, path),
    "samples are a word": lambda path: torch.save({**WRITTEN, "samples": "x"}, path),
    "a fact is missing": lambda path: torch.save({**WRITTEN, "loss": None}, path),
}


@pytest.mark.parametrize("write", OF_ANOTHER_KIND.values(), ids=OF_ANOTHER_KIND)
def test_a_file_of_another_kind(write, tmp_path):
    path = tmp_path / "fit.pt"
    write(path)
    with pytest.raises(nnj.NNJError, match=r"fit\.pt holds no nnj\.Fit that this version can read"):
        nnj.Fit.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        nnj.Fit.load(tmp_path / "fit.pt")
