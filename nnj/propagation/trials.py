"""What is tried on random numbers once for each structure, and then believed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nnj.propagation.verification import KEPT


class _Tried(NamedTuple):
    """Of one structure, what was found; the rules are held, so that none has their place."""

    rules: Sequence[object]
    right: bool


class Trials:
    """The outcomes of one kind of trial, for each model."""

    def __init__(self) -> None:
        self._by_model: WeakKeyDictionary[nn.Module, dict[Hashable, _Tried]] = WeakKeyDictionary()
        self._of_nobody: dict[Hashable, _Tried] = {}

    def answer(
        self,
        owner: nn.Module | None,
        key: Hashable,
        rules: Sequence[object],
        ask: Callable[[], bool],
    ) -> bool:
        """What `ask` finds; it is asked once for each key.

        Args:
            owner: the model with which what was found is forgotten.
            rules: whose identities are in the key.
        """
        known = self._of_nobody if owner is None else self._by_model.setdefault(owner, {})
        there = known.get(key)
        if there is None:
            while len(known) >= KEPT:
                known.pop(next(iter(known)))
            there = known[key] = _Tried(rules, ask())
        return there.right


def close(a: Tensor, b: Tensor, eps: float, size: Tensor | None = None) -> bool:
    """Whether two tensors agree to eps of the largest entry, or of a given size."""
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    size = torch.maximum(a.abs().max(), b.abs().max()) if size is None else size
    return bool((a - b).abs().max() <= eps * size)
