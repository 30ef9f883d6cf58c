"""Quantities in files: what is kept, and what can be made of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from nnj.collecting.quantity_file import is_written, read, written
from tests.support.fitting import LOADER, mlp
from tests.support.quantities import Squares


def test_plain_attributes_are_kept():
    (kfac,) = nnj.collect(
        "kfac", fisher="mc", samples=7, generator=torch.Generator()
    ).request.quantities.values()
    kept = written(kfac)
    assert is_written(kept) and kept["place"] == "modules" and not kept["per_sample"]
    again = read("kfac", kept)
    assert type(again) is type(kfac) and again.draws == 7 and again.generator is None
    assert (again.source, again.degree) == ("signs", 1)
    assert not is_written({**kept, "kind": 3}) and not is_written(3)


def test_a_class_that_is_not_there(tmp_path):
    class Passing(Squares):
        """Gone before its file is read."""

    fit = nnj.fit(mlp(), nn.CrossEntropyLoss(), LOADER, Passing(), "ggn_diag")
    expected = fit.vector("passing")
    fit.save(tmp_path / "fit.pt")
    found = torch.load(tmp_path / "fit.pt", weights_only=True)
    found["quantities"]["passing"]["kind"] = "elsewhere.Passing"
    torch.save(found, tmp_path / "fit.pt")
    again = nnj.Fit.load(tmp_path / "fit.pt")
    assert torch.equal(again.vector("passing"), expected)
    assert torch.equal(again.matrix("ggn_diag").d, fit.matrix("ggn_diag").d)
    with pytest.raises(
        nnj.NNJError, match=r"of the class elsewhere.Passing, which is neither inst"
    ):
        again.matrix("passing")
