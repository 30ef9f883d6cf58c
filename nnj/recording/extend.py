"""extend() and retract(): put nnj's hooks on a model or a loss, and take them away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from nnj.errors import NNJError
from nnj.recording.loss_hook import BeforeLoss, LossHook
from nnj.recording.loss_state import is_torchs_own
from nnj.recording.module_hook import (
    EXTENDED,
    AfterCall,
    AfterLeafCall,
    BeforeCall,
    has_known_part,
)
from nnj.recording.wrappers import check_engine, engine_of
from nnj.registry.loss_rules import FunctionLoss, is_loss
from nnj.registry.manager import manager

M = TypeVar("M", bound=nn.Module)


def _is_leaf_of_torch(module: nn.Module) -> bool:
    """Whether `AfterLeafCall` is enough: no parts, nothing in place, torch's own forward."""
    known = (
        type(module).__module__.startswith("torch.nn.modules.") and "forward" not in module.__dict__
    )
    return known and not module._modules and not getattr(module, "inplace", False)


def _may_be_layer(module: nn.Module) -> bool:
    """Whether a rule may describe a call. Asked once, when the module is extended: at each call it
    would cost more than the call itself. What runs a model for an engine is none: called once more,
    it would take that for the next pass.
    """
    if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
        return False
    entry = manager().find("layer", type(module))
    return (entry is not None and not entry.is_fallback) or not has_known_part(module)


def _may_be_loss(module: nn.Module) -> str:
    """Whether a call may be that of a loss, as `BeforeCall` takes it. What has parameters to be
    trained and no loss inside is a model.
    """
    if any(is_loss(part) for part in module.modules()):
        return "always"
    return "" if any(p.requires_grad for p in module.parameters()) else "alone"


def extend(module: Any, *, loss: bool | None = None, batch_axis: int = 0) -> Any:
    """Put nnj's hooks on a model or a loss; the same object comes back, and computes what it did.

    Args:
        module: a model, a loss module, a module that contains losses, or a plain function of
            (output, target, ...), which comes back as a module.
        loss: True for a module of your own that is a loss; by default torch's losses and those with
            a loss rule are.
        batch_axis: where the samples are in the model's inputs and, where these have it, in its
            outputs; 1 for sequence-first models.

    What is a loss
        - torch's losses, those with a loss rule, plain functions, and what `loss=True` was said of.
        - A module that is called with outputs of an extended model and returns a scalar, in which
          there is more of them than the losses that it calls: such as a cross entropy with a term
          of its own. Where it only adds up such losses, these count, each by itself. One that calls
          none and has parameters to be trained is a model; say `loss=True`.
        - What a loss calls is part of it: no loss inside another one counts twice.

    Extending again changes nothing (but a new `batch_axis` holds). `retract` undoes it. Copies,
    pickles and state dicts of an extended model are as usual.

    Errors: `NNJError` for a compiled module, a stage of a pipeline, and an engine of DeepSpeed;
    TypeError for what is neither a module nor callable.
    """
    check_engine(engine_of(module))
    if not isinstance(module, nn.Module):
        if not callable(module) or isinstance(module, type):
            raise TypeError(
                "nnj.extend takes a torch.nn.Module or a function of (output, target, ...), not "
                f"{module!r}"
            )
        module, loss = FunctionLoss.of(module), True
    check_hookable(module)
    if loss and not is_loss(module):
        _remove(module)
        _put_on_loss(module)
        return module
    for part in module.modules():
        if is_loss(part):
            if not _has_loss_hook(part):
                _put_on_loss(part)
        elif not isinstance(part, torch.jit.ScriptModule) and not _has_loss_hook(part):
            _put(part, batch_axis)
    EXTENDED[module] = None
    return module


def _has_loss_hook(module: nn.Module) -> bool:
    return any(isinstance(hook, LossHook) for hook in module._forward_hooks.values())


