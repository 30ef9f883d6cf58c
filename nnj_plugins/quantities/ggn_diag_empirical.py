"""The diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

import nnj


class GGNDiagEmpirical(nnj.Quantity):
    """`p.ggn_diag_empirical`, of the shape of p: the sum over samples of the squared rows of
    `batch_grad`, which are never formed.

    It squares the gradient of each sample, and adds. (The square of the gradient of the batch,
    `p.grad ** 2`, is another thing, though often taken for it.) Of degree 2: a loss c times as
    large gives c**2 times as much, so that under a mean over N samples it is N times smaller than
    `ggn_diag` where both estimate one matrix. On what it says of curvature see Kunstner et al.
    2019.

    Errors: `NNJError` for two losses of the same samples in one backward pass."""

    source = "gradient"
    degree = 2
    quadratic = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.square_sum()

    @override
    def matrix(self, result: Tensor, shapes: Mapping[str, Sequence[int]]) -> nnj.matrices.Matrix:
        return nnj.matrices.Diagonal(shapes, result.flatten())


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("ggn_diag_empirical", GGNDiagEmpirical)
