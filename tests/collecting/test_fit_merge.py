"""Fits of parts of one data set as one, also out of files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnj
from tests.support.fitting import CLASSES, LOADER, N, X, mlp
from tests.support.quantities import JointBlock, LargestGradient, Squares


def test_fits_merge_and_go_through_files(tmp_path):
    asked = (Squares(root=True), JointBlock(), LargestGradient(), "ggn_diag", "batch_grad")
    loss = nn.CrossEntropyLoss()
    for scale in ("sum", "mean"):
        whole = nnj.fit(mlp(), loss, LOADER, *asked, scale=scale)
        parts = [nnj.fit(mlp(), loss, [batch], *asked, scale=scale) for batch in LOADER]
        for i, part in enumerate(parts):
            part.save(tmp_path / f"{i}.pt")
        parts = [nnj.Fit.load(tmp_path / f"{i}.pt") for i in range(len(parts))]
        for merged in (nnj.Fit.merge(parts), nnj.Fit.merge([whole])):
            assert list(merged) == list(whole) and merged.samples == N
            assert merged.total == whole.total and repr(merged) == repr(whole)
            for name in ("squares", "largest_gradient", "ggn_diag", "batch_grad"):
                torch.testing.assert_close(merged[name], whole[name])
            torch.testing.assert_close(merged.context, whole.context)
            for name in ("squares", "joint_block", "ggn_diag"):
                torch.testing.assert_close(merged.matrix(name).dense(), whole.matrix(name).dense())


def test_fits_that_do_not_belong_together():
    loss = nn.CrossEntropyLoss()
    one = nnj.fit(mlp(), loss, LOADER, "ggn_diag")
    others = {
        "parameters": nnj.fit(mlp()[:1], loss, [(X, CLASSES)], "ggn_diag"),
        "losses": nnj.fit(mlp(), nn.MultiMarginLoss(), LOADER, "ggn_block"),
        "scales": nnj.fit(mlp(), loss, LOADER, "ggn_diag", scale="mean"),
        "quantities": nnj.fit(mlp(), loss, LOADER, "ggn_diag", "ggn_block"),
    }
    for what, other in others.items():
        with pytest.raises(nnj.NNJError, match=rf"^fits with other {what} are not of parts of one"):
            nnj.Fit.merge([one, other])
    with pytest.raises(nnj.NNJError, match=r"^Fit.merge takes a list of at least one nnj.Fit$"):
        nnj.Fit.merge([])
    with pytest.raises(nnj.NNJError, match=r"^Fit.merge takes nnj.Fits, not dict$"):
        nnj.Fit.merge([one, {}])
