"""The second moment of the inputs of a matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

import nnj


class InputMoment(nnj.Quantity):
    """`module.input_moment`, (G, I, I): the sum over samples and places of u u^T, of the inputs u
    that the module's weight multiplies, for each of its G groups.

    A patch of a convolution is an input; two uses of the module are more places; a bias has no part
    in it. Several backward passes add up. It does not depend on the loss (degree 0), which says
    only where inputs count. (What quantisation by second moments needs: Frantar et al. 2023.)

    A module whose weights see inputs of one width has the moments of each, one behind the other
    (attention: query, key and value, G = 3). Norms, biases, weights of other widths in one module,
    and tables of embeddings of more than `block_limit` rows have none.

    Args:
        block_limit: the largest I of a table, of which a moment is a diagonal of counts.

    Errors: `NNJError` for two losses of the same samples that see other inputs.
    """

    source = "gradient"
    degree = 0

    def __init__(self, block_limit: int = 10_000):
        self.limit = block_limit

    @override
    def module(self, factors: list[nnj.Factor | None], params: list[nn.Parameter]) -> Any:
        krons = [k for f in factors if f is not None for k in f.kron() or ()]
        sides = [kron.outer_u() for kron in krons]
        sides = [s for s in sides if s.dim() == 3 or s.shape[1] <= self.limit]
        full = [s if s.dim() == 3 else torch.diag_embed(s) for s in sides]
        same = len({s.shape[1:] for s in full}) == 1
        return {"moment": torch.cat(full) if same else None}

    @override
    def merge_losses(self, one: Any, other: Any) -> Any:
        a, b = one["moment"], other["moment"]
        if a is b or (a is not None and b is not None and torch.equal(a, b)):
            return one
        raise nnj.NNJError(
            "input_moment: two losses of the same samples see other inputs of a module. Make one "
            "loss of them: nnj.extend a function of all their outputs and targets"
        )

    @override
    def finish(self, state: Any, samples: int) -> Tensor | None:
        moment: Tensor | None = state["moment"]
        return moment


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("input_moment", InputMoment)
