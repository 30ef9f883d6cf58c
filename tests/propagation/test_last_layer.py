"""The last layer needs no columns, and its matrix is not made by an identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.jacobians.jacobian import LinearMap

pytestmark = pytest.mark.usefixtures("seeded")


def diagonals(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.CrossEntropyLoss())(model(x), y).backward()
    return [p.ggn_diag for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_last_layer_gives_its_weight(monkeypatch: Any, dtype: torch.dtype) -> None:
    """No identity of C x C is sent through it, and the weight is not changed."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 7)).to(dtype)
    x, y = torch.randn(5, 3, dtype=dtype), torch.randint(7, (5,))
    diagonals(model, x, y)  # which is verified once
    weight = model[2].weight.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "eye", lambda *a, **k: pytest.fail("an identity was made"))
        found = diagonals(model, x, y)
    assert torch.equal(weight, model[2].weight)
    monkeypatch.setattr(
        LinearMap, "shared_rows", lambda self, dtype: super(LinearMap, self).shared_rows(dtype)
    )
    for mine, theirs in zip(found, diagonals(model, x, y), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_follows_a_linear_layer() -> None:
    """Of two linear maps the first gives its matrix, and the second takes it on."""
    model = nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 6)
    ).double()
    x, y = torch.randn(5, 3).double(), torch.randint(6, (5,))
    found = diagonals(model, x, y)
    j = nnj.jacobian(model, x, "weight")
    p = model(x).softmax(1).detach()
    h = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(x)
    true = torch.einsum("nip,nij,njp->p", j, h, j)
    torch.testing.assert_close(torch.cat([t.flatten() for t in found]), true)
