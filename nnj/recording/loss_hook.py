"""The hook of a loss: it keeps what the loss was given, and tells `listeners` when the gradient of
its value arrives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nnj.recording.records import LossCall, edge_of, inert
from nnj.registry.loss_rules import name_of, signature_of

# Each is called with the call of a loss and the gradient of its value, when that gradient arrives
# in a backward pass, before any node of the model has run. nnj.collecting.collect adds itself here.
listeners: list[Callable[[LossCall, Tensor], None]] = []


class LossHook:
    """Forward hook of a loss: puts a hook on its value, which autograd calls with the value's
    gradient.

    That is before any node of the model has run, so every saved tensor is there; the gradient is
    the scale of the loss in the scalar."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> None:
        if inert() or not isinstance(value, Tensor) or value.grad_fn is None:
            return
        leaves, spec = _arguments(module, args, kwargs)
        outputs, edges = [], []
        for index, leaf in enumerate(leaves):
            edge = edge_of(leaf) if isinstance(leaf, Tensor) else None
            if edge is not None:
                outputs.append(index)
                edges.append(edge)
        kept = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        versions = [(t, t._version) for t in kept if isinstance(t, Tensor)]
        call = LossCall(
            module,
            name_of(module),
            kept,
            spec,
            outputs,
            edges,
            versions,
            threading.get_ident(),
            value.detach().clone(),
        )

        def arrived(scale: Tensor) -> None:
            for listener in listeners:
                listener(call, scale)

        value.register_hook(arrived)


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], Any]:
    """All that a loss was given, flattened, with the structure to put it together again
    (None: these are the arguments).
    """
    if not kwargs and all(isinstance(a, Tensor) for a in args):
        return list(args), None
    bound = signature_of(module).bind(*args, **kwargs)
    return tree_flatten((list(bound.args), dict(bound.kwargs)))
