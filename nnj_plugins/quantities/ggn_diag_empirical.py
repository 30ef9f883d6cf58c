"""sum over samples of the squared rows of batch_grad: the diagonal of the empirical Fisher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

import nnj


class GGNDiagEmpirical(nnj.Quantity):
    """`p.ggn_diag_empirical`, of the shape of p: `p.batch_grad.square().sum(0)`, without the rows.

    With the negative log likelihood as a sum over the batch it is the diagonal of the empirical
    Fisher, which has the data's targets where the Fisher has the model's own (Kunstner et al.
    2019). It is quadratic in the loss: under a mean over N samples each row holds 1 / N, and the
    result is N times smaller than that of `ggn_diag` would lead one to think, 1 / N^2 of that of
    the sum. `p.grad.square()`, which is often taken for it, is something else: the square of the
    sum over the batch, not the sum of the squares.

    Several backward passes in one `collect` add up, as those of other samples.

    Errors: `NNJError` for two losses of the same samples in one backward pass, whose gradients add
    up before they are squared."""

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
