"""The inner products of the gradients of every two samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

import nnj


class BatchGradDot(nnj.Quantity):
    """`p.batch_grad_dot`, (N, N): the inner products of the rows of `batch_grad`, which are never
    formed; on the context their sum over all parameters, (N, N).

    Scaled as the square of `batch_grad`: degree 2. Over several processes it is that of each one's
    own samples.

    Errors: `NNJError` for a second backward pass, or a second batch: products between samples of
    two batches are in neither of them; for two losses of the same samples."""

    source = "gradient"
    degree = 2
    quadratic = True
    entrywise = False
    of_rank = True

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.kernel(factor).sum((0, 2)) if factor.k > 1 else factor.kernel(factor)[0, :, 0]

    @override
    def merge(self, one: Any, other: Any) -> Any:
        raise _second()

    @override
    def finish(self, state: Tensor, samples: int) -> Tensor:
        if len(state) != samples:  # the others did not reach this parameter
            raise _second()
        return state

    @override
    def totals(self, states: Mapping[Any, Any], samples: int) -> dict[str, tuple[Tensor, int]]:
        if not states:
            return {}
        parts = [self.finish(state, samples) for state in states.values()]
        return {"batch_grad_dot": (torch.stack(parts).sum(0), 2)}


def _second() -> nnj.NNJError:
    return nnj.NNJError(
        "batch_grad_dot: samples of two backward passes, or of two calls of the model, have inner "
        "products that are in neither. Give all samples in one batch, or collect batch_grad"
    )


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("batch_grad_dot", BatchGradDot)
