"""What ranks have of one place, made one tree on one of them: two by two, in the order of ranks, so
that nobody holds more than two at a time, and each rank sends once at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnj.distributed.packing import Slot, filled, form_of, slots_of, tensors_of
from nnj.distributed.ranks import Ranks, count_sent
from nnj.errors import NNJError


@dataclass(frozen=True)
class _Failed:
    """In the place of a tree: some could not be merged."""


class Merging:
    """The trees of one place.

    Args:
        merge: makes one tree of two, of which the first is of earlier ranks.
        device: where trees are to be.

    Attributes:
        error: what `merge` has raised on this rank, if it did.
    """

    def __init__(self, ranks: Ranks, merge: Callable[[Any, Any], Any], device: torch.device):
        self._ranks, self._merge, self._device = ranks, merge, device
        self.error: NNJError | None = None

    def on(self, owner: int, there: Sequence[int], mine: Any) -> Any:
        """All trees as one, on the owner; None on others, and where `merge` has raised on any.

        Args:
            owner: a rank, which need not have a tree.
            there: the ranks that have one, in order.
            mine: that of this rank, None if it has none.
        """
        root, rank = owner if owner in there else there[0], self._ranks.rank
        steps = _transfers(there, root)
        for source, target in steps if root == owner else [*steps, (root, owner)]:
            if rank == source:
                self._send(mine, target)
                mine = None
            elif rank == target:
                given = self._received(source)
                pair = (given, mine) if source < target else (mine, given)
                mine = given if mine is None else self._of_two(*pair)
        return None if isinstance(mine, _Failed) else mine

    def to_all(self, owner: int, tree: Any) -> Any:
        """On all ranks what the owner has, be it None."""
        group, source = self._ranks.group, self._number(owner)
        said, is_owner = [form_of(tree)], self._ranks.rank == owner
        with self._ranks.together():
            dist.broadcast_object_list(said, source, group=group)
            given = self._carried(tree) if is_owner else self._empty(said[0])
            for row in _rows(given):
                dist.broadcast(row, source, group=group)
        if is_owner:
            count_sent((self._ranks.size - 1) * sum(t.nbytes for t in given))
            return tree
        return filled(said[0], [t.to(self._device) for t in given])

    def _of_two(self, one: Any, other: Any) -> Any:
        if isinstance(one, _Failed) or isinstance(other, _Failed):
            return _Failed()
        try:
            return self._merge(one, other)
        except NNJError as refused:
            self.error = refused
            return _Failed()

    def _send(self, tree: Any, target: int) -> None:
        group, to, given = self._ranks.group, self._number(target), self._carried(tree)
        with self._ranks.together():
            dist.send_object_list([form_of(tree)], to, group=group)
            for row in _rows(given):
                dist.send(row, to, group=group)
        count_sent(sum(t.nbytes for t in given))

    def _received(self, source: int) -> Any:
        group, place, said = self._ranks.group, self._number(source), list[Any]([None])
        with self._ranks.together():
            dist.recv_object_list(said, place, group=group)
            found = self._empty(said[0])
            for row in _rows(found):
                dist.recv(row, place, group=group)
        return filled(said[0], [t.to(self._device) for t in found])

    def _carried(self, tree: Any) -> list[Tensor]:
        """The tensors of a tree as the group can take them."""
        return [self._ranks.carried(t.detach()).contiguous() for t in tensors_of(tree)]

    def _empty(self, form: Any) -> list[Tensor]:
        """Room for the tensors of a tree, where the group can take them."""

        def room(slot: Slot) -> Tensor:
            like = torch.empty(0, dtype=slot.dtype, device=self._device)
            return self._ranks.carried(like).new_empty(slot.shape)

        return [room(slot) for slot in slots_of(form)]

    def _number(self, rank: int) -> int:
        """A rank of the group among all processes."""
        return dist.get_global_rank(self._ranks.group, rank)


def _transfers(ranks: Sequence[int], root: int) -> list[tuple[int, int]]:
    """Who hands over to whom, so that all comes to the root: each time all that is left of one half
    of some neighbours to that of the other.
    """
    if len(ranks) == 1:
        return []
    halves = ranks[: len(ranks) // 2], ranks[len(ranks) // 2 :]
    left, right = (root if root in half else half[0] for half in halves)
    last = (right, left) if root == left else (left, right)
    return [*_transfers(halves[0], left), *_transfers(halves[1], right), last]


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The memory of tensors that are contiguous, as bytes: any dtype can be sent so."""
    return [t.reshape(-1).view(torch.uint8) for t in tensors if t.numel()]
