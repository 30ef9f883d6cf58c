"""diag(J_n^T H_n J_n): the diagonal of each sample's part of the Gauss-Newton matrix."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

import nnj


class BatchGGNDiag(nnj.Quantity):
    """`p.batch_ggn_diag`, of shape (N, *p.shape): each sample's share of `p.ggn_diag`, which is its
    sum over axis 0.

    Scaling as in `ggn_diag`: with a mean reduction each share holds the factor 1 / N. Samples of
    several backward passes in one `collect` are concatenated in order; those that did not reach the
    parameter have rows of zeros.

    Errors: `NNJError` for a loss that takes samples together, so that none has a curvature of its
    own."""

    degree = 1
    per_sample = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.square_sum(per_sample=True)


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("batch_ggn_diag", BatchGGNDiag)
