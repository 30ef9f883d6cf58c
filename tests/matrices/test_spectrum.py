"""When Cholesky's factor is not what inverts a matrix, and what is refused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from nnj import NNJError
from nnj.matrices import Dense, Kronecker

pytestmark = pytest.mark.usefixtures("seeded")


def slightly_below(smallest: float) -> torch.Tensor:
    """With eigenvalues 1, 0.5, ... and one below zero."""
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    return q @ torch.diag(torch.tensor([1, 0.5, 0.2, 0.1, smallest]).double()) @ q.mT


def test_a_cholesky_that_fails_says_how_far_below_zero_it_is() -> None:
    m = slightly_below(-1e-10)
    with pytest.warns(UserWarning, match=r"smallest eigenvalue is -9\.9e-11"):
        found = Dense({"p": (5,)}, m).inverse(1e-12).dense()
    values, vectors = torch.linalg.eigh(m)
    expected = vectors @ torch.diag(1 / (values.clamp(min=0) + 1e-12)) @ vectors.mT
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1.0)  # of 1e12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dense({"p": (5,)}, m).logdet(1e-3)


def test_what_is_not_semi_definite_is_refused() -> None:
    m = slightly_below(-0.05)
    for ask in (
        lambda: Dense({"p": (5,)}, m).logdet(),
        lambda: Kronecker({"p": (5, 1)}, m[None], torch.ones(1, 1, 1).double()).solve(
            torch.ones(5).double(), 0.1
        ),
    ):
        with pytest.raises(NNJError, match=r"not positive semi-definite: its smallest .* -0\.05"):
            ask()
    with pytest.raises(NNJError, match="not positive semi-definite"), pytest.warns(UserWarning):
        Dense({"p": (5,)}, m).logdet(0.01)


def test_a_matrix_that_is_singular_but_for_rounding() -> None:
    """Cholesky's factor exists by luck: eigenvalues are asked where damping is below rounding."""
    b = torch.randn(8, 3, dtype=torch.float64)
    m = b @ b.mT
    assert Dense({"p": (8,)}, m).logdet() == -math.inf
    found = Dense({"p": (8,)}, m).logdet(1e-20)
    small = torch.linalg.eigvalsh(b.mT @ b)
    torch.testing.assert_close(found, small.log().sum() + 5 * math.log(1e-20), rtol=1e-8, atol=0)


def test_entries_that_are_not_finite() -> None:
    m = torch.full((1, 2, 2), math.nan).double()
    with pytest.raises(NNJError, match="not finite"):
        Kronecker({"p": (2, 2)}, m, m).logdet(1.0)


@pytest.mark.parametrize("fails", ["an error", "no numbers"])
def test_where_single_precision_does_not_converge_double_does(fails, monkeypatch) -> None:
    """As it is with LAPACK for Kronecker factors of few samples."""
    real = torch.linalg.eigh

    def eigh(m: torch.Tensor) -> object:
        if m.dtype != torch.float32:
            return real(m)
        if fails == "an error":
            raise torch.linalg.LinAlgError("failed to converge")
        values, vectors = real(m)
        return values * math.nan, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: eigh(m)[0])
    root = torch.randn(6, 2)
    m = root @ root.mT
    found = Dense({"p": (6,)}, m)
    torch.testing.assert_close(found.eigenvalues(), real(m)[0], rtol=1e-4, atol=1e-5)
    kron = Kronecker({"p": (6, 1)}, m[None], torch.ones(1, 1, 1))
    expected = torch.linalg.inv(m + torch.eye(6))
    torch.testing.assert_close(kron.inverse(1.0).dense(), expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_converge_in_double_precision_is_refused(monkeypatch) -> None:
    def eigh(m: torch.Tensor) -> object:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    m = Kronecker({"p": (2, 1)}, torch.eye(2)[None], torch.ones(1, 1, 1))
    with pytest.raises(NNJError, match="torch.linalg.eigh does not converge"):
        m.inverse(1.0)
