"""With which parameters a model was called, and where their numbers were.

`torch.func.functional_call` puts others in their places for one call, and `p.data = ...` gives them
other numbers without moving a version: neither leaves a trace on autograd's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnj.recording.tensor_parallel import is_pending

Table = dict[str, Tensor | None]  # the own parameters of a module, by name


class Replaced(NamedTuple):
    """A parameter in whose place another tensor was when its module was called."""

    module: nn.Module
    name: str
    now: Tensor


class PartCalls:
    """What is noted of the parts of a model while it runs.

    Attributes:
        tables: the own parameters with which parts were called without a record. Each table once
            that is another than the one before: a cell may be called at every step.
        recorded: the layers without parts that were called with a record, which says with what
            (`records.layer_state`).
    """

    __slots__ = ("recorded", "tables")

    def __init__(self) -> None:
        self.tables: dict[nn.Module, list[Table]] = {}
        self.recorded: set[nn.Module] = set()

    def note(self, part: nn.Module) -> None:
        """A call of which there is no record."""
        own = part._parameters
        if own or part._buffers:
            seen = self.tables.setdefault(part, [])
            if not seen or any(seen[-1].get(name) is not t for name, t in own.items()):
                seen.append({**own})


class CalledWith:
    """What a model was called with, beside what records say.

    Args:
        parts: what was noted of parts of it during the call.
    """

    __slots__ = ("_data", "_tables")

    def __init__(self, model: nn.Module, parts: PartCalls):
        self._tables: list[tuple[nn.Module, Table]] = []
        self._data: list[tuple[Tensor, Tensor]] = []  # each with another tensor on the same numbers
        left, met = [model], parts.recorded - parts.tables.keys()
        if model in met:
            return
        while left:
            module = left.pop()
            own = module.__dict__
            if own["_parameters"] or own["_buffers"]:
                self._note(module)
            if own["_modules"]:
                more = [m for m in own["_modules"].values() if m is not None and m not in met]
                met.update(more)
                left += more
        if parts.tables:
            self._tables += [(m, table) for m, tables in parts.tables.items() for table in tables]

    def _note(self, module: nn.Module) -> None:
        """The own parameters of a module, and where they and its buffers are."""
        params, buffers = module._parameters, module._buffers
        if not isinstance(params, dict):
            return  # scripted: nothing can stand in for its parameters
        if params:
            self._tables.append((module, {**params}))
        for table, kind in ((params, nn.Parameter), (buffers, Tensor)):
            for t in table.values():
                # of a subclass nobody knows what it answers
                if t is not None and type(t) is kind:
                    self._data.append((t, t.data))

    def replaced(self) -> Iterator[Replaced]:
        """The parameters in whose place others were in the call."""
        for module, table in self._tables:
            own = module._parameters
            for name, then in table.items():
                now = own.get(name)
                if now is then or now is None or then is None:
                    continue
                if is_plain(then):  # between calls, the parameters of sharded models are others
                    yield Replaced(module, name, now)

    def moved(self) -> set[Tensor]:
        """The parameters and buffers that have other data now than in the call, with other numbers
        in it: `flatten_parameters` of a recurrent layer moves them as they are.
        """
        return {t for t, then in self._data if is_moved(t.detach(), then)}


def is_plain(t: Tensor) -> bool:
    """Whether the numbers of a tensor are its own, in one shape: no nested one, and none of a class
    that hands them out, such as a DTensor.
    """
    kind = type(t)
    own = kind is Tensor or kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    own = own or is_pending(t)
    return own and not t.is_nested


def is_moved(now: Tensor, then: Tensor) -> bool:
    """Whether a tensor has other data than then, with other numbers in it. `then` holds the former
    data, so that no others have come to their place in memory.
    """
    return not is_same_place(now, then) and not _same_numbers(now, then)


def is_same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, seen in the same way; of sparse ones
    nobody knows.
    """
    return one.layout is not torch.strided or (
        one.data_ptr() == other.data_ptr()
        and one.stride() == other.stride()
        and one.shape == other.shape
    )


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
