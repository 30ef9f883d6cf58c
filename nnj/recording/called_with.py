"""With which parameters a model was called, and where their numbers were.

`torch.func.functional_call` puts others in their places for one call, and `p.data = ...` gives them
other numbers without moving a version: neither leaves a trace on autograd's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnj.recording.scope import modules_of

Table = dict[str, Tensor | None]  # the own parameters of a module, by name


class Replaced(NamedTuple):
    """A parameter in whose place another tensor was when its module was called."""

    module: nn.Module
    name: str
    now: Tensor


class PartCalls:
    """The own parameters with which parts of a model are called while it runs.

    Each table once that is another than the one before: a cell may be called at every step."""

    __slots__ = ("tables",)

    def __init__(self) -> None:
        self.tables: dict[nn.Module, list[Table]] = {}

    def note(self, part: nn.Module) -> None:
        own = part._parameters
        if own:
            seen = self.tables.setdefault(part, [])
            if not seen or any(seen[-1].get(name) is not t for name, t in own.items()):
                seen.append({**own})


class CalledWith:
    """What a model was called with.

    Args:
        parts: what was noted of parts of it during the call.
    """

    __slots__ = ("_data", "_tables")

    def __init__(self, model: nn.Module, parts: PartCalls | None):
        self._tables: list[tuple[nn.Module, Table]] = []
        self._data: list[tuple[Tensor, Tensor]] = []  # each with another tensor on the same numbers
        for module in modules_of(model):
            own = module.__dict__
            if not isinstance(own["_parameters"], dict):
                continue  # scripted: nothing can stand in for its parameters
            if own["_parameters"]:
                table = own["_parameters"].copy()
                self._tables.append((module, table))
                self._hold(table, nn.Parameter)
            if own["_buffers"]:
                self._hold(own["_buffers"], Tensor)
        if parts is not None:
            self._tables += [(m, table) for m, tables in parts.tables.items() for table in tables]

    def _hold(self, table: Table, kind: type) -> None:
        for t in table.values():
            # of a subclass nobody knows what it answers
            if t is not None and type(t) is kind and t.layout is torch.strided:
                self._data.append((t, t.data))

    def replaced(self) -> Iterator[Replaced]:
        """The parameters in whose place others were in the call."""
        for module, table in self._tables:
            own = module._parameters
            for name, then in table.items():
                now = own.get(name)
                if now is not then and now is not None and then is not None:
                    yield Replaced(module, name, now)

    def moved(self) -> set[Tensor]:
        """The parameters and buffers that have other data now than in the call, with other numbers
        in it: `flatten_parameters` of a recurrent layer moves them as they are.
        """
        elsewhere = [(t, then) for t, then in self._data if not _same_place(t, then)]
        return {t for t, then in elsewhere if not _same_numbers(t.detach(), then)}


def _same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, seen in the same way."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.stride() == other.stride()
        and one.shape == other.shape
    )


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
