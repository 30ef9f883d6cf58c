"""Sums of Kronecker matrices, and what has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnj import NNJError
from nnj.matrices import Dense, EigenKronecker, Kronecker

pytestmark = pytest.mark.usefixtures("seeded")
SHAPES = {"weight": (4, 3), "bias": (4,)}


def square(size: int) -> Tensor:
    b = torch.randn(1, size, size, dtype=torch.float64)
    return b @ b.mT


def test_sums_that_keep_their_form() -> None:
    s, a = square(4), square(4)
    first = Kronecker(SHAPES, s, a)
    for other in (Kronecker(SHAPES, square(4), a.clone()), Kronecker(SHAPES, s, square(4))):
        found = first + other
        assert type(found) is Kronecker
        torch.testing.assert_close(found.dense(), first.dense() + other.dense())
    inverse = first.inverse(0.1)
    assert type(inverse) is EigenKronecker and type(inverse + inverse) is EigenKronecker


def test_other_sums_are_dense_within_the_limit() -> None:
    first, other = (Kronecker(SHAPES, square(4), square(4)) for _ in range(2))
    assert type(first + other) is Dense
    torch.testing.assert_close((first + other).dense(), first.dense() + other.dense())
    first.block_limit = 15
    with pytest.raises(NNJError, match=r"of Kronecker needs all entries of a matrix of 16 x 16"):
        first + other


def test_damping_of_a_weight_and_its_bias_apart_needs_the_entries() -> None:
    m = Kronecker(SHAPES, square(4), square(4))
    m.block_limit = 15
    v = torch.ones(16).double()
    m.solve(v, {"weight": 0.1, "bias": 0.1})
    with pytest.raises(NNJError, match="block_limit=15"):
        m.solve(v, {"weight": 0.1, "bias": 0.2})


def test_the_eigenvalues_of_both_sides_decide_whether_it_is_singular() -> None:
    """A product of two condition numbers beyond the precision is no reason to refuse."""
    q, r = (torch.linalg.qr(torch.randn(1, 4, 4, dtype=torch.float64)).Q for _ in range(2))
    d = torch.logspace(0, -10, 4, dtype=torch.float64)
    m = Kronecker({"weight": (4, 4)}, q @ torch.diag(d) @ q.mT, r @ torch.diag(d) @ r.mT)
    expected = 8 * d.log().sum()
    torch.testing.assert_close(m.logdet(), expected, rtol=1e-5, atol=0)
    assert torch.isfinite(m.solve(torch.ones(16).double())).all()


def test_shapes_that_do_not_fit() -> None:
    s = square(4)
    with pytest.raises(NNJError, match="those of a weight, or of a weight and a bias"):
        Kronecker({"weight": (4, 4), "bias": (4,)}, s, s)
    with pytest.raises(NNJError, match=r"a Kronecker factor of \(1, 4, 3\)"):
        Kronecker({"weight": (4, 4)}, s, s[..., :3])
    with pytest.raises(NNJError, match="of 1 and 2 groups"):
        Kronecker({"weight": (4, 4)}, s, s.expand(2, 4, 4))
    with pytest.raises(NNJError, match="eigenvectors of"):
        EigenKronecker({"weight": (4, 3)}, s, s, torch.ones(1, 4, 3).double())
    with pytest.raises(NNJError, match="eigenvalues below zero"):
        EigenKronecker({"weight": (4, 3)}, None, None, -torch.ones(1, 4, 3).double())
