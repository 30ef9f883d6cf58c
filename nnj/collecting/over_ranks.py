"""What the ranks of a group have collected, as one: sums are added, other states merged by one rank
each, and rows of samples stay where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnj.collecting import quantity_file
from nnj.collecting.accumulate import Accumulator
from nnj.collecting.contribution import ExactColumns, asked
from nnj.collecting.owners import owner_of
from nnj.collecting.quantity import WHOLE, Holder, Whole, is_sum
from nnj.collecting.request import Request
from nnj.distributed.merging import Merging
from nnj.distributed.packing import Slot, filled, form_of, slots_of, tensors_of
from nnj.distributed.ranks import Ranks, count_sent
from nnj.errors import NNJError
from nnj.recording.replicas import Print, check_prints, prints
from nnj.recording.sharded import Sharding, part_of, placed_sum, whole_sum

Forms = dict[str, dict[str, Any]]


@dataclass
class Note:
    """What a rank says of what it has collected.

    Attributes:
        error: why it has nothing.
        asked: the quantities, and all that says what they are.
        models: the models that took part, as `model_facts` gives them; None if it had no sample.
        known: models that could have taken part.
        prints: of the parameters of those that took part; none of sharded ones.
        at: the names of modules=, if they are named.
        samples, exact: as of an accumulator.
        forms: the states without their numbers, by quantity and place.
        more: what else is to be agreed on.
    """

    error: str | None
    asked: Any
    models: list[Any] | None
    known: list[Any]
    prints: list[dict[str, Print]]
    at: list[str] | None
    samples: int
    exact: tuple[float, ...]
    forms: Forms
    more: Any = None


class Places:
    """The parameters and modules of some models by names that are the same on all ranks.

    Args:
        sharding: of sharded models, whose parameters are the sharded ones.
    """

    def __init__(self, models: Sequence[nn.Module], sharding: Sharding | None = None):
        sharded = {} if sharding is None else sharding.sharded
        self.models = models
        self.holders: dict[str, Holder] = {"": WHOLE}
        for i, model in enumerate(models):
            self.holders |= {f"{i}.{path}": m for path, m in model.named_modules()}
            named = model.named_parameters()
            self.holders |= {f"{i}.{path}": sharded.get(p, p) for path, p in named}
        self._names = {holder: name for name, holder in self.holders.items()}

    def name(self, holder: Holder) -> str:
        """Errors: `NNJError` for what belongs to none of the models."""
        if holder not in self._names:
            raise NNJError(
                f"{type(holder).__name__} holds a result and is part of no model that took part, "
                "so that ranks cannot name it to one another. Extend the model that it is in"
            )
        return self._names[holder]


def model_facts(model: nn.Module) -> Any:
    """What is the same of a model on all ranks."""
    parameters = [
        (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()
    ]
    return type(model).__qualname__, parameters


def asked_facts(request: Request) -> Any:
    """What is asked for, as ranks compare it."""
    quantities = {name: quantity_file.written(q) for name, q in request.quantities.items()}
    return quantities, request.tol, request.signed


class OverRanks:
    """The states of an accumulator over the ranks of a group.

    Args:
        mean: whether the loss behind the results is the mean of those of the ranks, as behind the
            gradients of DistributedDataParallel; else it is their sum.
        sharding: of sharded models, of whose results each rank keeps a part.
        spread: whether what modules of sharded models have stays with one rank each.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        request: Request,
        ranks: Ranks,
        mean: bool,
        sharding: Sharding | None = None,
        spread: bool = True,
    ):
        self.accumulator, self.request, self.ranks, self.mean = accumulator, request, ranks, mean
        self.sharding, self.spread = sharding, spread

    def add_up(
        self,
        models: Sequence[nn.Module],
        known: Sequence[nn.Module] = (),
        error: Exception | None = None,
        more: Any = None,
    ) -> list[Note]:
        """Make the accumulator that of all ranks; gives what each has said.

        Args:
            models: that took part on this rank.
            known: that could have, where this rank had no sample.
            error: why this rank has nothing.
            more: what else each is to know of the others.

        Errors: `NNJError`, on all ranks, for the first error of any, and where they have collected
        at other models, or other things.
        """
        self.ranks.meet()
        note, error = self._note(models, known, error, more)
        notes: list[Note] = self.ranks.notes(note)
        for rank, said in enumerate(notes):
            if said.error is not None:
                mine = error if rank == self.ranks.rank else None
                raise NNJError(f"rank {rank}: {said.error}") from mine
        self._check_asked(notes)
        if all(said.models is None for said in notes):
            return notes
        self._leave_out_empty(notes)
        places = Places(self._models(models, known, notes), self.sharding)
        self.accumulator.modules.update(
            m for m in places.holders.values() if isinstance(m, nn.Module)
        )
        self.accumulator.every_sample = sum(said.samples for said in notes)
        divides = len(notes) if self.sharding is None else self.sharding.divides
        self.accumulator.loss_factor = 1 / divides if self.mean else 1.0
        self.accumulator.exact = self._exact(notes)
        self._reduce(places, notes)
        return notes

    def _note(
        self,
        models: Sequence[nn.Module],
        known: Sequence[nn.Module],
        error: Exception | None,
        more: Any,
    ) -> tuple[Note, Exception | None]:
        """What this rank says, and its error."""
        accumulator, forms, at = self.accumulator, Forms(), None
        try:
            places = Places(models, self.sharding)
            if models and self.request.modules is not None:
                at = [places.name(m) for m in self.request.modules]
            for name in self.request.quantities if error is None else ():
                states = accumulator.reached(name)
                forms[name] = {places.name(h): form_of(state) for h, state in states.items()}
        except NNJError as refused:
            error = refused
        note = Note(
            None if error is None else str(error),
            asked_facts(self.request),
            [model_facts(model) for model in models] or None,
            [model_facts(model) for model in known],
            [prints(m.named_parameters()) for m in models if self.sharding is None],
            at,
            accumulator.samples,
            tuple(accumulator.exact),
            forms,
            more,
        )
        return note, error

    def _exact(self, notes: Sequence[Note]) -> ExactColumns:
        every = functools.reduce(
            ExactColumns.plus,
            (ExactColumns(int(k), *more) for k, *more in (said.exact for said in notes)),
        )
        factor = self.accumulator.loss_factor
        return ExactColumns(every.k, factor * every.trace, factor * every.dropped)

    # -- what ranks must have in common ------------------------------------------------------------

    def _check_asked(self, notes: Sequence[Note]) -> None:
        for rank, said in enumerate(notes):
            if said.asked != notes[0].asked:
                raise NNJError(
                    f"rank {rank} collects other quantities than rank 0, or with other options. "
                    "Ask for the same on all ranks of a group"
                )
        for name, quantity in self.request.quantities.items():
            if self.mean and quantity.degree is None:
                raise NNJError(
                    f"{name}: {type(quantity).__name__} does not say how it grows with the loss "
                    "(its attribute degree), so that it is not known over ranks, whose loss is a "
                    "mean. Collect with group=False what each rank has"
                )

    def _models(
        self, models: Sequence[nn.Module], known: Sequence[nn.Module], notes: Sequence[Note]
    ) -> Sequence[nn.Module]:
        """Those that took part, also on a rank that had no sample.

        Errors: `NNJError`, on all ranks, where that is not known.
        """
        some = next(rank for rank, said in enumerate(notes) if said.models is not None)
        facts = notes[some].models or []
        for rank, said in enumerate(notes):
            if said.models is None:
                if any(said.known.count(fact) != facts.count(fact) for fact in facts):
                    raise NNJError(
                        f"rank {rank} had no sample, and it is not known which of its extended "
                        f"models stands for the {len(facts)} of rank {some}. Give it a sample"
                    )
            elif said.models != facts:
                raise NNJError(
                    f"rank {rank} has collected at another model than rank {some} (its class, its "
                    "parameters, or which of them require grad). Ranks of a group have the same"
                )
            if said.models is not None and said.at != notes[some].at:
                raise NNJError(
                    f"rank {rank} has other modules= than rank {some}. Name the same on all ranks"
                )
        for prints_of in zip(*(said.prints for said in notes if said.models), strict=True):
            check_prints("parameter", prints_of)
        if models:
            return models
        left = list(known)
        return [_taken(left, fact) for fact in facts]

    # -- the states --------------------------------------------------------------------------------

    def _leave_out_empty(self, notes: Sequence[Note]) -> None:
        """Forget what ranks without samples have of sums, unless there is nothing else: it adds
        nothing, and may have another form.
        """
        if not any(said.samples for said in notes):
            return
        for name, quantity in self.request.quantities.items():
            if quantity.per_sample or quantity.of_rank:
                continue
            for said in notes:
                if not said.samples:
                    said.forms[name] = {}
            if not self.accumulator.samples:
                for holder in self.accumulator.states(name):
                    self.accumulator.forget(name, holder)

    def _reduce(self, places: Places, notes: Sequence[Note]) -> None:
        sums: dict[str, dict[str, Any]] = {}
        merged: dict[str, dict[str, Any]] = {}
        for name, quantity in self.request.quantities.items():
            forms = [said.forms[name] for said in notes]
            if quantity.per_sample:
                self._rows(name, places, forms)
            elif not quantity.of_rank:
                kind = sums if is_sum(quantity) else merged
                kind[name] = dict.fromkeys(key for form in forms for key in form)
        self._sum(places, notes, sums)
        self._merge(places, notes, merged)

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

    def _sum(self, places: Places, notes: Sequence[Note], wanted: Mapping[str, Any]) -> None:
        """Of what is added: one reduction of all of it, or of sharded models one for each place."""
        tensors: list[Tensor] = []
        known: list[tuple[str, Holder, Any]] = []
        for name, keys in wanted.items():
            states = self.accumulator.states(name)
            for key in keys:
                forms = [said.forms[name][key] for said in notes if key in said.forms[name]]
                if any(form != forms[0] for form in forms):
                    raise _other_forms(name, key)
                holder = places.holders[key]
                device, state = device_of(holder), states.get(holder)
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

    def _merge(self, places: Places, notes: Sequence[Note], wanted: Mapping[str, Any]) -> None:
        """Of what merges in a way of its own."""
        if not any(wanted.values()):
            return
        forms = [
            {f"{name}\n{key}": form for name in wanted for key, form in said.forms[name].items()}
            for said in notes
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
        return functools.partial(asked, name, self.request.quantities[name].merge)

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


def device_of(holder: Holder) -> torch.device:
    """Of a parameter, or of the first of a module; the CPU if it has none."""
    if isinstance(holder, Tensor):
        return holder.device
    first = None if isinstance(holder, Whole) else next(holder.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _zeros(slot: Slot, device: torch.device) -> Tensor:
    return torch.zeros(slot.shape, dtype=slot.dtype, device=device)


def _moved(state: Any, device: torch.device) -> Any:
    return filled(form_of(state), [t.to(device) for t in tensors_of(state)])


def _taken(left: list[nn.Module], fact: Any) -> nn.Module:
    """The first of those that are left of which a fact holds."""
    found = next(model for model in left if model_facts(model) == fact)
    left.remove(found)
    return found
