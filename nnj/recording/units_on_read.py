"""Units of `fully_shard` that are whole while they are read: an operation that is given a parameter
of one that is sharded makes it whole, and those sharded again that were read longest ago.

The memory of a sharded unit's parameters is freed, and to read it is a crash. So nobody is trusted
to say beforehand what is read: every operation passes by here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nnj.recording.sharded import Sharding
from nnj.recording.tensor_parallel import is_distributed, part_here

AT_ONCE = 2  # units, as FSDP has one and the next beside it

# What sees the memory of a tensor in another way without a look at it, also where it is freed.
_aten = torch.ops.aten
_READS_NOTHING = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
}


class UnitsOnRead(TorchDispatchMode):
    """While it is entered, each unit that was sharded is whole when it is read.

    Args:
        sharding: at rest.
        need: calls `gather` with the same number on all ranks.
    """

    def __init__(self, sharding: Sharding, need: Callable[[int], None]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._sharding, self._need = sharding, need
        self._whole: list[int] = []  # last read last
        self._reads: list[int] = []  # of the operation that waits
        self._busy = False
        self._units: dict[int, int] = {}
        for unit, param in sharding.asleep_params():
            self._units[_storage(part_here(param))] = unit

    def gather(self, unit: int, mine: bool) -> None:
        """Make a unit whole, with all ranks; it stays so where this one reads it."""
        self._busy = True  # FSDP itself writes to what is sharded
        try:
            stays = mine or unit in self._whole
            if unit in self._whole:  # another rank does not have it any more
                self._close(unit)
            room = AT_ONCE - 1 if stays else AT_ONCE
            for old in [u for u in self._whole if u not in self._reads]:
                if len(self._whole) > room:
                    self._close(old)
            self._sharding.open(unit)
            if stays:
                self._whole.append(unit)
            else:
                self._sharding.close(unit)
        finally:
            self._busy = False

    def close_all(self) -> None:
        """Shard again all that are whole."""
        for unit in list(self._whole):
            self._close(unit)

    def _close(self, unit: int) -> None:
        self._whole.remove(unit)
        self._sharding.close(unit)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self._busy and func not in _READS_NOTHING:
            given = (*args, *kwargs.values()) if kwargs else args
            found = (self._units.get(_storage(t)) for t in _tensors(given))
            reads = list(dict.fromkeys(unit for unit in found if unit is not None))
            if reads:
                self._read(reads)
        return func(*args, **(kwargs or {}))

    def _read(self, units: list[int]) -> None:
        self._reads = units
        for unit in units:
            if unit not in self._whole:
                # inside of vmap, what ranks say to one another is no matter of its columns
                with torch._C._DisableFuncTorch():
                    self._need(unit)
        self._reads = []
        self._whole.sort(key=units.__contains__)  # stable: those that were read last are last


def _tensors(given: Any) -> Iterator[Tensor]:
    for value in given:
        if isinstance(value, Tensor):
            if is_distributed(value):
                yield part_here(value)
            elif torch._C._has_storage(value):
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(t: Tensor) -> int:
    place: int = t.untyped_storage()._cdata
    return place
