"""What every Hessian of a loss asks of the outputs of a model."""

from __future__ import annotations

import pytest
import torch

import nnj
from nnj.loss_hessian.base import check_outputs

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: torch.randn(2, 3, dtype=torch.complex64),
            r"loss: .*is complex \(torch.complex64\).*view_as_real",
        ),
        (
            lambda: torch.ones(2, 3, dtype=torch.long),
            r"loss: the output of the model is not of floating point \(torch.int64\)",
        ),
        (
            lambda: torch.tensor([[1.0, torch.nan]]),
            "loss: the output of the model has entries that are not finite",
        ),
        (lambda: torch.tensor([[1.0, torch.inf]]), "not finite"),
        (lambda: torch.tensor([[1.0, -torch.inf]]), "not finite"),
    ],
)
def test_outputs_without_curvature(make, message):
    with pytest.raises(nnj.NNJError, match=message):
        check_outputs("loss", [torch.zeros(2), make()])
    with pytest.raises(nnj.NNJError, match=message):
        nnj.autodiff_hessian(lambda o: o.abs().square().sum(), (make(),), "loss")
