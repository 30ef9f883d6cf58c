"""nnj.ntk: the empirical tangent kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nnj.propagation.linearize import Modules, linearization
from nnj.propagation.weight_contractions import DiagonalMetric, kernel, kernel_by_output


def ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    per_class: bool = False,
    modules: Modules = None,
) -> Tensor:
    """The empirical tangent kernel J(x1) J(x2)^T, (N, C, N', C'), of J in the parameters that
    require grad (Jacot et al. 2018; ways to compute it: Novak et al. 2022).

    It is summed over the layers, of each by thin factors (U U'^T) o (V V'^T) where its places are
    few, or else by the layer's own rows: the joint J, of N C rows of P entries, is not formed.

    Args:
        model: as in `nnj.linearize`.
        x1, x2: inputs as `nnj.linearize` takes them; x2 is by default x1.
        per_class: between equal outputs alone, (N, N', C).
        modules: J in the parameters of these modules alone.

    Errors: those of `nnj.linearize`.
    """
    tops = None if modules is None else [modules] if isinstance(modules, nn.Module) else [*modules]
    one = linearization(model, x1, "weight", tops)
    two = one if x2 is None else linearization(model, x2, "weight", tops)
    return kernel_by_output(one, two) if per_class else kernel(one, two, DiagonalMetric())
