"""Kernels of V U^T with several places: exact where places cancel, and a part of B at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnj.jacobians import outer_kernels
from nnj.jacobians import patches as patches_file
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.patches import Patches

pytestmark = pytest.mark.usefixtures("seeded")
N = 4
CLOSE: dict[str, Any] = dict(rtol=1e-11, atol=1e-11)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_norms_of_places_that_cancel() -> None:
    """By pairs of places they would be noise in single precision."""
    u, v = normal(N, 1, 40, 1), normal(1, N, 1, 30, 1)
    u, v = torch.cat([u, u], -1), torch.cat([v, -v * (1 - 1e-3)], -1)
    f = OuterProduct(u.float(), v.float(), (30, 40))
    exact = OuterProduct(u.float().double(), v.float().double(), (30, 40)).dense()
    expected = exact.square().sum((2, 3))
    torch.testing.assert_close(f.kernel(f, "row").double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("same", [False, True])
def test_rows_of_all_samples_stand_in_parts(same: bool, monkeypatch: Any) -> None:
    """However large a weight is, `CHUNK` entries of B and of U are there at once."""
    monkeypatch.setattr(outer_kernels, "CHUNK", 500)
    monkeypatch.setattr(patches_file, "CHUNK", 500)
    made = list[int]()

    def one(k: int) -> OuterProduct:
        u = normal(N, 1, 10, 50)
        patches = Patches(lambda rows: u[rows], N, 10)
        return OuterProduct(patches, normal(k, N, 1, 30, 50), (30, 10))

    real = outer_kernels.outer

    def counted(v: Tensor, u: Tensor) -> Tensor:
        found = real(v, u)
        made.append(found.numel())
        return found

    monkeypatch.setattr(outer_kernels, "outer", counted)
    f, g = one(1), one(2)
    g = f if same else g
    found = f.kernel(g)
    assert max(made) <= 500 and sum(made) == (300 * N if same else 900 * N)
    b, c = (real(t.v, t.u).reshape(t.k, N, -1) for t in (f, g))
    torch.testing.assert_close(found, torch.einsum("knp,jmp->knjm", b, c), **CLOSE)
