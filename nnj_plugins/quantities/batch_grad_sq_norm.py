"""Squared norms of the samples' gradients, which are not formed."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

import nnj


class BatchGradSqNorm(nnj.Quantity):
    """`p.batch_grad_sq_norm`, of shape (N,): `p.batch_grad.square().flatten(1).sum(1)`; and
    `context.batch_grad_sq_norm`, (N,), its sum over all parameters at which is collected.

    Rows are those of `batch_grad`: with a mean reduction each holds the factor 1 / N, and its
    squared norm 1 / N^2. Samples of several backward passes in one `collect` are concatenated in
    order; those that did not reach the parameter have norm zero. The sum on the context is taken in
    the precision of the backward pass, which is float32 where parameters are of half precision.

    Errors: `NNJError` for two losses of the same samples in one backward pass, whose gradients add
    up before they are squared."""

    source = "gradient"
    degree = 2
    per_sample = True
    quadratic = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.kernel(factor, "row")[0]

    @override
    def totals(self, states: Mapping[Any, Tensor], samples: int) -> dict[str, tuple[Tensor, int]]:
        norms = list(states.values())
        if not norms:
            return {}
        total = functools.reduce(operator.add, (t.to(norms[0].device) for t in norms))
        return {"batch_grad_sq_norm": (total, self.degree)}


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("batch_grad_sq_norm", BatchGradSqNorm)
