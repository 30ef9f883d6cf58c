"""(M + D)^-1 of a matrix that stands in memory, by Cholesky's factor or by eigenvalues: what both
can do, and when which of them is right.
"""

from __future__ import annotations

import math
import warnings
from typing import Protocol

import torch
from torch import Tensor

from nnj.errors import NNJError


class Damped(Protocol):
    """A positive definite N = M + D."""

    def solve(self, v: Tensor) -> Tensor:
        """N^-1 v."""
        ...

    def root(self, z: Tensor) -> Tensor:
        """R z with R R^T = N^-1."""
        ...

    def logdet(self) -> Tensor:
        """log det N."""
        ...


class Cholesky:
    """By L L^T = N."""

    def __init__(self, l: Tensor):
        self.l = l

    def solve(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v, self.l)

    def root(self, z: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve_triangular(self.l.mT, z, upper=True)
        return found

    def logdet(self) -> Tensor:
        return 2 * self.l.diagonal().log().sum()


class Eigen:
    """By Q diag(values) Q^T = N, of which some values are 0 where it is singular."""

    def __init__(self, values: Tensor, vectors: Tensor):
        self.values, self.vectors = values, vectors

    def solve(self, v: Tensor) -> Tensor:
        check_definite(self.values)
        return self.vectors @ ((self.vectors.mT @ v) / self.values[:, None])

    def root(self, z: Tensor) -> Tensor:
        check_definite(self.values)
        return self.vectors @ (z / self.values.sqrt()[:, None])

    def logdet(self) -> Tensor:
        return self.values.log().sum()


def decomposed(m: Tensor, d: Tensor, same: float | None) -> Damped:
    """M + D, by Cholesky where D is above the rounding of M, which decides whether it is singular.

    Args:
        m: M, (P, P), of single precision at least.
        d: the diagonal of D, (P,).
        same: the number that all of d are, if they are.
    """
    damped = m + torch.diag(d)
    rounding = _rounding(len(m), m.dtype) * float(torch.linalg.matrix_norm(m))
    if len(m) and float(d.min()) > rounding:
        l, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return Cholesky(l)
        smallest = eigenvalues(damped)[0]
        warnings.warn(
            "a matrix with its damping is not positive definite as it stands: its smallest "
            f"eigenvalue is {float(smallest):.3g}. Eigenvalues are taken instead of its Cholesky "
            "factor, and those of the matrix that are below zero are taken as zero",
            stacklevel=4,
        )
    if same is None:
        return Eigen(*eigen(damped))
    values, vectors = eigen(m)
    return Eigen(values + same, vectors)


def eigen(m: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., P) and eigenvectors (..., P, P) of positive semi-definite matrices, with
    those that are within rounding of zero as zeros.

    Errors: `NNJError` for entries that are not finite, and for a matrix that is not semi-definite.
    """
    if not bool(torch.isfinite(m).all()):
        raise NNJError(
            "a matrix has entries that are not finite, so it has no eigenvalues. Look for them in "
            "the model's weights and outputs, of which it was made"
        )
    values, vectors = _eigh(m)
    return nonnegative(values), vectors


def eigenvalues(m: Tensor) -> Tensor:
    """Ascending, (P,), of a symmetric matrix with finite entries."""
    try:
        values: Tensor = torch.linalg.eigvalsh(m)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values = torch.full(m.shape[:-1], math.nan)
    return values if bool(torch.isfinite(values).all()) else _eigh(m)[0]


def _eigh(m: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices with finite entries. Divide and conquer of
    single precision may fail, with an error or with entries that are no numbers, where most
    eigenvalues are rounding, as in Kronecker factors of few samples: then in double precision.
    """
    try:
        values, vectors = torch.linalg.eigh(m)
        well = bool(torch.isfinite(values).all() & torch.isfinite(vectors).all())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        well = False
    if well:
        return values, vectors
    if m.dtype in (torch.float64, torch.complex128):
        raise NNJError(
            f"the eigenvalues of a matrix of {m.shape[-1]} rows were not found: torch.linalg.eigh "
            "does not converge. Divide the loss, or the weights, so that its entries are about 1"
        )
    values, vectors = _eigh(m.to(torch.complex128 if m.is_complex() else torch.float64))
    return values.to(m.dtype), vectors.to(m.dtype)


def nonnegative(values: Tensor, rounding: float | None = None) -> Tensor:
    """Eigenvalues (..., P) of semi-definite matrices with those within rounding of zero as zeros.

    Args:
        rounding: of the largest one; by default that of an eigendecomposition.

    Errors: `NNJError` for such that are below it.
    """
    if values.numel() == 0:
        return values
    eps = torch.finfo(values.dtype).eps
    largest = values.abs().amax(-1, keepdim=True)
    if bool((values < -math.sqrt(eps) * largest).any()):
        raise NNJError(
            f"a matrix is not positive semi-definite: its smallest eigenvalue is "
            f"{float(values.min()):.3g}, its largest {float(values.max()):.3g}. Curvature is "
            "semi-definite, but for that of signed=True, which is no matrix of a Gaussian"
        )
    if rounding is None:
        rounding = _rounding(values.shape[-1], values.dtype)
    return torch.where(values <= rounding * largest, 0.0, values)


def check_definite(values: Tensor) -> None:
    """Errors: `NNJError` if one of the eigenvalues of a matrix with its damping is zero."""
    if values.numel() and not bool((values > 0).all()):
        raise NNJError(
            f"a matrix is singular to the precision of {values.dtype}, so it has no inverse: "
            f"{int((values <= 0).sum())} of {values.numel()} eigenvalues are zero. Give a damping "
            "above 0, such as the precision of a prior"
        )


def wide(t: Tensor) -> Tensor:
    """In single precision at least, in which decompositions are."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _rounding(size: int, dtype: torch.dtype) -> float:
    return size * torch.finfo(dtype).eps
