"""The states of an accumulator over ranks: sums are added, others merged by one rank each, and rows
of samples stay where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnj.collecting.accumulate import Accumulator
from nnj.collecting.contribution import asked
from nnj.collecting.owners import owner_of
from nnj.collecting.places import Places, device_of
from nnj.collecting.quantity import Holder, Quantity, is_sum
from nnj.distributed.merging import Merging
from nnj.distributed.packing import Slot, filled, form_of, slots_of, tensors_of
from nnj.distributed.ranks import Ranks, count_sent
from nnj.errors import NNJError
from nnj.recording.sharded import Sharding, part_of, placed_sum, whole_sum

Forms = Mapping[str, Mapping[str, Any]]


class StatesOverRanks:
    """The states of an accumulator.

    Args:
        sharding, spread: as of `OverRanks`.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        quantities: Mapping[str, Quantity],
        ranks: Ranks,
        sharding: Sharding | None,
        spread: bool,
    ):
        self.accumulator, self.quantities, self.ranks = accumulator, quantities, ranks
        self.sharding, self.spread = sharding, spread

    def reduce(self, places: Places, forms: Sequence[Forms]) -> None:
        """Make the states of the accumulator those of all ranks.

        Args:
            forms: of each rank its states without their numbers, by quantity and place; that of a
                state that is None is None.

        Errors: `NNJError`, on all ranks, for what cannot come together.
        """
        sums: dict[str, dict[str, Any]] = {}
        merged: dict[str, dict[str, Any]] = {}
        for name, quantity in self.quantities.items():
            mine = [form[name] for form in forms]
            if quantity.per_sample:
                self._rows(name, places, mine)
            elif not quantity.of_rank:
                kind = sums if is_sum(quantity) else merged
                kind[name] = dict.fromkeys(key for form in mine for key in form)
        self._sum(places, forms, sums)
        self._merge(places, forms, merged)

    def _rows(self, name: str, places: Places, forms: Sequence[Mapping[str, Any]]) -> None:
        """Zeros for the samples of this rank where only others were reached."""
        mine = forms[self.ranks.rank]
        other = {key: slot for form in forms for key, slot in form.items() if key not in mine}
        found = {}
        for key, slot in other.items():
            shape = (self.accumulator.samples, *slot.shape[1:])
            device = device_of(places.holders[key])
            found[places.holders[key]] = torch.zeros(shape, dtype=slot.dtype, device=device)
        self.accumulator.replace(name, found)

    def _sum(self, places: Places, said: Sequence[Forms], wanted: Mapping[str, Any]) -> None:
        """Of what is added: one reduction of all of it, or of sharded models one for each place."""
        tensors: list[Tensor] = []
        known: list[tuple[str, Holder, Any]] = []
        for name, keys in wanted.items():
            for key in keys:
                forms = [form[name][key] for form in said if key in form[name]]
                if any(form != forms[0] for form in forms):
                    raise _other_forms(name, key)
                holder = places.holders[key]
                device, state = device_of(holder), self.accumulator.state(name, holder)
                mine = (
                    [_zeros(slot, device) for slot in slots_of(forms[0])]
                    if state is None
                    else tensors_of(state)
                )
                if self.sharding is None:
                    tensors += mine
                    known.append((name, holder, forms[0]))
                    continue
                part = shared_out(filled(forms[0], mine), holder, self.sharding, self.ranks)
                self.accumulator.replace(name, {holder: part})
        left = iter(self.ranks.sums(tensors))
        for name, holder, form in known:
            self.accumulator.replace(name, {holder: filled(form, left)})

    def _merge(self, places: Places, said: Sequence[Forms], wanted: Mapping[str, Any]) -> None:
        """Of what merges in a way of its own."""
        if not any(wanted.values()):
            return
        forms = [
            {f"{name}\n{key}": at for name in wanted for key, at in form[name].items()}
            for form in said
        ]
        keys = dict.fromkeys(key for form in forms for key in form)
        for key in keys:
            unknown = {form[key] is None for form in forms if key in form}
            if len(unknown) > 1:
                raise _other_forms(*key.split("\n"))
        keys = {key: None for key in keys if any(form.get(key) is not None for form in forms)}
        stay = [key for key in keys if self._stays(places.holders[key.partition("\n")[2]])]
        self._merge_on_owners(places, {key: _who(key, forms) for key in stay})
        left = keys.keys() - set(stay)
        forms = [{key: at for key, at in form.items() if key in left} for form in forms]
        if any(forms):
            self._merge_for_all(places, forms)

    def _stays(self, holder: Holder) -> bool:
        """Whether what is merged at a place stays with one rank."""
        is_part = self.sharding is not None and self.spread
        return is_part and not isinstance(holder, Tensor)

    def _merge_on_owners(self, places: Places, there: Mapping[str, list[int]]) -> None:
        """Place by place, each on one rank; given the ranks that have something there.

        Errors: `NNJError`, on all ranks, for one that merging has raised on any.
        """
        error: NNJError | None = None
        for key, ranks in there.items():
            name, _, place = key.partition("\n")
            holder = places.holders[place]
            mine = self.accumulator.state(name, holder)
            self.accumulator.forget(name, holder)
            merging = Merging(self.ranks, self._merge_of(name), device_of(holder))
            found = merging.on(owner_of(holder, places.models, self.ranks), ranks, mine)
            error = error or merging.error
            if found is not None:
                self.accumulator.replace(name, {holder: found})
        for said in self.ranks.notes(None if error is None else str(error)) if there else ():
            if said is not None:
                raise NNJError(said) from error

    def _merge_of(self, name: str) -> Callable[[Any, Any], Any]:
        return functools.partial(asked, name, self.quantities[name].merge)

    def _merge_for_all(self, places: Places, forms: Sequence[Forms]) -> None:
        """All at once; what is merged is on all ranks."""
        every = dict.fromkeys(key for form in forms for key in form)
        mine = dict[str, Any]()
        for key in every:
            name, _, place = key.partition("\n")
            state = self.accumulator.state(name, places.holders[place])
            mine |= {} if state is None else {key: state}

        def merge(key: str, states: list[Any]) -> Any:
            return functools.reduce(self._merge_of(key.partition("\n")[0]), states)

        devices = [device_of(holder) for holder in places.holders.values()]
        device = next((d for d in devices if d.type != "cpu"), devices[-1])
        for key, state in self.ranks.merged(mine, forms, merge, device).items():
            name, _, place = key.partition("\n")
            holder = places.holders[place]
            state = _moved(state, device_of(holder))
            if self.sharding is not None and isinstance(holder, Tensor):
                state = in_parts(state, holder, self.sharding)
            self.accumulator.replace(name, {holder: state})


