"""What the ranks of a group have collected, as one: what each says of it, and whether it is of the
same models and quantities.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nnj.collecting import quantity_file
from nnj.collecting.accumulate import Accumulator
from nnj.collecting.contribution import ExactColumns
from nnj.collecting.places import Places
from nnj.collecting.request import Request
from nnj.collecting.states_over_ranks import StatesOverRanks
from nnj.distributed.packing import form_of
from nnj.distributed.ranks import Ranks
from nnj.errors import NNJError
from nnj.recording.replicas import Print, check_prints, prints
from nnj.recording.sharded import Sharding

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
        self.sharding = sharding
        quantities = request.quantities
        self._states = StatesOverRanks(accumulator, quantities, ranks, sharding, spread)

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
        self._states.reduce(places, [said.forms for said in notes])
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
                for holder in self.accumulator.reached(name):
                    self.accumulator.forget(name, holder)


def _taken(left: list[nn.Module], fact: Any) -> nn.Module:
    """The first of those that are left of which a fact holds."""
    found = next(model for model in left if model_facts(model) == fact)
    left.remove(found)
    return found
