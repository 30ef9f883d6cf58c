"""diag(J^T H J) of each sample."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

import nnj


class BatchGGNDiag(nnj.Quantity):
    """`p.batch_ggn_diag`, (N, *p.shape): each sample's share of `ggn_diag`, to which they add up
    over axis 0.

    Scaled as `ggn_diag`: under a mean over the batch each share holds the factor 1 / N. Samples of
    several backward passes in one `collect` are concatenated in order.

    Errors: `NNJError` for a loss that takes samples together."""

    degree = 1
    per_sample = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.square_sum(per_sample=True)


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("batch_ggn_diag", BatchGGNDiag)