def _other_forms(name: str, key: str) -> NNJError:
    return NNJError(
        f"{name}: what ranks have at '{key.partition('.')[2]}' has other forms, so that it cannot "
        "be added. Give all ranks the same model and loss"
    )


def _who(key: str, forms: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which ranks have something of a key."""
    return [rank for rank, form in enumerate(forms) if key in form]


def in_parts(state: Any, holder: Tensor, sharding: Sharding) -> Any:
    """The state of a sharded parameter, which all ranks have: of each tensor of its shape the part
    of this rank.
    """
    return filled(form_of(state), [part_of(t, holder, sharding) for t in tensors_of(state)])


def shared_out(state: Any, holder: Holder, sharding: Sharding, ranks: Ranks) -> Any:
    """The sum over ranks of a state at a place of a sharded model, each with a part of it."""
    mine = tensors_of(state)
    count_sent(sum((ranks.size - 1) * t.nbytes for t in mine) // ranks.size)
    parts = [placed_sum(t, holder, sharding) if t.dim() else whole_sum(t, sharding) for t in mine]
    return filled(form_of(state), parts)


def _zeros(slot: Slot, device: torch.device) -> Tensor:
    return torch.zeros(slot.shape, dtype=slot.dtype, device=device)


def _moved(state: Any, device: torch.device) -> Any:
    return filled(form_of(state), [t.to(device) for t in tensors_of(state)])
