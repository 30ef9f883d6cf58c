"""Kronecker factors at a table, place by place: those of the same places as a matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nnj
from nnj.jacobians.outer_product import OuterProduct
from nnj.jacobians.sample_index import SampleIndex

pytestmark = pytest.mark.usefixtures("seeded")
K, N, L, V, D = 3, 4, 5, 6, 2
INDEX = torch.tensor([[0, 0, 2, 0, 5], [1, 1, 1, 1, 1], [0, 3, 4, 5, 2], [2, 2, 3, 3, 0]])


def one_hot(u: Tensor) -> OuterProduct:
    """The table's transpose as a weight: (D, V)."""
    places = torch.nn.functional.one_hot(INDEX, V).double().mT[:, None]  # (N, 1, V, L)
    return OuterProduct(places, u.movedim(2, -1)[:, :, None], (D, V))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_a_table_is_a_weight_of_one_hot_inputs(approx: Any) -> None:
    """Rows that a sample reads several times are several places."""
    u = torch.randn(K, N, L, D, dtype=torch.float64)
    u[:, 1, 2:] = 0
    u[:, 3] = 0
    j = nnj.TableRows(INDEX, (V, D), u[0])
    (kron,), (dense,) = (f.kron(approx) for f in (j.pullback(u, SampleIndex(N)), one_hot(u)))
    assert kron.inputs_first and not dense.inputs_first
    torch.testing.assert_close(kron.outer_v(), dense.outer_v())
    alive, places = kron.alive(), dense.alive()
    assert torch.equal(alive.reshape(N, L), places)
    for mine, theirs in ((None, None), (alive, places)):
        a = dense.outer_u(theirs).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(kron.outer_u(mine), a)
        assert kron.count(mine) == dense.count(theirs)


def test_padding_is_no_place() -> None:
    u = torch.randn(K, N, L, D, dtype=torch.float64)
    j = nnj.TableRows(INDEX, (V, D), u[0], keep=INDEX != 0)
    factor = j.pullback(u, SampleIndex(N))
    assert bool((factor.dense()[:, :, 0] == 0).all())
    (kron,) = factor.kron()
    assert kron.count() == int((INDEX != 0).sum()) and kron.outer_u()[0, 0] == 0
    kept = u[:, INDEX != 0].flatten(0, 1)
    torch.testing.assert_close(kron.outer_v()[0], kept.mT @ kept)


def test_rows_of_numbers_and_scaled_rows_have_none() -> None:
    u = torch.randn(K, N, L, D, dtype=torch.float64)
    factor = nnj.TableRows(INDEX, (V, D), u[0]).pullback(u, SampleIndex(N))
    assert factor.scale(torch.rand(V, D).double()).kron() is None
    twice = factor.scale_rows(torch.full((K, N), 2.0).double())
    torch.testing.assert_close(twice.kron()[0].outer_v(), 4 * factor.kron()[0].outer_v())
    numbers = nnj.TableRows(INDEX, (V,), u[0, ..., 0]).pullback(u[..., 0], SampleIndex(N))
    assert numbers.kron() is None
