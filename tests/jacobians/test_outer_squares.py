"""Squares with every B formed: few products, each of several samples and columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.utils._python_dispatch import TorchDispatchMode

from nnj.jacobians import outer_product, outer_squares
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.outer_squares import explicit_squares, kernel_squares
from nnj.jacobians.patches import Patches

pytestmark = pytest.mark.usefixtures("seeded")
N, K, O, I, L = 8, 6, 4, 5, 7


class Products(TorchDispatchMode):
    """How many matrix products are launched, and the entries of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            self.count, self.largest = self.count + 1, max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("squared", "launches"),
    [(N * K * O * I, 1), (2 * K * O * I, N // 2), (K * O * I, N), (2 * O * I, 3 * N), (1, K * N)],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_as_many_at_a_time_as_are_small(
    monkeypatch: Any, groups: int, squared: int, launches: int, per_sample: bool
) -> None:
    monkeypatch.setattr(outer_squares, "SQUARED", squared * groups)
    u, v = torch.randn(N, groups, I, L).double(), torch.randn(K, N, groups, O, L).double()
    with Products() as seen:
        found = explicit_squares(v, Patches.of(u), per_sample)
    b: Tensor = v @ u.mT
    torch.testing.assert_close(found, b.square().sum(0 if per_sample else (0, 1)))
    assert seen.count == launches and seen.largest <= max(squared, O * I) * groups


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_large_columns_go_one_by_one(monkeypatch: Any, groups: int, per_sample: bool) -> None:
    monkeypatch.setattr(outer_squares, "LARGE", groups * O * I)
    u, v = torch.randn(N, groups, I, L).double(), torch.randn(K, N, groups, O, L).double()
    b: Tensor = v @ u.mT
    for transposed in (False, True):  # a linear layer on sequences has its columns so
        given = v.mT.contiguous().mT if transposed else v
        with Products() as seen:
            found = explicit_squares(given, Patches.of(u), per_sample)
        torch.testing.assert_close(found, b.square().sum(0 if per_sample else (0, 1)))
        assert seen.count == groups * K * N and seen.largest == O * I


def test_a_traced_pass_has_no_loop_over_columns(monkeypatch: Any) -> None:
    monkeypatch.setattr(outer_squares, "LARGE", 1)
    u, v = torch.randn(N, 1, I, L), torch.randn(K, N, 1, O, L)
    with tracing(TracingContext(None)), Products() as seen:
        explicit_squares(v, Patches.of(u))
    assert seen.count == 1


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pairs", [1, 40, 300, 10**6])
def test_kernels_meet_pairs_of_places_some_diagonals_and_samples_at_a_time(
    monkeypatch: Any, pairs: int, groups: int, per_sample: bool
) -> None:
    monkeypatch.setattr(outer_squares, "PAIRS", pairs)
    u, v = torch.randn(N, groups, I, L).double(), torch.randn(K, N, groups, O, L).double()
    kernels = torch.einsum("kngol,kngom->ngolm", v, v)
    expected = (v @ u.mT).square().sum(0 if per_sample else (0, 1))
    found = kernel_squares(kernels, Patches.of(u), per_sample)
    torch.testing.assert_close(found, expected)
    with tracing(TracingContext(None)):
        torch.testing.assert_close(kernel_squares(kernels, Patches.of(u), per_sample), expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_kernels_of_some_samples_after_the_other(monkeypatch: Any, per_sample: bool) -> None:
    u, v = torch.randn(N, 1, 60, 3).double(), torch.randn(20, N, 1, O, 3).double()
    expected = (v @ u.mT).square().sum(0 if per_sample else (0, 1))
    for samples in (1, 3, N):
        monkeypatch.setattr(outer_product, "KERNELS", samples * O * 3 * 3)
        factor = OuterProduct(u, v, (O, 60))
        assert factor.by_gram(20)
        assert factor.by_gram(40) is (samples == N)  # later ones are added to those of all samples
        shape = (*expected.shape[:-3], O, 60)
        torch.testing.assert_close(factor.square_sum(per_sample), expected.reshape(shape))
