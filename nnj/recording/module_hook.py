"""The hook manager: extend() and retract(), and the record of one call of one module.

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

from nnj.recording.records import MARK, RECORD, CallMark, Edge, edge_of, inert, note, tensors, write
from nnj.registry.layer_rules import RuleLookup
from nnj.registry.manager import manager


class _Local(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


class _Frame:
    """A call that is going on.

    Attributes:
        x, edge, version: the only argument, before anything in place changes it, if a record may be
            made of the call.
        given: the arguments of an outermost call.
        python: the call in Python that this stands for.
    """

    __slots__ = ("edge", "given", "module", "python", "version", "x")

    def __init__(
        self,
        module: nn.Module,
        given: Sequence[Any],
        layer: bool,
        outermost: bool,
        python: FrameType,
    ):
        self.module, self.python = module, python
        x = given[0] if layer and len(given) == 1 else None
        self.x = x if isinstance(x, Tensor) else None
        self.edge, self.version = (
            (None, 0) if self.x is None else (edge_of(self.x), self.x._version)
        )
        self.given = tensors(list(given)) if outermost else []


_local = _Local()
_order = itertools.count()
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def extended_roots() -> list[nn.Module]:
    """The modules that were given to `extend` and are still alive."""
    return list(_roots)


class _Before:
    """Forward pre-hook: takes the edge of the input before an in-place layer changes it. Comes last
    of all pre-hooks.

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
        frames.append(
            _Frame(
                module,
                [*args, *kwargs.values()] if kwargs else args,
                self.layer,
                not frames,
                python,
            )
        )


class _After:
    """Forward hook: stores the record on the output. Comes first of all hooks; called also when
    forward raises.
    """

    def __init__(self, batch_axis: int):
        self.batch_axis, self.known = batch_axis, RuleLookup()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
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

    def _record(
        self, module: nn.Module, x: Tensor, edge: Edge | None, version: int, y: Tensor
    ) -> None:
        node = y.grad_fn
        if not _sees_forward(module) or (y is x and edge is not None and edge[0] is node):
            return  # in the latter case nothing was computed
        entry = self.known.rule(module)
        if entry is not None and (entry.key is not nn.Module or is_leaf_layer(module)):
            write(node, (RECORD, y.output_nr), note(module, entry, x, version, edge, y))


class _AfterLeaf(_After):
    """The only hook of a layer of torch that has no parts and does not work in place: all is still
    there after the call.

    torch runs a hook before the call, and one that is always called, at a price that a small
    network would feel."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if inert() or output is None:
            return
        frames = _local.frames
        if frames:
            _drop_finished(frames, sys._getframe(1))
        given = [*args, *kwargs.values()] if kwargs else args
        x = given[0] if len(given) == 1 else None
        # In place after all, since `inplace` was set later, or `forward` replaced: autograd's nodes
        # know what happened.
        there = isinstance(output, Tensor) and output.grad_fn is not None and output is not x
        if isinstance(x, Tensor) and there and "forward" not in module.__dict__:
            self._record(module, x, edge_of(x), x._version, output)
        if not frames:
            self._mark(module, tensors(list(given)), output)


def _sees_forward(module: nn.Module) -> bool:
    """Whether what our hooks see is what `forward` takes and gives: no other hook stands
    between.
    """
    if torch_module._global_forward_hooks:
        return False
    own = module.__dict__
    after, before = own["_forward_hooks"], own["_forward_pre_hooks"]
    first = next(iter(after.values()))
    if isinstance(first, _AfterLeaf) or len(after) == len(before) == 1:
        return isinstance(first, _After)
    return isinstance(first, _After) and isinstance(next(reversed(before.values())), _Before)


def is_leaf_layer(module: nn.Module) -> bool:
    """The fallback is for layers with parameters whose parts have no rules: else autograd's nodes
    and they do better.
    """
    return not _has_known_part(module) and next(module.parameters(), None) is not None


def _has_known_part(module: nn.Module) -> bool:
    """Whether a layer with a rule of its own, and with parameters, is inside. It mostly is the
    first that is looked at.
    """
    for part in module._modules.values():
        if part is None:
            continue
        entry = manager().find("layer", type(part))
        known = entry is not None and entry.key is not nn.Module
        if (known and next(part.parameters(), None) is not None) or _has_known_part(part):
            return True
    return False


def _drop_finished(frames: list[_Frame], python: FrameType) -> None:
    """Forget calls that ended without a word (an interrupt by the keyboard): they are no callers of
    this one.
    """
    while frames:
        caller: FrameType | None = python
        last = frames[-1].python
        while caller is not None and caller is not last:
            caller = caller.f_back
        if caller is not None:
            return
        frames.pop()