def retract(module: nn.Module) -> nn.Module:
    """Take away every hook that `extend` has put on a module and its parts; the same object comes
    back.
    """
    for part in module.modules():
        _remove(part)
    EXTENDED.pop(module, None)
    return module


def copied(module: M) -> M:
    """A deep copy without our hooks; also of a module that keeps what it computed, as pruned layers
    do.
    """
    kept = [
        t
        for part in module.modules()
        for t in vars(part).values()
        if isinstance(t, Tensor) and not t.is_leaf
    ]
    copy_of = copy.deepcopy(module, {id(t): t.detach().clone() for t in kept})
    retract(copy_of)
    return copy_of


@contextmanager
def temporarily_extended(module: nn.Module) -> Iterator[None]:
    """Our hooks on a module, where it has none; they are gone afterwards."""
    known = module in EXTENDED
    parts = [
        m
        for m in module.modules()
        if not isinstance(m, torch.jit.ScriptModule)
        and not any(
            isinstance(hook, (BeforeCall, AfterCall, LossHook))
            for hook in m._forward_hooks.values()
        )
    ]
    for part in parts:
        _put(part, 0)
    try:
        yield
    finally:
        for part in parts:
            _remove(part)
        if not known:
            EXTENDED.pop(module, None)


def is_own_hook(hook: Any) -> bool:
    """Whether a hook of a module is one that `extend` has put there."""
    return isinstance(hook, (BeforeCall, AfterCall, BeforeLoss, LossHook))


def register_after_ours(module: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    """Register a forward hook of (module, args, kwargs, output) before all others, but for ours
    where it is the first: what ours sees must be what `forward` gave.
    """
    hooks: Any = module._forward_hooks
    first = next(iter(hooks), None)
    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
    if first is not None and isinstance(hooks[first], AfterCall):
        hooks.move_to_end(first, last=False)
    return handle


def batch_axis_of(module: nn.Module) -> int:
    """The batch axis under which a module was extended; 0 if it was not."""
    return next(
        (hook.batch_axis for hook in module._forward_hooks.values() if isinstance(hook, AfterCall)),
        0,
    )


def is_extended(module: Any) -> bool:
    """Whether a module has the hooks of a model, or of a part of one."""
    return isinstance(module, nn.Module) and any(
        isinstance(hook, AfterCall) for hook in module._forward_hooks.values()
    )


def check_hookable(module: Any) -> None:
    """Errors: `NNJError` for a compiled or scripted module, and for an engine around one."""
    check_engine(engine_of(module))
    if hasattr(module, "_torchdynamo_orig_callable") or type(module).__name__ == "OptimizedModule":
        raise NNJError(
            "a compiled module has no calls of layers to hook. Extend the model that was given to "
            "torch.compile, and collect with that one (model._orig_mod)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise NNJError(
            "a scripted module has no calls of layers to hook. Extend the module before "
            "torch.jit.script"
        )


def _put(module: nn.Module, batch_axis: int) -> None:
    _remove(module)
    if _is_leaf_of_torch(module):
        module.register_forward_hook(AfterLeafCall(batch_axis), with_kwargs=True, prepend=True)
        return
    before = BeforeCall(_may_be_layer(module), _may_be_loss(module))
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(
        AfterCall(batch_axis), with_kwargs=True, prepend=True, always_call=True
    )


def _put_on_loss(loss: nn.Module) -> None:
    if not is_torchs_own(loss):
        loss.register_forward_pre_hook(BeforeLoss(), with_kwargs=True)
    loss.register_forward_hook(LossHook(), with_kwargs=True)


def _remove(module: nn.Module) -> None:
    tables = (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (
            module._forward_hooks,
            (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ),
    )
    for hooks, flags in tables:
        for key in [
            key
            for key, hook in hooks.items()
            if isinstance(hook, (BeforeCall, AfterCall, BeforeLoss, LossHook))
        ]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)
