"""sum u u^T over samples and places: the second moment of what a weight is multiplied with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

import nnj


class InputMoment(nnj.Quantity):
    """`module.input_moment`, (G, I, I): sum over samples and places of u u^T, for each group of the
    module's weight, with u the I inputs of a patch that the weight is multiplied with.

    It is what methods in the manner of GPTQ need (Frantar et al. 2022), the A of Kronecker factors
    without the division by the count and without a row of ones. Nothing of the loss is in it, only
    which calls it reaches. Passes of other samples add up.

    - A convolution has a place for each entry of its output, and I = channels of a group times
      entries of the kernel, padding included; a linear layer one for each row or token.
    - A weight that is used several times, also by other modules, has the places of all its uses.
    - The projections of query, key and value in attention's packed in_proj_weight count as its
      groups: (3, E, E), also where all three have one input. So do row blocks of any weight that is
      taken apart, where each has inputs of as many entries.
    - An embedding reads rows of the identity: a diagonal of how often each row is read, which
      becomes a full matrix within `block_limit`.
    - None of modules whose own parameters with two axes or more, of those that require grad, are
      not exactly one (recurrent cells), or where that is not known to be a matrix product with
      patches: norms, a table of positions, what goes through autograd, hooks that change its
      gradient.

    Args:
        block_limit: the most rows of an embedding.

    Errors: `NNJError` for an embedding of more rows, and for two losses of the same samples in one
    backward pass that reach the module by other calls.
    """

    source = "gradient"  # of which every column has the same u: one is enough
    degree = 0

    def __init__(self, block_limit: int = 10_000):
        if isinstance(block_limit, bool) or not isinstance(block_limit, (int, float)):
            raise nnj.NNJError(f"block_limit={block_limit!r}: the most rows are a number")
        self.limit = block_limit

    @override
    def module(self, factors: list[nnj.Factor | None], params: list[nn.Parameter]) -> Tensor | None:
        weights = [f for f, p in zip(factors, params, strict=True) if p.dim() > 1]
        krons = weights[0].kron() if len(weights) == 1 and weights[0] is not None else None
        if not krons or not _fill_the_rows([kron.view for kron in krons]):
            return None
        krons = sorted(krons, key=lambda kron: getattr(kron.view, "start", 0))
        moments = [self._full(kron.outer_u()) for kron in krons]
        same = all(t.shape[1:] == moments[0].shape[1:] for t in moments)
        return torch.cat(moments) if same else None

    def _full(self, moment: Tensor) -> Tensor:
        """(G, I, I), also of a diagonal (G, I)."""
        if moment.dim() == 3:
            return moment
        rows = moment.shape[1]
        if rows > self.limit:
            raise nnj.NNJError(
                f"the input_moment of a table of {rows} rows is diagonal, and would be {rows} x "
                f"{rows}, which is {rows**2 * moment.element_size() / 2**30:.1f} GiB, and beyond "
                f"block_limit={self.limit}. Restrict collect with modules=[...], or raise "
                "block_limit"
            )
        return torch.diag_embed(moment)

    @override
    def merge_losses(self, one: Any, other: Any) -> Any:
        """Both see the same inputs, which count once."""
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
            same = not bool((one != other).any())
        else:
            same = one is None and other is None
        if not same:
            raise nnj.NNJError(
                "input_moment: two losses of the same samples see other inputs of a module, so "
                "that some would count once and some twice. Collect it in the pass of one loss"
            )
        return one


def _fill_the_rows(views: list[Any]) -> bool:
    """Whether views have each row of a parameter once, as it stands if there are several."""
    if len(views) == 1:
        return views[0] is None or (isinstance(views[0], nnj.View) and views[0].whole)
    at = 0
    for view in sorted(views, key=lambda view: getattr(view, "start", -1)):
        if not isinstance(view, nnj.View) or view.start != at:
            return False
        if view != nnj.View.rows(view.shape, view.start, view.stop):
            return False
        at = view.stop
    return bool(at == views[0].shape[0])


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("input_moment", InputMoment)
