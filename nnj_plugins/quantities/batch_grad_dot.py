"""Inner products of the samples' gradients, which are not formed where they are thin."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from typing_extensions import override

import nnj


class BatchGradDot(nnj.Quantity):
    """`p.batch_grad_dot`, of shape (N, N): `g @ g.mT` for g = `p.batch_grad.flatten(1)`; and
    `context.batch_grad_dot`, (N, N), its sum over all parameters at which is collected.

    Rows are those of `batch_grad`: with a mean reduction each holds the factor 1 / N, and a product
    1 / N^2. Products with samples that did not reach the parameter are zero. The sum on the context
    is taken in the precision of the backward pass, which is float32 where parameters are of half
    precision.

    Errors: `NNJError` for a second backward pass in one `collect`, or samples of several calls of
    the model with a loss each, since products between them would need the gradients of both; and
    for two losses of the same samples in one backward pass, whose gradients add up before they are
    multiplied."""

    source = "gradient"
    degree = 2
    quadratic = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.kernel(factor, "all")[0, :, 0]

    @override
    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        _refuse()

    @override
    def finish(self, state: Tensor, samples: int) -> Tensor:
        if len(state) != samples:  # the others did not reach this parameter
            _refuse()
        return state

    @override
    def totals(self, states: Mapping[Any, Tensor], samples: int) -> dict[str, tuple[Tensor, int]]:
        products = [self.finish(state, samples) for state in states.values()]
        if not products:
            return {}
        total = functools.reduce(operator.add, (t.to(products[0].device) for t in products))
        return {"batch_grad_dot": (total, self.degree)}


def _refuse() -> NoReturn:
    raise nnj.NNJError(
        "batch_grad_dot: the samples come in several backward passes, or calls of the model with a "
        "loss each, and products between them would need the gradients of both. Give all samples "
        "to one call and one loss, or collect batch_grad and multiply its rows"
    )


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("batch_grad_dot", BatchGradDot)
