"""What a loss was when it was called: the options and tensors of torch's own, and for all others
copies of what they may change, on which they can be read again.
"""

from __future__ import annotations

import functools
import random
import threading
import types
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import loss as torch_losses
from torch.nn.modules import module as torch_module

from nnj.recording.records import LossCall, is_changed, layer_state
from nnj.registry.loss_rules import FunctionLoss

_FUNCTIONS = ("torch.nn.functional", "torch._C._nn")
_KEPT = set(nn.Module().__dict__)  # the tables of a module, of which only that of buffers is copied
_DEPTH = 8  # of containers in containers
_ENTRIES = 2**20  # of a tensor that is no buffer, above which it is taken for data, and not copied


def is_torchs_own(loss: nn.Module) -> bool:
    """Whether a loss computes what its options and tensors say, and changes none of them: one of
    torch's, or one of its functions.
    """
    if isinstance(loss, FunctionLoss):
        function = loss.function
        return (
            isinstance(function, (types.FunctionType, types.BuiltinFunctionType))
            and function.__module__ in _FUNCTIONS
        )
    own = loss.__dict__
    return (
        type(loss).__module__ == torch_losses.__name__
        and "forward" not in own
        and "distance_function" not in own  # of TripletMarginWithDistanceLoss: a user's
        and not own["_modules"]
    )


def state_of(loss: nn.Module) -> list[Any] | None:
    """The options and tensors of a loss of torch, which say all of it; None where they do not, or
    where other hooks than ours stand between.
    """
    own = loss.__dict__
    if (
        len(own["_forward_hooks"]) > 1
        or own["_forward_pre_hooks"]
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or not is_torchs_own(loss)
    ):
        return None
    return [] if isinstance(loss, FunctionLoss) else layer_state(loss)


def is_as_it_was(loss: nn.Module, state: list[Any] | None) -> bool:
    """Whether `state_of` was known, and is the same still."""
    if state is None or not is_torchs_own(loss):
        return False
    return isinstance(loss, FunctionLoss) or not is_changed(state, loss)


class Copies:
    """Copies of the buffers and attributes of a loss, of its parts, and of what a function holds.

    Parameters, large tensors that are no buffers, and objects of other classes are not copied."""

    def __init__(self, loss: nn.Module):
        self._cells: list[types.CellType] = []
        self._tables: list[MutableMapping[str, Any]] = []
        self._find(loss)
        self._contents = [_copied(cell.cell_contents) for cell in self._cells]
        self._copies = [_copied_table(table) for table in self._tables]

    def _find(self, holder: Any) -> None:
        """All tables and cells in which a loss may keep a state."""
        if isinstance(holder, nn.Module):
            for part in holder.modules():
                if isinstance(part, FunctionLoss):
                    self._find(part.function)
                else:
                    self._tables.append(part.__dict__)
        elif isinstance(holder, functools.partial):
            self._find(holder.func)
        elif isinstance(holder, types.MethodType):
            self._find(holder.__self__)
        elif isinstance(holder, types.FunctionType):
            self._tables.append(holder.__dict__)
            for cell in holder.__closure__ or ():
                self._find_in_cell(cell)
        elif not isinstance(holder, type) and isinstance(vars_of(holder), dict):
            self._tables.append(vars_of(holder))

    def _find_in_cell(self, cell: types.CellType) -> None:
        try:
            held = cell.cell_contents
        except ValueError:  # it is empty
            return
        self._cells.append(cell)
        if isinstance(held, nn.Module) and not any(p.requires_grad for p in held.parameters()):
            self._find(held)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The loss as it was, in copies of the copies; afterwards it has again what it has now."""
        tables = [dict(table) for table in self._tables]
        cells = [cell.cell_contents for cell in self._cells]
        try:
            for table, copy in zip(self._tables, self._copies, strict=True):
                _replace(table, _copied_table(copy))
            for cell, content in zip(self._cells, self._contents, strict=True):
                cell.cell_contents = _copied(content)
            yield
        finally:
            for table, now in zip(self._tables, tables, strict=True):
                _replace(table, now)
            for cell, now in zip(self._cells, cells, strict=True):
                cell.cell_contents = now


@contextmanager
def as_called(call: LossCall) -> Iterator[None]:
    """The loss as it was before the call, in copies: what it draws, counts and keeps while it is
    read again is forgotten afterwards.
    """
    if call.state is not None:  # one of torch's, which changes nothing
        yield
        return
    with _reading(call.copies, call.value.device):
        yield


@contextmanager
def unmoved(loss: nn.Module, device: torch.device) -> Iterator[None]:
    """The loss in copies of what it is now: what it draws, counts and keeps is forgotten."""
    with _reading(Copies(loss), device):
        yield


@contextmanager
def _reading(copies: Copies | None, device: torch.device) -> Iterator[None]:
    generators = nullcontext() if is_reading() else generators_kept(device)
    with generators, nullcontext() if copies is None else copies.in_place():
        _readings.going_on += 1
        try:
            yield
        finally:
            _readings.going_on -= 1


class _Readings(threading.local):
    """How many readings are going on in this thread."""

    going_on = 0


_readings = _Readings()


def is_reading() -> bool:
    """Whether a loss is read again: what it calls is not called by the user."""
    return _readings.going_on > 0


def vars_of(holder: Any) -> Any:
    """The attributes of an object; None if it has no table of them."""
    return getattr(holder, "__dict__", None)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Torch's and Python's generators are afterwards where they were."""
    python = random.getstate()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(python)


def _replace(table: MutableMapping[str, Any], by: dict[str, Any]) -> None:
    table.clear()
    table.update(by)


def _copied_table(table: MutableMapping[str, Any]) -> dict[str, Any]:
    copies = {
        name: value if name in _KEPT else _copied(value)
        for name, value in table.items()
        if name != "_buffers"
    }
    if "_buffers" in table:
        copies["_buffers"] = {
            name: t if t is None else t.detach().clone() for name, t in table["_buffers"].items()
        }
    return copies


def _copied(value: Any, depth: int = 0) -> Any:
    """A copy of a tensor, and of containers of such. Without its graph, which would be kept as long
    as that of the call.
    """
    if isinstance(value, Tensor):
        if value.is_leaf and (value.requires_grad or value.numel() > _ENTRIES):
            return value
        return value.detach().clone()
    cls = type(value)
    if depth == _DEPTH or cls not in (list, tuple, dict, set, deque):
        return value
    if cls is dict:
        return {k: _copied(v, depth + 1) for k, v in value.items()}
    if cls is deque:
        return deque((_copied(v, depth + 1) for v in value), value.maxlen)
    return cls(_copied(v, depth + 1) for v in value)
