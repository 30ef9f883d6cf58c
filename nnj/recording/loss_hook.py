"""The hooks of a loss: they keep what the loss was given and what it was, and tell `listeners` when
the gradient of its value arrives.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_flatten

from nnj.recording.hook import Hook, drop_finished
from nnj.recording.loss_state import Copies, is_reading, state_of
from nnj.recording.records import LOSS, MARK, RECORD, LossCall, edge_of, inert, tensors, write
from nnj.registry.loss_rules import name_of, signature_of

# Each is called with the call of a loss and the gradient of its value, when that gradient arrives
# in a backward pass, before any node of the model has run. nnj.collecting.collect adds itself here.
listeners: list[Callable[[LossCall, Tensor], None]] = []


class _Frame:
    """A call of a loss that is going on.

    Attributes:
        copies: what it was before.
        inner: the calls of other losses in it, and autograd's nodes of their values.
        python: the frame of Python that called the loss.
    """

    __slots__ = ("copies", "inner", "module", "python")

    def __init__(self, module: nn.Module, python: FrameType):
        self.module, self.python = module, python
        self.copies, self.inner = Copies(module), list[tuple[LossCall, Any]]()


class _Frames(threading.local):
    """The calls of losses that are going on in this thread, outermost first."""

    def __init__(self) -> None:
        self.open: list[_Frame] = []


_frames = _Frames()


class BeforeLoss(Hook):
    """Forward pre-hook of a loss that is none of torch's own: keeps what it was before the call.
    Comes last of all pre-hooks.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin(module, sys._getframe(1))


class LossHook(Hook):
    """Forward hook of a loss: puts a hook on its value, which autograd calls with the value's
    gradient.

    That is before any node of the model has run, so every saved tensor is there; the gradient is
    the scale of the loss in the scalar. A loss that was called in another one is part of that."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> None:
        if is_reading():
            return
        frame = _ended(module) if _frames.open else None
        if inert() or not isinstance(value, Tensor) or value.grad_fn is None:
            _pass_on(frame)
            return
        call = _note(module, args, kwargs, value)
        if frame is not None:
            _replace(frame, call)
        if _frames.open:
            _drop_finished(sys._getframe(1))
        if _frames.open:
            _frames.open[-1].inner.append((call, value.grad_fn))


def begin(module: nn.Module, python: FrameType) -> None:
    """A call of what is a loss, or may turn out to be one, begins."""
    if inert() or is_reading():
        return
    _drop_finished(python)
    _frames.open.append(_Frame(module, python))


def end(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], value: Any) -> None:
    """A call has ended of what is a loss if it was given outputs of an extended model, and made a
    scalar of them in which there is more than the losses that it has called.
    """
    frame = _ended(module) if _frames.open else None
    if frame is None:
        return
    given = [t for t in tensors([*args, *kwargs.values()]) if t.grad_fn is not None]
    if (
        inert()
        or not isinstance(value, Tensor)
        or value.dim() > 0
        or value.grad_fn is None
        or not _is_of_a_model([t.grad_fn for t in given])
        or not _leads_past(value.grad_fn, given, [node for _, node in frame.inner])
    ):
        _pass_on(frame)
        return
    call = _note(module, args, kwargs, value)
    _replace(frame, call)
    if _frames.open:
        _frames.open[-1].inner.append((call, value.grad_fn))


def is_open(module: nn.Module) -> bool:
    """Whether the innermost call that has begun is one of the module."""
    return bool(_frames.open) and _frames.open[-1].module is module


def _replace(frame: _Frame, call: LossCall) -> None:
    """The call of a loss stands for those of the losses that it has called."""
    call.copies = frame.copies
    for part, _ in frame.inner:
        part.counts = False


def _pass_on(frame: _Frame | None) -> None:
    """What is no loss has called losses: they are part of the loss that has called it, if any."""
    if frame is not None and _frames.open:
        _frames.open[-1].inner += frame.inner


def _is_of_a_model(nodes: Sequence[Any]) -> bool:
    """Whether what nodes have made comes from a call of an extended module."""
    return any(
        isinstance(key, tuple) and key[0] in (RECORD, MARK)
        for node in _below(nodes, set())
        for key in node.metadata
    )


def _leads_past(node: Any, given: Sequence[Tensor], inner: Sequence[Any]) -> bool:
    """Whether a value depends on what a module was given otherwise than through the losses inside
    it.
    """
    ends = {t.grad_fn for t in given}
    return any(n in ends for n in _below([node], set(inner)))


def _below(nodes: Sequence[Any], stop: set[Any]) -> Iterator[Any]:
    """The nodes that lead to some, and these themselves, but for what is behind `stop`."""
    stack, met = list(nodes), set(stop)
    while stack:
        node = stack.pop()
        if node is not None and node not in met:
            met.add(node)
            yield node
            stack += [child for child, _ in node.next_functions]


def _note(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], value: Tensor
) -> LossCall:
    """Keep what a loss was given, and wait for the gradient of its value."""
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
        value.output_nr,
        state_of(module),
        autocast_of(value),
    )

    # a function in Python dies with its output in older torch, if the value does not depend on it
    made = [leaves[i] for i in outputs if isinstance(leaves[i].grad_fn, BackwardCFunction)]

    def arrived(scale: Tensor, _: list[Tensor] = made) -> None:
        if call.counts:
            for listener in listeners:
                listener(call, scale)

    value.register_hook(arrived)
    write(value.grad_fn, (LOSS, value.output_nr), call)
    return call


def autocast_of(t: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts on the device of t; None where it is off."""
    kind = t.device.type
    if not torch.amp.is_autocast_available(kind):  # as on "meta"
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _ended(module: nn.Module) -> _Frame | None:
    """The frame of a call that has ended; frames above it belong to calls that raised."""
    frames = _frames.open
    for i in reversed(range(len(frames))):
        if frames[i].module is module:
            frame = frames[i]
            del frames[i:]
            return frame
    return None


def _drop_finished(python: FrameType) -> None:
    """Forget the calls of losses that raised."""
    if not torch.compiler.is_compiling():  # to older torch the frames are without end
        drop_finished(_frames.open, python)


def _arguments(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Any], Any]:
    """All that a loss was given, flattened, with the structure to put it together again
    (None: these are the arguments).
    """
    if not kwargs and all(isinstance(a, Tensor) for a in args):
        return list(args), None
    bound = signature_of(module).bind(*args, **kwargs)
    return tree_flatten((list(bound.args), dict(bound.kwargs)))
