"""What a loss is, and what its rule says: plain functions as modules, names, Hessians,
references.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from nnj.errors import NNJError, PluginError
from nnj.loss_hessian.autodiff import autodiff_hessian
from nnj.loss_hessian.base import LossHessian
from nnj.registry.blame import at_work
from nnj.registry.layer_rules import describes
from nnj.registry.manager import manager


class FunctionLoss(nn.Module):
    """A plain loss function of (output, target, ...) as a module, which is what `extend` makes of
    it.

    While the module of a function is in use, the function has no other: `extend` in a loop gives
    the same one again."""

    # by id: not everything that can be called can be hashed, and a weak table needs both
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


def ask_loss_rule(
    loss: nn.Module,
    scale: Tensor,
    outputs: Sequence[Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> LossHessian | None:
    """The Hessian of `(loss(*args, **kwargs) * scale).sum()` by the rule for the loss; None where
    no rule is for this class, describes this module and this call, or takes the options.

    A rule is asked about one output, the first argument; only that of functions takes keywords.

    Args:
        outputs: those of `args` and `kwargs` in which the Hessian is taken.

    Errors: `PluginError` naming the plugin, if its rule fails or returns something else; `NNJError`
    if the rule refuses."""
    entry = manager().find("loss", type(loss))
    if entry is None or entry.is_fallback or not describes(entry, loss):
        return None
    first = len(outputs) == 1 and len(args) > 0 and args[0] is outputs[0]
    if not first or (kwargs and entry.key is not FunctionLoss):
        return None
    who = f"plugin '{entry.source.plugin}' (loss '{name_of(loss)}')"
    try:
        found = entry.rule(loss, scale, *args, **kwargs)
    except NotImplementedError:
        return None
    except NNJError:  # a refusal, not a fault
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # one that exits would take the user's program with it
        raise PluginError(
            f"{who}: the rule failed with {type(error).__name__}: {error}{at_work(entry.source)}"
        ) from error
    if not isinstance(found, LossHessian):
        raise PluginError(
            f"{who}: the rule returned {type(found).__name__}, expected a nnj.LossHessian"
            f"{at_work(entry.source)}"
        )
    return found


def hessian_of_loss(loss: nn.Module, scale: Tensor, output: Tensor, *args: Any) -> LossHessian:
    """The Hessian of `(loss(output, *args) * scale).sum()` in the output: by the rule for the loss,
    or, where there is none or it declines, by `nnj.autodiff_hessian`.

    Errors: those of the rule; `PluginError` if it fails; `NNJError` for a loss that is not convex.
    """
    return ask_loss_rule(loss, scale, [output], (output, *args), {}) or autodiff_hessian(
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
