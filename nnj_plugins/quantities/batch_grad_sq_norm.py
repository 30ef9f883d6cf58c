"""The squared norm of the gradient of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

import nnj


class BatchGradSqNorm(nnj.Quantity):
    """`p.batch_grad_sq_norm`, (N,): the squared norms of the rows of `batch_grad`, which are never
    formed; on the context their sum over all parameters, (N,).

    Scaled as the square of `batch_grad`: degree 2. Samples of several backward passes in one
    `collect` are concatenated in order. (Goodfellow 2015 for linear layers.)

    Errors: `NNJError` for two losses of the same samples in one backward pass."""

    source = "gradient"
    degree = 2
    per_sample = True
    quadratic = True
    entrywise = False

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.kernel(factor, "row").sum(0)

    @override
    def totals(self, states: Mapping[Any, Any], samples: int) -> dict[str, tuple[Tensor, int]]:
        if not states:
            return {}
        total = torch.stack(list(states.values())).sum(0)
        return {"batch_grad_sq_norm": (total, 2)}


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("batch_grad_sq_norm", BatchGradSqNorm)
