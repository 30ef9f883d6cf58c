"""Sums that the ranks of a sharded model put together while columns still walk: what a rank holds
of a result is then its part, not all of it until the pass ends.

A term waits until there are enough of them, and all ranks have one of the same place; which term of
a rank meets which of another does not matter to their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nnj.collecting.over_ranks import Places, shared_out
from nnj.collecting.quantity import Holder, added
from nnj.collecting.request import Request
from nnj.distributed.packing import form_of, tensors_of
from nnj.distributed.ranks import Ranks
from nnj.distributed.rounds import Rounds
from nnj.recording.sharded import Sharding

Place = tuple[Request, str, Holder]


class Shares:
    """The sums of one pass.

    Args:
        requests: in an order that is the same on all ranks, each with whether what this rank has
            counts; else its terms are zero.
    """

    def __init__(self, requests: Mapping[Request, bool]):
        self._requests = list(requests)
        self._counts = requests
        self._waiting: dict[str, tuple[Place, Any]] = {}  # by what ranks call the place
        self._shared: dict[Place, Any] = {}

    def begin(self, sharding: Sharding, ranks: Ranks, rounds: Rounds) -> None:
        """Take in terms of a loss, until the next one."""
        self._sharding, self._ranks, self._rounds = sharding, ranks, rounds
        self._sharded: dict[Any, Holder] = {**sharding.sharded}
        self._places = Places(sharding.models, sharding)

    def take(self, request: Request, name: str, holder: Holder, state: Any, sign: int = 1) -> None:
        """Take in `sign` times a term. Others take part in rounds meanwhile."""
        if not self._counts[request]:
            state = tree_map_only(Tensor, torch.zeros_like, state)
        elif sign != 1:
            state = tree_map_only(Tensor, lambda t: sign * t, state)
        holder = self._sharded.get(holder, holder)
        key = "\n".join((str(self._requests.index(request)), name, self._places.name(holder)))
        if key in self._waiting:
            state = added(self._waiting[key][1], state)
        self._waiting[key] = (request, name, holder), state
        self._rounds.offer()

    @property
    def room(self) -> float:
        """Bytes that a rank may take for a while beside the units that are whole."""
        return 2 * self._sharding.largest

    # -- of all ranks ------------------------------------------------------------------------------

    def size(self) -> int:
        """The bytes of what waits."""
        return sum(t.nbytes for _, state in self._waiting.values() for t in tensors_of(state))

    def share(self) -> None:
        """Put together what waits on all ranks."""
        notes = self._ranks.notes(
            {key: form_of(state) for key, (_, state) in self._waiting.items()}
        )
        for key, form in notes[0].items():
            if any(key not in said or said[key] != form for said in notes):
                continue
            place, state = self._waiting.pop(key)
            part = shared_out(state, self._sharding.like(place[2]), self._ranks)
            there = self._shared.get(place)
            self._shared[place] = part if there is None else added(there, part)

    # -- when the pass ends ------------------------------------------------------------------------

    def waiting(self, request: Request) -> dict[str, dict[Holder, Any]]:
        """What was not put together, by quantity and place."""
        return _of(request, dict(self._waiting.values()))

    def shared(self, request: Request) -> dict[str, dict[Holder, Any]]:
        """What was."""
        return _of(request, self._shared)


def _of(request: Request, every: Mapping[Place, Any]) -> dict[str, dict[Holder, Any]]:
    found: dict[str, dict[Holder, Any]] = {}
    for (asked, name, holder), state in every.items():
        if asked is request:
            found.setdefault(name, {})[holder] = state
    return found
