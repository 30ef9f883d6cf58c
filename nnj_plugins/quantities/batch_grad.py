"""The gradient of each sample's part of the loss."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

import nnj


class BatchGrad(nnj.Quantity):
    """`p.batch_grad`, of shape (N, *p.shape): each sample's share of `p.grad`, scaled as the scalar
    that was differentiated.

    Summed over axis 0 it is what extended losses add to `p.grad`; with a mean reduction each share
    holds the factor 1 / N. Samples of several backward passes in one `collect` are concatenated in
    order."""

    source = "gradient"
    degree = 1
    per_sample = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.dense()[0]


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("batch_grad", BatchGrad)
