"""What models are called with, and what of their output is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.propagation.called import call, logits_of


class Two(nn.Module):
    """Takes two arguments, and may give more than logits."""

    def __init__(self, gives: str = "tensor"):
        super().__init__()
        self.a, self.gives = nn.Linear(3, 2).double(), gives

    def forward(self, x: Tensor, z: Tensor) -> Any:
        y = self.a(x * z)
        return y if self.gives == "tensor" else SimpleNamespace(logits=y, hidden=x)


X, Y = torch.randn(6, 3).double(), torch.randint(2, (6,))


@pytest.mark.parametrize("inputs", [(X, X), [X, X], {"x": X, "z": X}])
def test_tuples_and_dicts(inputs):
    model = Two()
    assert torch.equal(call(model, inputs), model(X, X))
    assert torch.equal(call(model.a, X), model.a(X))


def test_logits_of_an_output_of_several_parts():
    out = Two("parts")(X, X)
    assert logits_of(out) is out.logits and logits_of(X) is X
    assert logits_of((X,)) == (X,)  # which is refused by whoever wants a tensor
    fits = [
        nnj.fit(model, nn.CrossEntropyLoss(), [{"x": X, "z": X, "labels": Y}], "ggn_diag")
        for model in (Two("parts"), Two())
    ]
    assert list(fits[0]["ggn_diag"]) == list(fits[1]["ggn_diag"])
    step = nnj.compile(Two("parts"), nn.CrossEntropyLoss(), "ggn_diag", backend="aot")
    assert step(X, X, Y)[1]["ggn_diag"]["a.weight"].any()


@pytest.mark.parametrize(
    "batch, message",
    [
        (
            (X, Y, torch.ones(6)),
            r"^Linear does not take 2 arguments .* write forward=lambda model,",
        ),
        (
            {"x": X, "labels": Y},
            r"^Linear does not take the arguments x .* A batch is \(x, \.\.\., y",
        ),
    ],
)
def test_batches_with_more_in_them(batch, message):
    model = nn.Linear(3, 2).double()
    with pytest.raises(nnj.NNJError, match=message):
        nnj.fit(model, nn.CrossEntropyLoss(), [batch], "ggn_diag")
    if isinstance(batch, tuple):
        with pytest.raises(nnj.NNJError, match=message):
            nnj.linearize(model, batch[:1] + batch[2:])


def test_errors_of_the_model_are_its_own():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        call(Broken(), X)
