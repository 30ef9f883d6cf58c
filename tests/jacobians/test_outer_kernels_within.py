"""Kernels within samples against B that is formed: by its rows and by its places, in blocks of any
size; and which way is taken.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnj.jacobians import outer_kernels_within
from nnj.jacobians.factor import Pairs
from nnj.jacobians.outer_kernels import Thin
from nnj.jacobians.outer_kernels_within import kernel_within
from nnj.jacobians.patches import Patches

N, G, O, I = 4, 2, 3, 5
PAIRS: list[Pairs] = ["sample", "row"]
WAYS = {"rows": False, "places": True}


def thin(k: int, places: int, dtype: torch.dtype = torch.float64) -> Thin:
    u = torch.randn(N, G, I, places, dtype=dtype)
    return Thin(torch.randn(k, N, G, O, places, dtype=dtype), Patches.of(u))


def formed(f: Thin) -> Tensor:
    """B, (N, K, G O I)."""
    return torch.einsum("kngol,ngil->nkgoi", f.v, f.patches()).flatten(2)


def expected(one: Thin, other: Thin, d: Tensor | None, pairs: Pairs) -> Tensor:
    b, c = formed(one), formed(other)
    b = b if d is None else b * d.flatten(1)[:, None]
    return b @ c.mT if pairs == "sample" else (b * c).sum(2)


@pytest.fixture(params=WAYS)
def way(request: Any, monkeypatch: Any) -> str:
    taken = WAYS[request.param]
    monkeypatch.setattr(outer_kernels_within, "_is_cheaper_by_places", lambda *given: taken)
    return str(request.param)


@pytest.mark.usefixtures("seeded", "way")
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("size", ["one at a time", "some at a time", "alone", "all"])
def test_against_rows_of_b(monkeypatch: Any, size: str, pairs: Pairs) -> None:
    """With itself, and with a factor of other columns and places; one weight for all samples, one
    for each, and none.
    """
    if size != "all":
        monkeypatch.setattr(outer_kernels_within, "FORMED", 1 if size == "one at a time" else 300)
        monkeypatch.setattr(outer_kernels_within, "LONG", 1)
    if size == "alone":
        monkeypatch.setattr(outer_kernels_within, "LARGE", 0)
    one = thin(3, 4)
    for other in (one, thin(3 if pairs == "row" else 2, 6)):
        for d in (None, torch.randn(1, G, O, I).double(), torch.randn(N, G, O, I).double()):
            found = kernel_within(one, other, d, pairs)
            assert found.shape == ((N, 3, len(other.v)) if pairs == "sample" else (N, 3))
            want = expected(one, other, d, pairs)
            torch.testing.assert_close(found.double(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("seeded", "way")
def test_nothing() -> None:
    """No columns, and no places."""
    for one in (thin(0, 4), thin(3, 0)):
        for pairs in PAIRS:
            found = kernel_within(one, one, None, pairs)
            assert torch.equal(found, expected(one, one, None, pairs))


@pytest.mark.usefixtures("seeded")
def test_places_that_cancel_leave_no_noise(monkeypatch: Any) -> None:
    """In single precision, of places whose sum is a thousandth of each: by places as good as by
    rows, and no squared norm below zero.
    """
    monkeypatch.setattr(outer_kernels_within, "_is_cheaper_by_places", lambda *given: True)
    half = thin(3, 4, torch.float32)
    v = torch.cat([half.v, -half.v * (1 + 1e-3)], -1)
    u = torch.cat([half.patches(), half.patches()], -1)
    one = Thin(v, Patches.of(u))
    found = kernel_within(one, one, None, "row")
    want = formed(Thin(v.double(), Patches.of(u.double()))).square().sum(2)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=0)
    assert bool((found > 0).all())


@pytest.mark.parametrize(
    ("k", "o", "i", "l", "scaled", "pairs", "by_places"),
    [
        (10, 128, 864, 36, False, "sample", True),  # the last convolution of 3C3D, M = I
        (100, 128, 864, 36, True, "sample", True),  # with a hundred classes
        (1, 512, 4608, 16, False, "row", True),  # norms of gradients
        (10, 128, 864, 36, True, "sample", False),
        (10, 64, 75, 784, False, "sample", False),  # the first one
        (10, 64, 75, 784, True, "row", False),
    ],
)
def test_which_way(
    k: int, o: int, i: int, l: int, scaled: bool, pairs: Pairs, by_places: bool
) -> None:
    """Few places are met; of many with few columns rows are formed."""
    f = Thin(torch.empty(k, 1, 1, o, l), Patches(lambda rows: torch.empty(0), 1, i))
    assert outer_kernels_within._is_cheaper_by_places(f, f, scaled, pairs) is by_places
