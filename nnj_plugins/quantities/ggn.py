"""J^T H J over all parameters together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations_with_replacement

import torch
from torch import Tensor, nn
from typing_extensions import override

import nnj


class GGN(nnj.Quantity):
    """`context.ggn`, (P, P): the GGN over all parameters of `modules=` (by default of the model)
    that require grad, flattened in the order of `model.parameters()`. Rows and columns of those
    that no loss reached are zero.

    Scaling as in `ggn_diag`, whose values are its diagonal; the blocks on it are those of
    `ggn_block`. Several backward passes in one `collect` add up.

    Args:
        block_limit: the largest P; beyond it `collect` refuses before anything is allocated.
    """

    degree = 1

    def __init__(self, block_limit: int = 10_000):
        if isinstance(block_limit, bool) or not isinstance(block_limit, (int, float)):
            raise nnj.NNJError(f"block_limit={block_limit!r}: the largest P is a number")
        self.limit = block_limit

    @override
    def check(self, module: nn.Module | None, params: list[nn.Parameter], path: str) -> None:
        size = sum(p.numel() for p in params)
        if size > self.limit:
            raise nnj.NNJError(
                f"the ggn of all parameters would be {size} x {size}, which is "
                f"{size**2 * params[0].element_size() / 2**30:.1f} GiB, and beyond "
                f"block_limit={self.limit}. Use ggn_block or ggn_diag, restrict collect with "
                "modules=[...], or raise block_limit"
            )

    @override
    def joint(self, factors: list[nnj.Factor | None], params: list[nn.Parameter]) -> Tensor:
        ends = list(accumulate((p.numel() for p in params), initial=0))
        known = [(i, f) for i, f in enumerate(factors) if f is not None]
        like = known[0][1]
        total = torch.zeros(ends[-1], ends[-1], dtype=like.dtype, device=like.device)
        for (i, f), (j, g) in combinations_with_replacement(known, 2):
            rows, columns = slice(*ends[i : i + 2]), slice(*ends[j : j + 2])
            total[rows, columns] = f.gram(g)
            if i != j:
                total[columns, rows] = total[rows, columns].mT
        return total

    @override
    def matrix(self, result: Tensor, shapes: Mapping[str, Sequence[int]]) -> nnj.matrices.Matrix:
        return nnj.matrices.Dense(shapes, result)


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("ggn", GGN)
