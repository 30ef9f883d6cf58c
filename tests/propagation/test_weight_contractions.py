"""Products in the weights are contractions of thin factors: no J stands in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.jacobians import outer_product
from nnj.jacobians.factor import DenseFactor, Factor
from nnj.propagation.linearize import Linearization
from tests.support.products import MODELS, N, case, r, same

PRODUCTS = {
    "jmjTp": lambda model, x, v: nnj.jmjTp(model, x, v, "weight", from_diag=True),
    "jmjTp, to_diag": lambda model, x, v: nnj.jmjTp(
        model, x, v, "weight", from_diag=True, to_diag=True
    ),
    "jmjTp, of the identity": lambda model, x, v: nnj.jmjTp(model, x, None, "weight"),
    "jTmjp, to_diag": lambda model, x, v: nnj.jTmjp(model, x, None, "weight", to_diag=True),
    "jTmjp, to_diag, from_diag": lambda model, x, v: nnj.jTmjp(
        model, x, torch.ones(3, dtype=x.dtype), "weight", from_diag=True, to_diag=True
    ),
    "jTmjp, to_diag, full": lambda model, x, v: nnj.jTmjp(
        model, x, torch.ones(3, 3, dtype=x.dtype), "weight", to_diag=True
    ),
    "pair": lambda model, x, v: nnj.jTmjp_pair(model, x, 2 * x, None, "weight", to_diag=True),
}


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_no_entry_of_j_is_formed_at_a_linear_layer(
    monkeypatch: Any, product: str, alike: bool
) -> None:
    def refused(*args: Any, **options: Any) -> Any:
        raise AssertionError("B was formed")

    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = r(N, 5)
    size = sum(p.numel() for p in model.parameters())
    nnj.jacobian(model, x, "weight")  # which is verified once
    monkeypatch.setattr(outer_product, "outer", refused)
    monkeypatch.setattr(outer_product.OuterProduct, "dense", refused)
    monkeypatch.setattr(Linearization, "dense", refused)
    PRODUCTS[product](model, x, r(size) if alike else r(N, size))
    with pytest.raises(AssertionError):
        nnj.jacobian(model, x, "weight")


@pytest.mark.parametrize("name", MODELS)
def test_a_few_columns_at_a_time(name: str) -> None:
    """What memory does not hold at once goes in groups, with the same result."""
    model, x, j = case(name, "weight")
    m, v = r(N, j.shape[1], j.shape[1]), r(N, j.shape[2])
    full = j.mT @ m @ j
    found = nnj.jTmjp(model, x, m, "weight", to_diag=True, memory=1)
    same(found, full.diagonal(dim1=1, dim2=2))
    push = (j * v[:, None]) @ j.mT
    found = nnj.jmjTp(model, x, v, "weight", from_diag=True, to_diag=True, memory=1)
    same(found, push.diagonal(dim1=1, dim2=2))


def test_a_parameter_that_is_met_at_one_of_two_points() -> None:
    """Behind a gate that is shut at the other point it has no share in J1^T M J2."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.always(x)
            return y + self.sometimes(x) if bool(x.sum() > 0) else y

    model, x = Gate().double(), r(N, 3).abs()
    one, two = (nnj.jacobian(model, at, "weight") for at in (x, -x))
    m = r(N, 2, 2)
    for first, second, j1, j2 in ((x, -x, one, two), (-x, x, two, one)):
        found = nnj.jTmjp_pair(model, first, second, (m, m, m), "weight", to_diag=True)
        same(found[1], (j1 * (m @ j2)).sum(1))


def test_half_precision_is_summed_in_single() -> None:
    model, x = nn.Linear(300, 2).bfloat16(), torch.ones(2, 300, dtype=torch.bfloat16)
    found = nnj.jmjTp(model, x, None, "weight")
    assert found.dtype == torch.bfloat16
    assert float(found[0, 0, 0]) == float(torch.tensor(301.0).bfloat16())


def test_factors_of_a_linearization_are_thin() -> None:
    """What leads to no leaf gives nothing; a vjp writes zeros there."""
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double(), r(N, 3)
    at = nnj.propagation.linearize.linearization(model, x, "weight")
    found: dict[Tensor, Factor] = {}
    at.factors(at.basis(), found.__setitem__)
    assert set(found) == set(model.parameters())
    assert not any(isinstance(factor, DenseFactor) for factor in found.values())
    at.factors(at.basis()[:0], lambda p, factor: pytest.fail("nothing was sent"))


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_outputs_without_axes(wrt: Any) -> None:
    """A model of one number for each sample, (N,)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    x, m = r(N, 3), r(N, 1)
    j = nnj.jacobian(model, x, wrt)
    expected = torch.einsum("nod,no->nd", j**2, m)
    same(nnj.jTmjp(model, x, m, wrt, from_diag=True, to_diag=True), expected)
    same(nnj.jTmjp(model, x, m[..., None], wrt, to_diag=True), expected)
