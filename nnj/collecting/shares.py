"""What the ranks of a sharded model put together while columns still walk: what a rank holds of a
result is then its part, not all of it until the pass ends.

A term waits until there are enough of them, and all ranks have one of the same place; which term of
a rank meets which of another does not matter to their sum. What is no sum waits likewise when its
last column has come, once for each rank, and is merged by the rank that owns it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nnj.collecting.contribution import asked
from nnj.collecting.owners import owner_of
from nnj.collecting.places import Places, device_of
from nnj.collecting.quantity import Holder, Quantity, Whole, added, is_sum, is_sum_of_chunks
from nnj.collecting.request import Request
from nnj.collecting.states_over_ranks import in_parts, shared_out
from nnj.distributed.merging import Merging
from nnj.distributed.packing import form_of, tensors_of
from nnj.distributed.ranks import Ranks
from nnj.distributed.rounds import Rounds
from nnj.errors import NNJError
from nnj.graph.linearity import is_only_loss
from nnj.recording.records import LossCall
from nnj.recording.sharded import Sharding
from nnj.recording.tensor_parallel import is_distributed

Place = tuple[Request, str, Holder]


@dataclass
class OverShards:
    """How passes come together.

    Attributes:
        mean: as of `OverRanks`.
        spread: whether what modules have stays with one rank each.
        counts: whether what this rank has is taken in; else only what other ranks have is.
    """

    mean: bool = True
    spread: bool = True
    counts: bool = True


class _Waiting(NamedTuple):
    """What waits to be put together.

    Attributes:
        state: None where this rank has nothing that counts.
        bytes: of it, or of what would be in its place.
        is_term: whether it is a term of a sum.
    """

    place: Place
    state: Any
    bytes: int
    is_term: bool

    @property
    def form(self) -> Any:
        """What ranks say of it."""
        return self.is_term, None if self.state is None else form_of(self.state)


class Shares:
    """The states of one pass.

    Args:
        requests: in an order that is the same on all ranks.

    Attributes:
        error: the first that merging has raised on this rank.
    """

    def __init__(self, requests: Mapping[Request, OverShards]):
        self._requests, self._how = list(requests), requests
        self._waiting: dict[str, _Waiting] = {}  # by what ranks call the place
        self._shared: dict[Place, Any] = {}
        self.error: NNJError | None = None

    def begin(self, call: LossCall, sharding: Sharding, ranks: Ranks, rounds: Rounds) -> None:
        """Take in what a loss has, until the next one."""
        self._sharding, self._ranks, self._rounds = sharding, ranks, rounds
        self._sharded: dict[Any, Holder] = {**sharding.sharded}
        self._places = Places(sharding.models, sharding)
        every = [q for request in self._requests for q in request.quantities.values()]
        self._alone = any(map(_comes_whole, every)) and is_only_loss(call)

    def takes_whole(self, request: Request, quantity: Quantity) -> bool:
        """Whether the state of a place can be given away when its last column has come, though it
        is not a sum of terms: no other loss of the pass has a state there, with which it would have
        to come together before.
        """
        if not self._alone or request.signed or not _comes_whole(quantity):
            return False
        # else all ranks are to have it
        return is_sum(quantity) or quantity.place is Tensor or self._how[request].spread

    def take(self, request: Request, name: str, holder: Holder, state: Any, sign: int = 1) -> None:
        """Take in `sign` times a term of a sum."""
        if not self._how[request].counts:
            state = tree_map_only(Tensor, torch.zeros_like, state)
        elif sign != 1:
            state = tree_map_only(Tensor, lambda t: sign * t, state)
        self._wait(request, name, holder, state, True)

    def take_whole(self, request: Request, name: str, holder: Holder, state: Any) -> None:
        """Take in all that this rank has of a place in this pass, once."""
        if is_sum(request.quantities[name]):
            self.take(request, name, holder, state)
        else:
            self._wait(request, name, holder, state, False)

    def _wait(self, request: Request, name: str, holder: Holder, state: Any, is_term: bool) -> None:
        size = max(1, sum(_bytes_of(holder, t) for t in tensors_of(state)))
        holder = self._sharded.get(holder, holder)
        key = "\n".join((str(self._requests.index(request)), name, self._places.name(holder)))
        if not (is_term or self._how[request].counts):
            state = None
        elif key in self._waiting:
            state = added(self._waiting[key].state, state)
        self._waiting[key] = _Waiting((request, name, holder), state, size, is_term)

    def offer(self) -> None:
        """Put together what waits, if it is enough. Others take part in rounds meanwhile."""
        self._rounds.offer()

    @property
    def rank(self) -> int:
        """Which of the ranks this is over which data are split."""
        return self._ranks.rank

    @property
    def room(self) -> float:
        """Bytes that a rank may take for a while beside the units that are whole."""
        return 2 * self._sharding.largest

    # -- of all ranks ------------------------------------------------------------------------------

    def size(self) -> int:
        """The bytes of what waits."""
        return sum(waiting.bytes for waiting in self._waiting.values())

    def share(self) -> None:
        """Put together what waits on all ranks."""
        notes = self._ranks.notes({key: found.form for key, found in self._waiting.items()})
        for key, (is_term, form) in notes[0].items():
            if any(key not in said for said in notes):
                continue
            if not is_term:
                there = [rank for rank, said in enumerate(notes) if said[key][1] is not None]
                self._merge(key, there)
            elif all(said[key][1] == form for said in notes):
                self._add(*self._waiting.pop(key)[:2])

    def _add(self, place: Place, state: Any) -> None:
        """The sum over ranks of a state, each with a part of it, to those before."""
        part = shared_out(state, place[2], self._sharding, self._ranks)
        known = self._shared.get(place)
        self._shared[place] = part if known is None else added(known, part)

    def _merge(self, key: str, there: list[int]) -> None:
        """What some ranks have of a place goes to its owner, or of a parameter a part to each."""
        waiting = self._waiting.pop(key)
        (request, name, holder), mine = waiting.place, [waiting.state]
        del waiting  # with the state, which goes when it has been merged
        if not there:
            return
        merge = functools.partial(asked, name, request.quantities[name].merge)
        merging = Merging(self._ranks, merge, device_of(holder))
        owner = owner_of(holder, self._sharding.models, self._ranks)
        found = merging.on(owner, there, mine.pop())
        self.error = self.error or merging.error
        if isinstance(holder, Tensor):
            found = merging.to_all(owner, found)
            found = found if found is None else in_parts(found, holder, self._sharding)
        if found is not None:
            self._shared[request, name, holder] = found

    # -- when the pass ends ------------------------------------------------------------------------

    def waiting(self, request: Request) -> dict[str, dict[Holder, Any]]:
        """What was not put together, by quantity and place, which is with the caller then."""
        mine = [key for key, found in self._waiting.items() if found.place[0] is request]
        every = [self._waiting.pop(key) for key in mine]
        return _by_name({found.place: found.state for found in every if found.state is not None})

    def shared(self, request: Request) -> dict[str, dict[Holder, Any]]:
        """What was, likewise."""
        mine = [place for place in self._shared if place[0] is request]
        return _by_name({place: self._shared.pop(place) for place in mine})


def _comes_whole(quantity: Quantity) -> bool:
    """Whether what ranks have of a place comes together, and only when it is complete."""
    together = not quantity.per_sample and not quantity.of_rank and quantity.place is not Whole
    return together and not is_sum_of_chunks(quantity)


def _bytes_of(holder: Any, t: Tensor) -> int:
    """The bytes of a tensor at a place: at a parameter of which ranks that share a model have
    parts, what is the same on all of them, or they would not come to rounds in one order.
    """
    if not is_distributed(holder):
        return t.nbytes
    return int(holder.numel() // holder.device_mesh.size() * t.element_size())


def _by_name(every: Mapping[Place, Any]) -> dict[str, dict[Holder, Any]]:
    found: dict[str, dict[Holder, Any]] = {}
    for (_, name, holder), state in every.items():
        found.setdefault(name, {})[holder] = state
    return found
