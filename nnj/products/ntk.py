"""nnj.ntk: the empirical tangent kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nnj.distributed.ranks import Ranks
from nnj.propagation.linearize import Modules, linearization
from nnj.propagation.weight_contractions import kernel, kernel_by_output
from nnj.propagation.weight_metrics import DiagonalMetric
from nnj.recording.replicas import check_replicas


def ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    per_class: bool = False,
    modules: Modules = None,
    memory: int = 2**28,
    group: Any = None,
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
        memory: as in `nnj.linearize`.
        group: a process group whose ranks each give inputs of their own: rows are those of this
            rank's x1, and columns those of the x2 of all ranks, one rank after the other. Inputs
            are sent, and no Jacobian. All ranks have at least one input.

    Errors: those of `nnj.linearize`.
    """
    tops = None if modules is None else [modules] if isinstance(modules, nn.Module) else [*modules]
    if group is not None and group is not False:
        ranks = Ranks(group, "nnj.ntk")
        check_replicas(ranks, model)
        x2 = _of_all(ranks, x1 if x2 is None else x2)
    one = linearization(model, x1, "weight", tops, memory=memory)
    two = one if x2 is None else linearization(model, x2, "weight", tops, memory=memory)
    return kernel_by_output(one, two) if per_class else kernel(one, two, DiagonalMetric())


def _of_all(ranks: Ranks, x: Any) -> Any:
    """Inputs of all ranks, one rank after the other."""
    leaves, form = tree_flatten(x)
    rows = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    ranks.meet()
    found = ranks.rows(rows, next(iter(rows.values())).device)
    return tree_unflatten([found.get(str(i), leaf) for i, leaf in enumerate(leaves)], form)
