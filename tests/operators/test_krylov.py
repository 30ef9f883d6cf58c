"""Conjugate gradients and Hutch++ on matrices that are known."""

from __future__ import annotations

import pytest
import torch

import nnj
from nnj.operators.krylov import conjugate_gradients, hutch_plus_plus


def matrix(size: int, least: float) -> torch.Tensor:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(size, size).double()).Q
    return (q * torch.logspace(torch.log10(torch.tensor(least)).item(), 0, size).double()) @ q.mT


def test_solutions_of_several_columns():
    a, b = matrix(20, 1e-3), torch.randn(20, 3).double()
    b[:, 1] = 0
    x, steps = conjugate_gradients(lambda v: a @ v, b, 1e-11, 200)
    torch.testing.assert_close(x, torch.linalg.solve(a, b))
    assert 0 < steps <= 200 and not x[:, 1].any()


def test_what_does_not_converge():
    a, b = matrix(20, 1e-6), torch.randn(20, 1).double()
    message = r"^conjugate gradients have not converged after 3 products: the residual is [\d.e-]+ "
    with pytest.raises(nnj.NNJError, match=message):
        conjugate_gradients(lambda v: a @ v, b, 1e-11, 3)
    with pytest.raises(nnj.NNJError, match=r"^a direction has no positive curvature"):
        conjugate_gradients(lambda v: -a @ v, b, 1e-11, 3)


def test_traces():
    a, like = matrix(30, 1e-4), torch.zeros(0).double()
    few = [
        hutch_plus_plus(lambda v: a @ v, like, 30, 9, torch.Generator().manual_seed(seed))
        for seed in range(100)
    ]
    found = torch.stack(few)
    assert abs(found.mean() - a.trace()) < 5 * found.std() / 10
    one = hutch_plus_plus(lambda v: a @ v, like, 30, 1, torch.Generator().manual_seed(0))
    assert one.isfinite() and float(found.std()) < 0.5 * float(a.trace())
