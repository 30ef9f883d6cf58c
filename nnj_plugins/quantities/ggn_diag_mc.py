"""An unbiased estimate of diag(J^T H J) from random combinations of the exact columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

import nnj


class GGNDiagMC(nnj.Quantity):
    """`p.ggn_diag_mc`, of the shape of p: `ggn_diag` estimated with `samples` backward columns for
    each sample.

    With S S^T = H and independent random signs e, E[(S e)(S e)^T] = H (Hutchinson 1990). This is
    unbiased for any number of draws, and its variance falls as 1 / samples. Scaling as in
    `ggn_diag`.

    Args:
        samples: how many columns to draw.
        generator: a `torch.Generator` on the device of the model's output.
    """

    source = "signs"
    degree = 1

    def __init__(self, samples: int = 1, generator: torch.Generator | None = None):
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise nnj.NNJError(
                f"samples={samples!r}: the number of draws is a whole number, at least 1"
            )
        self.draws, self.generator = samples, generator

    @override
    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.square_sum() / self.draws

    @override
    def matrix(self, result: Tensor, shapes: Mapping[str, Sequence[int]]) -> nnj.matrices.Matrix:
        return nnj.matrices.Diagonal(shapes, result.flatten())


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("ggn_diag_mc", GGNDiagMC)
