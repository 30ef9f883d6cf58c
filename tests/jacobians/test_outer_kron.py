"""Kronecker factors of V U^T, place by place, as DESIGN says them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nnj
from nnj.jacobians import outer_kron
from nnj.jacobians import patches as patches_file
from nnj.jacobians.factor import merge_uses
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.sample_index import SampleIndex

pytestmark = pytest.mark.usefixtures("seeded")
K, N, G, O, I, L = 3, 4, 2, 3, 5, 6


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(params=["", "small chunks"], autouse=True)
def chunks(request: Any, monkeypatch: Any) -> None:
    if request.param:
        monkeypatch.setattr(patches_file, "CHUNK", 30)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("places", [1, 10, 30])
def test_symmetric_products_in_each_way(
    transposed: bool, parts: int, places: int, monkeypatch: Any
) -> None:
    """In one product, in half of it, and in one for each sample."""
    monkeypatch.setattr(outer_kron, "BLOCK", 2)
    x = normal(40, G, places, 7).mT if transposed else normal(40, G, 7, places)
    found = outer_kron.sum_of_squares(x.split(-(-40 // parts)))
    torch.testing.assert_close(found, (x @ x.mT).sum(0), rtol=1e-11, atol=1e-11)
    assert found is not None and (places == 30 or torch.equal(found, found.mT))
    mean = outer_kron.sum_of_squares(x.split(-(-40 // parts)), 1 / 40)
    torch.testing.assert_close(mean, (x @ x.mT).mean(0), rtol=1e-11, atol=1e-11)
    assert mean is not None and (places == 30 or torch.equal(mean, mean.mT))
    torch.testing.assert_close(outer_kron.square(x[0, 0]), x[0, 0] @ x[0, 0].mT)
    assert outer_kron.sum_of_squares([]) is None


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("ones", [False, True])
def test_sums_over_places(approx: Any, ones: bool) -> None:
    u, v = normal(N, G, I, L), normal(K, N, G, O, L)
    v[:, 1, :, :, 2:] = 0  # padding
    v[:, 3] = 0
    v[1:, 2, :, :, 0] = 0  # one column is left
    (kron,) = OuterProduct(u, v, (G * O, I)).kron(approx) or ()
    u = torch.cat([u, torch.ones(N, G, 1, L)], 2) if ones else u
    there = (v != 0).any(0).any(1).any(1)  # (N, L)
    assert torch.equal(kron.alive(), there)
    for alive in (None, there):
        mean = kron.outer_u(alive, ones) / kron.count(alive)
        torch.testing.assert_close(kron.mean_u(alive, ones), mean, rtol=1e-13, atol=1e-13)
        counts = torch.ones(N, L, dtype=torch.bool) if alive is None else alive
        s, a, count = torch.zeros(G, O, O), torch.zeros(G, I + ones, I + ones), 0
        s, a = s.double(), a.double()
        for n in range(N):
            places = counts[n].nonzero()[:, 0].tolist()
            us = [u[n, :, :, l] for l in places]
            vs = [v[k, n, :, :, l] for k in range(K) for l in range(L)]
            if approx == "reduce":
                us = [torch.stack(us).mean(0)] if us else []
                vs = [v[k, n].sum(-1) for k in range(K)]
            count += len(us)
            s += sum(x[:, :, None] * x[:, None] for x in vs)
            a += sum((x[:, :, None] * x[:, None] for x in us), torch.zeros_like(a))
        torch.testing.assert_close(kron.outer_v(), s)
        torch.testing.assert_close(kron.outer_u(alive, ones), a)
        assert kron.count(alive) == count


def test_what_has_none() -> None:
    """A bias, and a scale of two axes."""
    ones = torch.ones(N, 1, 1, 1).double()
    assert OuterProduct(ones, normal(K, N, 1, 6, 1), (6,)).kron() is None
    assert OuterProduct(ones, normal(K, N, 1, 6, 1), (2, 3)).kron() is None


def test_which_bias_is_that_of_the_same_places() -> None:
    """Of the same columns, also of some of them and of two uses; not that of another layer."""
    x, u, w = normal(N, L, I), normal(K, N, L, O), normal(K, N, L, O)
    weight = nnj.PatchMatmul(lambda rows: x[rows].mT[:, None], (O, I), (L, O), x)
    bias = nnj.ScaleShift((O,), (L, O), x)
    scale = nnj.ScaleShift((O,), (L, O), x, m=lambda: normal(N, L, O))
    at = lambda j, u: j.pullback(u, SampleIndex(N))
    (kron,) = at(weight, u).kron()
    (same,), (other,) = at(bias, u).biases(), at(bias, w).biases()
    assert kron.takes(same) and not kron.takes(other) and at(scale, u).biases() == []
    some, fewer = (at(j, u).columns(slice(1, 3)) for j in (weight, bias))
    assert some.kron()[0].takes(fewer.biases()[0]) and not some.kron()[0].takes(same)
    both, sums = (merge_uses([at(j, u), at(j, w)]) for j in (weight, bias))
    assert both.kron()[0].takes(sums.biases()[0]) and not both.kron()[0].takes(same)
