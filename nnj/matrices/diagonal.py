"""M = diag(d): every entry of the parameters for itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from nnj.errors import NNJError
from nnj.jacobians.factor import Pairs
from nnj.matrices.layout import Damping
from nnj.matrices.matrix import Factors, Matrix, kernel_sum
from nnj.matrices.spectrum import check_definite


class Diagonal(Matrix):
    """diag(d).

    Args:
        shapes: as of every matrix.
        d: (P,), not negative.

    Errors: `NNJError` for another shape, or negative entries.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], d: Tensor):
        super().__init__(shapes, d)
        if d.shape != (self.layout.size,):
            raise NNJError(
                f"a diagonal over {self.layout.size} entries of parameters is a vector of as many, "
                f"not of {tuple(d.shape)}. Give all parameters, flattened, one behind the other"
            )
        if not bool((d >= 0).all()):
            raise NNJError(
                f"a diagonal of which {int((~(d >= 0)).sum())} of {len(d)} entries are below zero, "
                "or no numbers, is not positive semi-definite. Curvature of signed=True is no "
                "matrix of a Gaussian"
            )
        self.d = d

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> Self:
        """From a tensor of the shape of each parameter, by its name."""
        flat = [t.reshape(-1) for t in values.values()]
        return cls(
            {name: t.shape for name, t in values.items()}, torch.cat(flat or [torch.zeros(0)])
        )

    @override
    def matmul(self, v: Tensor) -> Tensor:
        return self.d[:, None] * v

    @override
    def dense(self) -> Tensor:
        return torch.diag(self.d)

    @override
    def diagonal(self) -> Tensor:
        return self.d.clone()

    @override
    def eigenvalues(self) -> Tensor:
        return self.d.sort().values

    @override
    def frobenius_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.d)
        return norm

    @override
    def solve(self, v: Tensor, damping: Damping = 0.0) -> Tensor:
        damped = self._definite(damping)
        return self.on_columns(lambda v: v / damped[:, None], v)

    @override
    def logdet(self, damping: Damping = 0.0) -> Tensor:
        return self._damped(damping).log().sum()

    @override
    def root(self, z: Tensor, damping: Damping = 0.0) -> Tensor:
        return z / self._definite(damping).sqrt()[:, None]

    @override
    def inverse(self, damping: Damping = 0.0) -> Matrix:
        return Diagonal(self.layout.shapes, 1 / self._definite(damping))

    @override
    def times(self, c: float) -> Matrix:
        return Diagonal(self.layout.shapes, self.d * c)

    @override
    def plus(self, other: Matrix) -> Matrix | None:
        if not isinstance(other, Diagonal):
            return None
        return Diagonal(self.layout.shapes, self.d + other.d)

    @override
    def is_apart(self, names: Collection[str]) -> bool:
        return True

    @override
    def restricted(self, names: Sequence[str]) -> Matrix:
        shapes = {name: s for name, s in self.layout.shapes.items() if name in names}
        return Diagonal(shapes, self.d[self.layout.entries(names).to(self.device)])

    @override
    def contract(
        self, factor: Factors, other: Factors | None = None, pairs: Pairs = "all"
    ) -> Tensor:
        other = factor if other is None else other
        self._check_factors(factor, other)
        values = {name: d[..., 0] for name, d in self.layout.split(self.d[:, None]).items()}
        scaled = {name: f.scale(values[name]) for name, f in other.items()}
        return kernel_sum(factor, scaled, pairs)

    @override
    def state(self) -> dict[str, Any]:
        return {"shapes": self.layout.shapes, "d": self.d}

    def _damped(self, damping: Damping) -> Tensor:
        return self.d + self.layout.spread(self.layout.damping(damping), self.d)

    def _definite(self, damping: Damping) -> Tensor:
        damped = self._damped(damping)
        check_definite(damped)
        return damped
