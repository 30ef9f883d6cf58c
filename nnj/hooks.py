"""The hook manager: extend() and retract(), and the record of one call of one module.

A record lives in the metadata of the autograd node that made the module's output, so it lives exactly as long as the graph.
Nothing is stored on modules or parameters, and nothing happens where no graph is made.
"""
from __future__ import annotations

import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten

from nnj.errors import NNJError
from nnj.plugins import manager
from nnj.records import MARK, RECORD, CallMark, LossCall, Point, Record, edge_of, tensors, write
from nnj.rules import find_rule


class _Local(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


class _Frame:
    """A call that is going on.

    Attributes:
        edge, version: of the only argument x, before anything in place changes it.
        given: the arguments of an outermost call.
        python: the call in Python that this stands for.
    """

    __slots__ = ("edge", "given", "module", "python", "version", "x")

    def __init__(self, module: nn.Module, given: Sequence[Any], outermost: bool, python: FrameType):
        self.module, self.python = module, python
        x = given[0] if len(given) == 1 else None
        self.x = x if isinstance(x, Tensor) else None
        self.edge, self.version = (None, 0) if self.x is None else (edge_of(self.x), self.x._version)
        self.given = tensors(list(given)) if outermost else []


_local = _Local()
_order = itertools.count()
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def extended_roots() -> list[nn.Module]:
    """The modules that were given to `extend` and are still alive."""
    return list(_roots)


def _inert() -> bool:
    """Under no_grad, torch.func transforms and tracing there is no graph of ours to write on."""
    return (not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None
            or torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling())


class _Before:
    """Forward pre-hook: takes the edge of the input before an in-place layer changes it. Comes last of all pre-hooks."""

    def __init__(self, batch_axis: int):
        self.batch_axis = batch_axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _inert():
            return
        frames, python = _local.frames, sys._getframe(1)
        _drop_finished(frames, python)
        frames.append(_Frame(module, [*args, *kwargs.values()] if kwargs else args, not frames, python))


class _After:
    """Forward hook: stores the record on the output. Comes first of all hooks; called also when forward raises."""

    def __init__(self, batch_axis: int):
        self.batch_axis = batch_axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        frames = _local.frames
        while frames:  # frames above ours belong to calls that raised
            frame = frames.pop()
            if frame.module is module:
                break
        else:
            return
        if _inert() or output is None:
            return
        if frame.x is not None and isinstance(output, Tensor) and output.grad_fn is not None:
            self._record(module, frame, output)
        if not frames:
            axis, given = self.batch_axis, frame.given
            sizes = list(dict.fromkeys(t.shape[axis] for t in given if t.dim() > axis))
            mark = CallMark(module, sizes, [t.detach() for t in given], axis, next(_order))
            _roots.add(module)  # a copy of an extended model is known by its first call
            for t in tensors(output):
                if t.grad_fn is not None:
                    write(t.grad_fn, (MARK, t.output_nr), mark)

    def _record(self, module: nn.Module, frame: _Frame, y: Tensor) -> None:
        x = frame.x
        assert x is not None and y.grad_fn is not None
        if x.dim() == 0 or y.dim() == 0 or x.shape[0] != y.shape[0] or not _sees_forward(module):
            return
        if y is x and frame.edge is not None and frame.edge[0] is y.grad_fn:
            return  # nothing was computed
        entry = find_rule(module)
        if entry is None or (entry.key is nn.Module and not is_leaf_layer(module)):
            return
        x_point, y_point = Point(x, "x" in entry.uses, frame.version), Point(y, "y" in entry.uses, y._version)
        write(y.grad_fn, (RECORD, y.output_nr), Record(module, entry, x_point, y_point, frame.edge))


def _sees_forward(module: nn.Module) -> bool:
    """Whether what our hooks see is what `forward` takes and gives: no other hook stands between."""
    if torch_module._global_forward_hooks:
        return False
    if len(module._forward_hooks) == len(module._forward_pre_hooks) == 1:
        return True  # ours
    first = next(iter(module._forward_hooks.values()))
    last = next(reversed(module._forward_pre_hooks.values()))
    return isinstance(first, _After) and isinstance(last, _Before)


def is_leaf_layer(module: nn.Module) -> bool:
    """The fallback is for layers with parameters whose parts have no rules: else autograd's nodes and they do better."""
    if next(module.parameters(), None) is None:
        return False
    return all(entry is None or entry.key is nn.Module or not list(child.parameters())
               for child in module.modules() if child is not module
               for entry in [manager().find("layer", type(child))])


listeners: list[Callable[[LossCall, Tensor], None]] = []  # told when the gradient of a loss arrives; collection.py is one


class LossHook:
    """Forward hook of a loss: asks autograd to tell us when the gradient of its value arrives.

    That is before any node of the model has run, so every saved tensor is there, and the gradient is the scale.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        if _inert() or not isinstance(value, Tensor) or value.grad_fn is None:
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
    module.register_forward_pre_hook(_Before(batch_axis), with_kwargs=True)
    module.register_forward_hook(_After(batch_axis), with_kwargs=True, prepend=True, always_call=True)


def _remove(module: nn.Module) -> None:
    tables = ((module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
              (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)))
    for hooks, flags in tables:
        for key in [key for key, hook in hooks.items() if isinstance(hook, (_Before, _After, LossHook))]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)
