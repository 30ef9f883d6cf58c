"""Squares with every B formed: few products, each of several samples and columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.utils._python_dispatch import TorchDispatchMode

from nnj.jacobians import outer_squares
from nnj.jacobians.outer_squares import explicit_squares
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
