"""How much memory stands at once, counted in bytes of the tensors that operations make."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on, `peak` is the most bytes that stood at once in tensors made since."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and _storage(t) not in given:
                storage = t.untyped_storage()
                self._known[_storage(t)] = StorageWeakRef(storage), storage.nbytes()
        self._known = {key: kept for key, kept in self._known.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._known.values()))
        return found


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)
