"""J^T H J over all parameters together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from typing_extensions import override

import nnj
from nnj_plugins.quantities.ggn_block import checked_limit


class GGN(nnj.Quantity):
    """`context.ggn`, (P, P): the GGN over all parameters that require grad, of the models that took
    part or of `modules=`, flattened in the order of `parameters()`.

    Scaling as in `ggn_diag`, whose values are its diagonal. Parameters that no backward pass
    reached have rows of zeros. `nnj.fit(...)["ggn"]` is the same of a data set.

    Args:
        block_limit: the largest P; beyond it `collect` refuses before anything is allocated.

    Errors: `NNJError` beyond `block_limit`, and for passes over other parameters.
    """

    degree = 1

    def __init__(self, block_limit: int = 10_000):
        self.limit = checked_limit(block_limit)

    @override
    def check(self, module: nn.Module | None, params: list[nn.Parameter], path: str) -> None:
        size = sum(p.numel() for p in params)
        if size > self.limit:
            raise nnj.NNJError(
                f"the ggn of all {len(params)} parameters would be {size} x {size}, which is "
                f"{size**2 * params[0].element_size() / 2**30:.1f} GiB, and beyond "
                f"block_limit={self.limit}. Use ggn_block, kfac or ggn_diag, restrict collect with "
                "modules=[...], raise block_limit, or multiply by it with nnj.GGN"
            )

    @override
    def joint(self, factors: list[nnj.Factor | None], params: list[nn.Parameter]) -> Tensor:
        return nnj.joint_gram(factors, [p.shape for p in params])

    @override
    def matrix(self, result: Tensor, shapes: Mapping[str, Sequence[int]]) -> nnj.matrices.Matrix:
        return nnj.matrices.Dense(shapes, result, check=False)


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("ggn", GGN)
