"""The hook manager: extend() and retract(), and the record of one call of one module.

A record lives in the metadata of the autograd node that made the module's output, so it lives exactly as long as the graph.
Nothing is stored on modules or parameters, and nothing happens where no graph is made.
"""
from __future__ import annotations

import copy
import itertools
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from nnj.errors import NNJError
from nnj.loss_hook import FunctionLoss, LossHook, is_loss
from nnj.plugins import manager
from nnj.records import MARK, RECORD, CallMark, Edge, edge_of, inert, note, tensors, write
from nnj.rules import Known

M = TypeVar("M", bound=nn.Module)


class _Local(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


class _Frame:
    """A call that is going on.

    Attributes:
        x, edge, version: the only argument, before anything in place changes it, if a record may be made of the call.
        given: the arguments of an outermost call.
        python: the call in Python that this stands for.
    """

    __slots__ = ("edge", "given", "module", "python", "version", "x")

    def __init__(self, module: nn.Module, given: Sequence[Any], layer: bool, outermost: bool, python: FrameType):
        self.module, self.python = module, python
        x = given[0] if layer and len(given) == 1 else None
        self.x = x if isinstance(x, Tensor) else None
        self.edge, self.version = (None, 0) if self.x is None else (edge_of(self.x), self.x._version)
        self.given = tensors(list(given)) if outermost else []


_local = _Local()
_order = itertools.count()
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def extended_roots() -> list[nn.Module]:
    """The modules that were given to `extend` and are still alive."""
    return list(_roots)


class _Before:
    """Forward pre-hook: takes the edge of the input before an in-place layer changes it. Comes last of all pre-hooks.

    Args:
        layer: whether a rule may describe the call; what holds layers with rules is a call alone.
    """

    def __init__(self, layer: bool):
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if inert():
            return
        frames, python = _local.frames, sys._getframe(1)
        _drop_finished(frames, python)
        frames.append(_Frame(module, [*args, *kwargs.values()] if kwargs else args, self.layer, not frames, python))


class _After:
    """Forward hook: stores the record on the output. Comes first of all hooks; called also when forward raises."""

    def __init__(self, batch_axis: int):
        self.batch_axis, self.known = batch_axis, Known()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        frames = _local.frames
        while frames:  # frames above ours belong to calls that raised
            frame = frames.pop()
            if frame.module is module:
                break
        else:
            return
        if inert() or output is None:
            return
        if frame.x is not None and isinstance(output, Tensor) and output.grad_fn is not None:
            self._record(module, frame.x, frame.edge, frame.version, output)
        if not frames:
            self._mark(module, frame.given, output)

    def _mark(self, module: nn.Module, given: list[Tensor], output: Any) -> None:
        """The end of an outermost call."""
        mark = CallMark(module, [t.detach() for t in given], self.batch_axis, next(_order))
        _roots.add(module)  # a copy of an extended model is known by its first call
        for t in tensors(output):
            if t.grad_fn is not None:
                write(t.grad_fn, (MARK, t.output_nr), mark)

    def _record(self, module: nn.Module, x: Tensor, edge: Edge | None, version: int, y: Tensor) -> None:
        node = y.grad_fn
        if not _sees_forward(module) or (y is x and edge is not None and edge[0] is node):
            return  # in the latter case nothing was computed
        entry = self.known.rule(module)
        if entry is not None and (entry.key is not nn.Module or is_leaf_layer(module)):
            write(node, (RECORD, y.output_nr), note(module, entry, x, version, edge, y))


class _AfterLeaf(_After):
    """The only hook of a layer of torch that has no parts and does not work in place: all is still there after the call.

    torch runs a hook before the call, and one that is always called, at a price that a small network would feel.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if inert() or output is None:
            return
        frames = _local.frames
        if frames:
            _drop_finished(frames, sys._getframe(1))
        given = [*args, *kwargs.values()] if kwargs else args
        x = given[0] if len(given) == 1 else None
        # In place after all, since `inplace` was set later, or `forward` replaced: autograd's nodes know what happened.
        there = isinstance(output, Tensor) and output.grad_fn is not None and output is not x
        if isinstance(x, Tensor) and there and "forward" not in module.__dict__:
            self._record(module, x, edge_of(x), x._version, output)
        if not frames:
            self._mark(module, tensors(list(given)), output)


def _is_leaf_of_torch(module: nn.Module) -> bool:
    """Whether `_AfterLeaf` will do."""
    known = type(module).__module__.startswith("torch.nn.modules.") and "forward" not in module.__dict__
    return known and not module._modules and not getattr(module, "inplace", False)


def _sees_forward(module: nn.Module) -> bool:
    """Whether what our hooks see is what `forward` takes and gives: no other hook stands between."""
    if torch_module._global_forward_hooks:
        return False
    own = module.__dict__
    after, before = own["_forward_hooks"], own["_forward_pre_hooks"]
    first = next(iter(after.values()))
    if isinstance(first, _AfterLeaf) or len(after) == len(before) == 1:
        return isinstance(first, _After)
    return isinstance(first, _After) and isinstance(next(reversed(before.values())), _Before)


def is_leaf_layer(module: nn.Module) -> bool:
    """The fallback is for layers with parameters whose parts have no rules: else autograd's nodes and they do better."""
    return not _has_known_part(module) and next(module.parameters(), None) is not None


def _may_be_layer(module: nn.Module) -> bool:
    """Whether a rule may describe a call. Said once, when it is extended: to ask at each call costs more than the call itself."""
    entry = manager().find("layer", type(module))
    return (entry is not None and entry.key is not nn.Module) or not _has_known_part(module)


def _has_known_part(module: nn.Module) -> bool:
    """Whether a layer with a rule of its own, and with parameters, is inside. It mostly is the first that is looked at."""
    for part in module._modules.values():
        if part is None:
            continue
        entry = manager().find("layer", type(part))
        known = entry is not None and entry.key is not nn.Module
        if (known and next(part.parameters(), None) is not None) or _has_known_part(part):
            return True
    return False


def _drop_finished(frames: list[_Frame], python: FrameType) -> None:
    """Forget calls that ended without a word (an interrupt by the keyboard): they are no callers of this one."""
    while frames:
        caller: FrameType | None = python
        last = frames[-1].python
        while caller is not None and caller is not last:
            caller = caller.f_back
        if caller is not None:
            return
        frames.pop()


def extend(module: Any, *, loss: bool | None = None, batch_axis: int = 0) -> Any:
    """Put nnj's hooks on a model or a loss; the same object comes back, and computes what it did.

    Args:
        module: a model, a loss module, a module that contains losses, or a plain function of (output, target, ...), which
            comes back as a module.
        loss: True for a module of your own that is a loss; by default torch's losses and those with a loss rule are.
        batch_axis: where the samples are in the model's first input; 1 for sequence-first models.

    Extending again changes nothing (but a new `batch_axis` holds). `retract` undoes it. Copies, pickles and state dicts of an
    extended model are as usual.

    Errors: `NNJError` for a compiled module; TypeError for what is neither a module nor callable.
    """
    if not isinstance(module, nn.Module):
        if not callable(module) or isinstance(module, type):
            raise TypeError(f"nnj.extend takes a torch.nn.Module or a function of (output, target, ...), not {module!r}")
        module, loss = FunctionLoss.of(module), True
    check_hookable(module)
    if loss and not is_loss(module):
        _remove(module)
        module.register_forward_hook(LossHook(), with_kwargs=True)
        return module
    for part in module.modules():
        if is_loss(part):
            if not any(isinstance(hook, LossHook) for hook in part._forward_hooks.values()):
                part.register_forward_hook(LossHook(), with_kwargs=True)
        elif not isinstance(part, torch.jit.ScriptModule):
            if any(isinstance(hook, LossHook) for hook in part._forward_hooks.values()):
                continue
            _put(part, batch_axis)
    _roots.add(module)
    return module


def retract(module: nn.Module) -> nn.Module:
    """Take away every hook that `extend` has put on a module and its parts; the same object comes back."""
    for part in module.modules():
        _remove(part)
    _roots.discard(module)
    return module


def copied(module: M) -> M:
    """A deep copy without our hooks; also of a module that keeps what it computed, as pruned layers do."""
    kept = [t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf]
    copy_of = copy.deepcopy(module, {id(t): t.detach().clone() for t in kept})
    retract(copy_of)
    return copy_of


@contextmanager
def temporarily_extended(module: nn.Module) -> Iterator[None]:
    """Our hooks on a module, where it has none; they are gone afterwards."""
    known = module in _roots
    parts = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)
             and not any(isinstance(hook, (_Before, _After, LossHook)) for hook in m._forward_hooks.values())]
    for part in parts:
        _put(part, 0)
    try:
        yield
    finally:
        for part in parts:
            _remove(part)
        if not known:
            _roots.discard(module)


