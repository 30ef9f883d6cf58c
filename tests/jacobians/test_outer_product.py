"""V U^T: what a weight and its bias share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnj.jacobians.kron import Arrived
from nnj.jacobians.outer_product import OuterProduct

pytestmark = pytest.mark.usefixtures("seeded")
K, N, I = 3, 4, 5
CLOSE: dict[str, Any] = dict(rtol=1e-11, atol=1e-11)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer(groups: int) -> list[OuterProduct]:
    """The factors at a weight of six outputs and at its bias, of the same columns."""
    columns = normal(K, N, 6)
    of = Arrived(columns, True)
    v = columns.reshape(K, N, groups, 6 // groups, 1)
    weight = OuterProduct(normal(N, groups, I, 1), v, (6, I), columns)
    bias = OuterProduct(columns.new_ones(N, 1, 1, 1), columns[:, :, None, :, None], (6,), columns)
    return [weight.made_of(of), bias.made_of(of, True)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias_first", [False, True])
def test_what_is_shared_is_that_of_each(groups: int, bias_first: bool) -> None:
    factors = layer(groups)
    for _ in range(2):  # and nothing that is shared was changed by who asked first
        for f in reversed(factors) if bias_first else factors:
            b = f.dense().reshape(K, N, -1)
            every = torch.einsum("knp,jmp->knjm", b, b)
            torch.testing.assert_close(f.kernel(f), every, **CLOSE)
            f.kernel(f).zero_()
            torch.testing.assert_close(f.kernel(f, "row"), b.square().sum(-1), **CLOSE)
            f.kernel(f, "row").zero_()
            torch.testing.assert_close(f.gram(f), b.flatten(0, 1).mT @ b.flatten(0, 1), **CLOSE)
            f.gram(f).zero_()
            torch.testing.assert_close(f.square_sum().flatten(), b.square().sum((0, 1)), **CLOSE)
            f.square_sum().zero_()
