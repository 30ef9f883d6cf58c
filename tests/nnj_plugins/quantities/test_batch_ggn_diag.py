"""The diagonal of each sample: shares of ggn_diag, rows of several passes, and of coupled losses
none.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.collecting import X, Y, base, extended, pair
from tests.support.every_quantity import Expected
from tests.support.oracle import Truth, close, run


@pytest.mark.parametrize("memory", [1, 2**28])
def test_shares_of_ggn_diag_by_brute_force(memory):
    case = base()
    model, losses = extended(case)
    with nnj.collect("batch_ggn_diag", "ggn_diag", memory=memory):
        run(case, model, losses).backward()
    true = Expected([Truth(case)], [name for name, _ in model.named_parameters()])
    for name, p in model.named_parameters():
        assert close(p.batch_ggn_diag, true.at("batch_ggn_diag", name)) == ""
        assert close(p.batch_ggn_diag.sum(0), p.ggn_diag) == ""


def test_several_passes_stand_one_behind_the_other():
    model, loss = pair()
    with nnj.collect("batch_ggn_diag"):
        loss(model(X), Y).backward()
    whole = model.one.weight.batch_ggn_diag
    with nnj.collect("batch_ggn_diag"):
        loss(model(X[:2]), Y[:2]).backward()
        loss(model(X[2:]), Y[2:]).backward()
    parts = model.one.weight.batch_ggn_diag
    factors = torch.tensor([6 / 2] * 2 + [6 / 4] * 4).double()  # of a mean over each part
    assert close(parts, whole * factors[:, None, None]) == ""


class Pairs(nn.Module):
    """A loss of pairs of samples."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum()


def test_samples_that_a_loss_takes_together_have_no_curvature_of_their_own():
    model, loss = pair(base(loss=Pairs))
    message = "^batch_ggn_diag: Pairs takes samples together, so that none has a curvature of its"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("batch_ggn_diag"):
        out = model(X)
        loss(out[:3], out[3:]).backward()
    with nnj.collect("ggn_diag"):
        out = model(X)
        loss(out[:3], out[3:]).backward()
    assert bool((model.one.weight.ggn_diag > 0).any())
