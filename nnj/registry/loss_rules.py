"""What a loss is, and what its rule says: plain functions as modules, names, Hessians,
references.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from nnj.loss_hessian.autodiff import autodiff_hessian
from nnj.loss_hessian.base import LossHessian
from nnj.registry.layer_rules import describes
from nnj.registry.manager import manager


class FunctionLoss(nn.Module):
    """A plain loss function of (output, target, ...) as a module, which is what `extend` makes of
    it.

    While the module of a function is in use, the function has no other: `extend` in a loop gives
    the same one again."""

    # by id, since not everything that can be called can be hashed
    _known: ClassVar[weakref.WeakValueDictionary[int, FunctionLoss]] = weakref.WeakValueDictionary()

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
    """What a loss takes; that of a function is the function's, so that arguments given by name have
    their place.
    """
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
    return entry is not None and not entry.is_fallback


def hessian_of_loss(loss: nn.Module, scale: Tensor, output: Tensor, *args: Any) -> LossHessian:
    """What the rule for `loss` says, and what `nnj.autodiff_hessian` says where there is none that
    describes it or it declines.
    """
    entry = manager().find("loss", type(loss))
    if entry is not None and describes(entry, loss):
        try:
            return entry.rule(loss, scale, output, *args)
        except NotImplementedError:
            pass
    return autodiff_hessian(
        lambda y: (loss.forward(y, *args) * scale).sum(), (output,), name_of(loss)
    )


def reference_of_loss(loss: Any) -> Callable[..., Tensor]:
    """What a loss is compared with, `reference(loss, output, *args)`: what its rule declares, by
    default its forward.
    """
    entry = manager().find("loss", type(loss)) if isinstance(loss, nn.Module) else None
    if entry is not None and entry.reference is not None and describes(entry, loss):
        return entry.reference
    return lambda loss, *given: (
        loss.forward(*given) if isinstance(loss, nn.Module) else loss(*given)
    )
