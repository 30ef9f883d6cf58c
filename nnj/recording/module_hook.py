"""The hooks of a module: they write a record of each of its calls on autograd's graph.

A record lives in the metadata of the autograd node that made the module's output, so it lives
exactly as long as the graph. Nothing is stored on modules or parameters, and nothing happens where
no graph is made."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from nnj.recording import loss_hook
from nnj.recording.called_with import CalledWith, PartCalls, is_plain
from nnj.recording.hook import Hook, drop_finished
from nnj.recording.records import (
    MARK,
    CallMark,
    Edge,
    edge_of,
    inert,
    tensors,
    write,
    write_part,
    write_record,
)
from nnj.recording.tensor_parallel import is_distributed
from nnj.recording.wrappers import engine_of_call, wrapper_of_call
from nnj.registry.layer_rules import RuleLookup, find_rule
from nnj.registry.manager import manager

# The modules that were given to `extend` (or are copies of such) and are still alive, in order.
EXTENDED: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()


def extended_roots() -> list[nn.Module]:
    """The modules that were given to `extend` and are still alive, in the order of the calls."""
    return list(EXTENDED)


class _Calls(threading.local):
    """The calls that are going on in this thread, outermost first."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


class _Frame:
    """A call that is going on.

    Attributes:
        x, edge, version: the only argument, before anything in place changes it, if a record may be
            made of the call.
        given: the arguments of an outermost call.
        parts: what is noted of the calls in it, if it is an outermost call.
        hooks: how many hooks had been registered in this process before it.
        python: the frame of Python that called the module.
    """

    __slots__ = ("edge", "given", "hooks", "module", "parts", "python", "version", "x")

    def __init__(
        self,
        module: nn.Module,
        given: Sequence[Any],
        layer: bool,
        outermost: bool,
        python: FrameType,
    ):
        self.module, self.python, self.hooks = module, python, RemovableHandle.next_id
        x = given[0] if layer and len(given) == 1 else None
        self.x = x if isinstance(x, Tensor) else None
        self.edge, self.version = (
            (None, 0) if self.x is None else (edge_of(self.x), self.x._version)
        )
        self.given = tensors(list(given)) if outermost else []
        self.parts = PartCalls() if outermost else None


_calls = _Calls()
_order = itertools.count()  # of outermost calls


class BeforeCall(Hook):
    """Forward pre-hook: takes the edge of the input before an in-place layer changes it. Comes last
    of all pre-hooks.

    Args:
        layer: whether a rule may describe the call. A module that only contains such layers leaves
            a mark of its call, and no record.
        loss: whether the call may be that of a loss: "alone" if only where no other module has
            called it, "always" if losses are inside.
    """

    def __init__(self, layer: bool, loss: str = ""):
        self.layer, self.loss = layer, loss

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if inert():
            return
        frames, python = _calls.frames, sys._getframe(1)
        drop_finished(frames, python)
        if (
            self.loss
            and (not frames or self.loss == "always")
            and any(t.grad_fn is not None for t in tensors([*args, *kwargs.values()]))
        ):
            loss_hook.begin(module, python)
        frames.append(
            _Frame(
                module,
                [*args, *kwargs.values()] if kwargs else args,
                self.layer,
                not frames,
                python,
            )
        )


