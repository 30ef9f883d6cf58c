"""J^T H J restricted to the parameters that one module owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from typing_extensions import override

import nnj


def checked_limit(block_limit: float) -> float:
    """Errors: `NNJError` for what is no number."""
    if isinstance(block_limit, bool) or not isinstance(block_limit, (int, float)):
        raise nnj.NNJError(f"block_limit={block_limit!r}: the largest P is a number")
    return block_limit


class GGNBlock(nnj.Quantity):
    """`module.ggn_block`, (P, P): the GGN of the module's own parameters that require grad, all of
    them together.

    They are flattened in the order of `named_parameters(recurse=False)`. Scaling as in `ggn_diag`,
    whose values are the block's diagonal.

    Args:
        block_limit: the largest P; beyond it `collect` refuses before anything is allocated.
    """

    degree = 1
    skips_zeros = True

    def __init__(self, block_limit: int = 10_000):
        self.limit = checked_limit(block_limit)

    @override
    def check(self, module: nn.Module | None, params: list[nn.Parameter], path: str) -> None:
        size = sum(p.numel() for p in params)
        if size > self.limit:
            kind = type(module).__name__
            raise nnj.NNJError(
                f"the ggn_block of '{path or kind}' ({kind}) would be {size} x {size}, which is "
                f"{size**2 * params[0].element_size() / 2**30:.1f} GiB, and beyond "
                f"block_limit={self.limit}. Use ggn_diag for it, restrict collect with "
                "modules=[...], or raise block_limit"
            )

    @override
    def module(self, factors: list[nnj.Factor | None], params: list[nn.Parameter]) -> Tensor:
        return nnj.joint_gram(factors, [p.shape for p in params])

    @override
    def matrix(self, result: Tensor, shapes: Mapping[str, Sequence[int]]) -> nnj.matrices.Matrix:
        return nnj.matrices.Dense(shapes, result, check=False)


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("ggn_block", GGNBlock)
