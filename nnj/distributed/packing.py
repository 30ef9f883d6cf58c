"""Tensors of many shapes and dtypes as one row of bytes, and trees without their numbers, by which
another process puts them together again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_ALIGNED = 16  # bytes: where a tensor begins, so that its dtype can be seen there


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a tree."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Its bytes in a row, up to where the next one begins."""
        return -(-self.bytes // _ALIGNED) * _ALIGNED


def form_of(tree: Any) -> Any:
    """A tree without its numbers: a slot in the place of each tensor."""
    return tree_map_only(Tensor, lambda t: Slot(tuple(t.shape), t.dtype), tree)


def slots_of(form: Any) -> list[Slot]:
    """In the order in which `tensors_of` gives the tensors."""
    return [leaf for leaf in tree_leaves(form) if isinstance(leaf, Slot)]


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def filled(form: Any, given: Iterable[Tensor]) -> Any:
    """The tree of a form, with tensors in its slots."""
    left = iter(given)
    return tree_map(lambda leaf: next(left) if isinstance(leaf, Slot) else leaf, form)


def packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors as one row of bytes on a device."""
    slots = [Slot(tuple(t.shape), t.dtype) for t in tensors]
    row = torch.zeros(sum(slot.room for slot in slots), dtype=torch.uint8, device=device)
    at = 0
    for t, slot in zip(tensors, slots, strict=True):
        if slot.bytes:
            flat = t.detach().to(device).contiguous().reshape(-1)
            row[at : at + slot.bytes] = flat.view(torch.uint8)
        at += slot.room
    return row


def unpacked(row: Tensor, slots: Iterable[Slot]) -> Iterator[Tensor]:
    """The tensors of a row of bytes: views of it."""
    at = 0
    for slot in slots:
        yield row[at : at + slot.bytes].view(slot.dtype).reshape(slot.shape)
        at += slot.room