class AfterCall(Hook):
    """Forward hook: stores the record on the output. Comes first of all hooks; called also when
    forward raises.
    """

    def __init__(self, batch_axis: int):
        self.batch_axis, self.known = batch_axis, RuleLookup()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        frames = _calls.frames
        while frames:  # frames above ours belong to calls that raised
            frame = frames.pop()
            if frame.module is module:
                break
        else:
            return
        if loss_hook.is_open(module):
            loss_hook.end(module, args, kwargs, output)
        if inert() or output is None:
            return
        recorded = (
            frame.x is not None
            and isinstance(output, Tensor)
            and output.grad_fn is not None
            and self._record(module, frame.x, output, (frame.edge, frame.version))
        )
        parts = (frames[0] if frames else frame).parts
        assert parts is not None
        if recorded and not module._modules:
            parts.recorded.add(module)
        elif frames:
            parts.note(module)
        if not frames:
            self._mark(module, frame.given, output, parts, frame.hooks)

    def _mark(
        self, module: nn.Module, given: list[Tensor], output: Any, parts: PartCalls, hooks: int
    ) -> None:
        """The end of an outermost call."""
        detached, with_what = [t.detach() for t in given], CalledWith(module, parts)
        around = wrapper_of_call(module), engine_of_call(sys._getframe(1))
        mark = CallMark(module, detached, self.batch_axis, next(_order), with_what, hooks, *around)
        EXTENDED[module] = None  # a copy of an extended model is known by its first call
        for t in tensors(output):
            edge = None if t.grad_fn is None else edge_of(t)
            if edge is not None:
                write(edge[0], (MARK, edge[1]), mark)

    def _record(
        self,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        before: tuple[Edge | None, int] | None = None,
    ) -> bool:
        """Whether there is a record of the call."""
        if before is not None and y is x and before[0] is not None and before[0][0] is y.grad_fn:
            return False  # the call has changed nothing
        if not (is_plain(x) and is_plain(y)):
            return self._part(module, x, y)
        if not _sees_forward(module):
            return False
        entry = self.known.rule(module)
        if entry is None or (entry.is_fallback and not is_leaf_layer(module)):
            return False
        write_record(module, entry, x, y, before)
        return True

    def _part(self, module: nn.Module, x: Tensor, y: Tensor) -> bool:
        """Whether there is a record of a layer that is distributed."""
        if not is_distributed(x) or not is_distributed(y):
            return False
        entry = find_rule(module)
        return entry is not None and not entry.is_fallback and write_part(module, entry, x, y)


class AfterLeafCall(AfterCall):
    """The only hook of a layer of torch that has no parts and does not work in place: what the
    record needs is still there after the call.

    A hook before the call, and one that is always called, cost time that a small network would
    feel."""

    @override
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if output is None or inert():
            return
        frames = _calls.frames
        if frames:
            drop_finished(frames, sys._getframe(1))
        given = [*args, *kwargs.values()] if kwargs else args
        x = given[0] if len(given) == 1 else None
        # In place after all, since `inplace` was set later, or `forward` replaced: autograd's nodes
        # know what happened.
        there = isinstance(output, Tensor) and output.grad_fn is not None and output is not x
        recorded = (
            isinstance(x, Tensor)
            and there
            and "forward" not in module.__dict__
            and self._record(module, x, output)
        )
        parts = frames[0].parts if frames else PartCalls()
        assert parts is not None
        if recorded:
            parts.recorded.add(module)
        elif frames:
            parts.note(module)
        if not frames:
            self._mark(module, tensors(list(given)), output, parts, RemovableHandle.next_id)


def _sees_forward(module: nn.Module) -> bool:
    """Whether what our hooks see is what `forward` takes and gives: no other hook stands
    between.
    """
    if torch_module._global_forward_hooks:
        return False
    own = module.__dict__
    after, before = own["_forward_hooks"], own["_forward_pre_hooks"]
    first = next(iter(after.values()))
    if isinstance(first, AfterLeafCall) or len(after) == len(before) == 1:
        return isinstance(first, AfterCall)
    return isinstance(first, AfterCall) and isinstance(next(reversed(before.values())), BeforeCall)


def is_leaf_layer(module: nn.Module) -> bool:
    """Whether the fallback may describe a module: it has parameters, and none in parts with rules,
    which do better together with autograd's nodes.
    """
    return not has_known_part(module) and next(module.parameters(), None) is not None


def has_known_part(module: nn.Module) -> bool:
    """Whether a layer with a rule of its own, and with parameters, is inside; usually the first
    child is one.
    """
    for part in module._modules.values():
        if part is None:
            continue
        entry = manager().find("layer", type(part))
        known = entry is not None and not entry.is_fallback
        if (known and next(part.parameters(), None) is not None) or has_known_part(part):
            return True
    return False