def batch_axis_of(module: nn.Module) -> int:
    """The batch axis under which a module was extended; 0 if it was not."""
    return next((hook.batch_axis for hook in module._forward_hooks.values() if isinstance(hook, _After)), 0)


def check_hookable(module: nn.Module) -> None:
    """Errors: `NNJError` for a compiled or scripted module."""
    if hasattr(module, "_torchdynamo_orig_callable") or type(module).__name__ == "OptimizedModule":
        raise NNJError("a compiled module has no calls of layers to hook. Extend the model that was given to "
                       "torch.compile, and collect with that one (model._orig_mod)")
    if isinstance(module, torch.jit.ScriptModule):
        raise NNJError("a scripted module has no calls of layers to hook. Extend the module before torch.jit.script")


def _put(module: nn.Module, batch_axis: int) -> None:
    _remove(module)
    if _is_leaf_of_torch(module):
        module.register_forward_hook(_AfterLeaf(batch_axis), with_kwargs=True, prepend=True)
        return
    module.register_forward_pre_hook(_Before(_may_be_layer(module)), with_kwargs=True)
    module.register_forward_hook(_After(batch_axis), with_kwargs=True, prepend=True, always_call=True)


def _remove(module: nn.Module) -> None:
    tables = ((module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
              (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)))
    for hooks, flags in tables:
        for key in [key for key, hook in hooks.items() if isinstance(hook, (_Before, _After, LossHook))]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)
