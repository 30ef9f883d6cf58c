"""diag(J^T H J): the diagonal of the generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

import nnj


class GGNDiag(nnj.Quantity):
    """`p.ggn_diag`, of the shape of p: the exact diagonal of J^T H J, with J the Jacobian of the
    model's output in p.

    H is the Hessian, in the output, of exactly the scalar on which `.backward()` was called: the
    reduction of the loss and any factor before it count. Several backward passes in one `collect`
    add up. (Schraudolph 2002; Martens 2014, section 8.)"""

    degree = 1
    skips_zeros = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> nnj.SquareSum:
        return factor.squares(total_columns)

    @override
    def matrix(self, result: Tensor, shapes: Mapping[str, Sequence[int]]) -> nnj.matrices.Matrix:
        return nnj.matrices.Diagonal(shapes, result.flatten())


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("ggn_diag", GGNDiag)
