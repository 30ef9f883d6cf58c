"""The hook of a loss: it notes what the loss is given, and is told when the gradient of its value arrives."""
from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nnj.plugins import manager
from nnj.records import LossCall, edge_of, inert

listeners: list[Callable[[LossCall, Tensor], None]] = []  # told when the gradient of a loss arrives; collection.py is one


class LossHook:
    """Forward hook of a loss: asks autograd to tell us when the gradient of its value arrives.

    That is before any node of the model has run, so every saved tensor is there, and the gradient is the scale.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        if inert() or not isinstance(value, Tensor) or value.grad_fn is None:
            return
        leaves, spec = _arguments(module, args, kwargs)
        outputs, edges = [], []
        for index, leaf in enumerate(leaves):
            edge = edge_of(leaf) if isinstance(leaf, Tensor) else None
            if edge is not None:
                outputs.append(index)
                edges.append(edge)
        held = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        versions = [(t, t._version) for t in held if isinstance(t, Tensor)]
        call = LossCall(module, name_of(module), held, spec, outputs, edges, versions, threading.get_ident(),
                        value.detach().clone())

        def arrived(scale: Tensor) -> None:
            for listener in listeners:
                listener(call, scale)

        value.register_hook(arrived)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """All that a loss was given, flattened, with the structure to put it together again (None: these are the arguments)."""
    if not kwargs and all(isinstance(a, Tensor) for a in args):
        return list(args), None
    bound = signature_of(module).bind(*args, **kwargs)
    return tree_flatten((list(bound.args), dict(bound.kwargs)))


class FunctionLoss(nn.Module):
    """A plain loss function of (output, target, ...) as a module, which is what `extend` makes of it.

    While the module of a function is in use, the function has no other: `extend` in a loop gives the same one again.
    """

    _known: ClassVar[weakref.WeakValueDictionary[int, FunctionLoss]] = weakref.WeakValueDictionary()  # by the id of the function

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)

    @classmethod
    def of(cls, function: Callable[..., Tensor]) -> FunctionLoss:
        """The module that is in use for the function, or a new one."""
        known = cls._known.get(id(function))
        if known is None or known.function is not function:
            known = cls._known[id(function)] = cls(function)
        return known

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def name_of(loss: nn.Module) -> str:
    """What errors call a loss."""
    if not isinstance(loss, FunctionLoss):
        return type(loss).__name__
    name = loss.extra_repr()
    return "the loss (a lambda)" if name == "<lambda>" else name


def signature_of(loss: nn.Module) -> inspect.Signature:
    """What a loss takes; that of a function is the function's, so that arguments given by name have their place."""
    if isinstance(loss, FunctionLoss):
        try:
            return inspect.signature(loss.function)
        except (TypeError, ValueError):  # it is written in C
            pass
    return inspect.signature(loss.forward)


def is_loss(module: nn.Module) -> bool:
    """Whether a loss rule knows the class, or it is one of torch's losses."""
    if isinstance(module, (FunctionLoss, nn.modules.loss._Loss)):
        return True
    entry = manager().find("loss", type(module))
    return entry is not None and entry.key is not nn.Module
