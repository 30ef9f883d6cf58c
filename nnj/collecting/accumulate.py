"""How states come together: over the losses of a backward pass, over passes, and so over the
batches of a data set.

    sums over samples          are added, or merged as their quantity says;
    rows, one for each sample  are concatenated, with zeros for samples whose loss did
                               not reach the parameter.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nnj.collecting.contribution import Contribution, ExactColumns, asked, same_parameters
from nnj.collecting.quantity import (
    Holder,
    Quantity,
    Whole,
    added,
    has_totals,
    is_simple,
    of_dtype,
    times,
)
from nnj.collecting.states import Merged, Part, Rows, empty
from nnj.errors import NNJError
from nnj.recording.placement import placed, whole_state
from nnj.recording.tensor_parallel import is_distributed


class Accumulator:
    """The values of some quantities over all losses, passes and batches so far.

    Attributes:
        samples, passes: how many there were.
        exact: the exact columns of all losses.
        modules: those that hold results, or whose parameters do.
        wrappers: what splits the data over processes, of each call; None for nothing.
        every_sample: how many there were on all ranks; None while this rank is alone.
        loss_factor: what the loss behind the results is of that which was collected: over W ranks
            it is the mean of theirs.
        group: of the ranks over which sharded models were, if any were.
        parallel: of sharded parameters that tensor parallelism distributes, too, that of which this
            rank has its part.
    """

    def __init__(self, quantities: Mapping[str, Quantity]):
        self.samples = self.passes = 0
        self.every_sample: int | None = None
        self.loss_factor = 1.0
        self.group: Any = None
        self._settled: set[str] = set()
        self.parallel: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()
        self.exact = ExactColumns()
        self.wrappers: frozenset[nn.Module | None] = frozenset()
        self._quantities = quantities
        self._together: tuple[int, ...] = ()
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # by quantity and holder, which is held weakly: what is collected goes with its parameter
        self._totals: dict[str, MutableMapping[Holder, Merged | Rows]] = {
            name: WeakIdKeyDictionary() for name in quantities
        }

    def add_pass(self, contributions: list[Contribution]) -> None:
        """Take in what the losses of one backward pass have added.

        Errors: `NNJError` for what goes by the sample where one loss is given some of the calls of
        another, and for what is over all parameters where these are other ones than before.
        """
        groups = _by_samples(contributions, self._quantities)
        self._check_groups(groups)
        for group in groups:
            self.modules.update(h for h in group.holders if isinstance(h, nn.Module))
        for group in groups:
            self._together = same_parameters(self._together, group.together)
            self.wrappers |= group.wrappers
        if self.group is not None:
            raise NNJError(
                "a pass comes after one of a sharded model, whose results are those of all ranks "
                "already, and this one's are not. Collect for each in a `with` of its own"
            )
        starts = [self.samples]
        for group in groups:
            starts.append(starts[-1] + group.n)
        ready: list[tuple[Any, Any]] = []
        for name in self._quantities:
            totals = self._expected(name, groups)
            found: dict[Holder, list[Part]] = {}
            for start, group in zip(starts, groups, strict=False):
                for holder, state in group.at(name).items():
                    found.setdefault(holder, []).append(Part(start, group.n, state))
            for holder, states in found.items():
                total = totals[holder]
                ready.append((total, asked(name, total.with_pass, states)))
        for total, state in ready:  # all of a pass or, where a quantity refuses, nothing
            total.take(state)
        self.exact = functools.reduce(ExactColumns.plus, (g.exact for g in groups), self.exact)
        self.samples, self.passes = starts[-1], self.passes + 1

    def absorb(self, other: Accumulator) -> None:
        """Take in what all ranks have of one pass more. Errors: `NNJError` after passes of which
        this rank alone has something.
        """
        if self.passes and self.every_sample is None:
            raise NNJError(
                "a pass of a sharded model comes after passes of others, of which results are not "
                "over ranks yet. Collect for each in a `with` of its own"
            )
        self._together = same_parameters(self._together, other._together)
        for name in self._quantities:
            mine = self._totals[name]
            for holder, total in other._totals[name].items():
                if holder not in mine:
                    mine[holder] = empty(self._quantities[name])
                if total.reached:
                    state = total.state(other.samples)
                    here = self._quantities[name].per_sample  # rows stay on their rank
                    samples = other.samples if here else other.every_sample or 0
                    part = Part(self.samples, samples, state)
                    given = asked(name, mine[holder].with_pass, [part])
                    mine[holder].take(given)
        self.modules.update(other.modules)
        self.wrappers |= other.wrappers
        self.every_sample = (self.every_sample or 0) + (other.every_sample or 0)
        self.loss_factor, self.exact = other.loss_factor, self.exact.plus(other.exact)
        self._settled |= other._settled
        self.samples, self.passes = self.samples + other.samples, self.passes + 1

    def settle(self) -> None:
        """Make sums and rows, place by place, those of the loss behind the results, which then need
        no tensors of their own.
        """
        for name, quantity in self._quantities.items():
            if name in self._settled or not is_simple(quantity):
                continue
            self._settled.add(name)
            factor = self.loss_factor ** (quantity.degree or 0)
            for holder in list(self._totals[name]) if factor != 1 else ():
                state = self.state(name, holder)
                if state is not None:
                    self.replace(name, {holder: state * factor})

    def let_go(self) -> None:
        """Forget the values, which have been given out, and so all parameters: nobody refers to
        them any more, not even weakly.
        """
        self.parallel = WeakIdKeyDictionary()
        for name in self._totals:
            self._totals[name] = WeakIdKeyDictionary()

    def _check_groups(self, groups: Sequence[Contribution]) -> None:
        """Errors: those of `add_pass`."""
        for name, quantity in self._quantities.items():
            merges = type(quantity).merge_losses is not Quantity.merge_losses
            if quantity.per_sample or quantity.quadratic or merges:
                _check_apart(name, groups)

    def _expected(self, name: str, groups: list[Contribution]) -> Mapping[Holder, Merged | Rows]:
        """All that may hold a result of the quantity, reached or not, with what it has so far."""
        quantity, totals = self._quantities[name], self._totals[name]
        known = dict(totals.items())  # in which to look is many times as fast
        for group in groups:
            for holder in (*group.holders, *group.at(name)):
                if isinstance(holder, quantity.place) and holder not in known:
                    known[holder] = totals[holder] = empty(quantity)
        return known

    def values(self, name: str) -> list[tuple[Holder, Any]]:
        """Each parameter or module that may hold the quantity, with its result so far."""
        totals = self._totals[name].items()
        return [(holder, self._value(name, holder, total)) for holder, total in totals]

    def value(self, name: str, holder: Holder, factor: float = 1.0) -> Any:
        """`factor` times the result of a parameter or module so far, of its dtype, with the rows of
        all samples if there is one for each; None if nothing reached it.
        """
        total = self._totals[name].get(holder)
        return None if total is None else self._value(name, holder, total, factor)

    def value_or_zeros(self, name: str, p: Tensor, factor: float = 1.0) -> Any:
        """The result of a parameter; if nothing reached it zeros, where the quantity is known to
        have the shapes of parameters.
        """
        value = self.value(name, p, factor)
        if value is not None or not self._is_like_parameters(name):
            return value
        rows = (self.samples,) if self._quantities[name].per_sample else ()
        return p.detach().new_zeros((*rows, *p.shape))

    def state(self, name: str, holder: Holder) -> Any:
        """The state of a place so far; None if nothing reached it."""
        total = self._totals[name].get(holder)
        return None if total is None else total.state(self.samples)

    def states(self, name: str) -> dict[Holder, Any]:
        """Those of all places at which there is one."""
        every = self.reached(name)
        return {holder: state for holder, state in every.items() if state is not None}

    def reached(self, name: str) -> dict[Holder, Any]:
        """Those of all places that were reached, None included."""
        totals = self._totals[name].items()
        return {holder: total.state(self.samples) for holder, total in totals if total.reached}

    def replace(self, name: str, states: Mapping[Holder, Any]) -> None:
        """Take other states in the place of those so far: of sums those over all ranks, of rows
        zeros where nothing has reached this rank.
        """
        for holder, state in states.items():
            total = empty(self._quantities[name])
            total.begin(state)
            self._totals[name][holder] = total

    def plus(self, name: str, states: Mapping[Holder, Any]) -> None:
        """Add other states to those so far, of sums."""
        for holder, state in states.items():
            there = self.state(name, holder)
            self.replace(name, {holder: state if there is None else added(there, state)})

    def forget(self, name: str, holder: Holder) -> None:
        """That another rank has a state."""
        self._totals[name][holder] = empty(self._quantities[name])

    def samples_of(self, name: str) -> int:
        """How many samples a result is of."""
        quantity = self._quantities[name]
        alone = self.every_sample is None or quantity.per_sample or quantity.of_rank
        return self.samples if alone else self.every_sample or 0

    def totals(self, name: str, loss_factor: float = 1.0) -> dict[str, Tensor]:
        """What stands on the context of a quantity, as of a loss that is `loss_factor` times as
        large.
        """
        if not has_totals(self._quantities[name]):
            return {}
        ask, factor = self._quantities[name].totals, loss_factor * self.loss_factor
        states = self.states(name)
        if any(is_distributed(self._split(holder)) for holder in states):
            whole = functools.partial(whole_state, name, self._quantities[name].entrywise)
            states = {h: whole(self._split(h), s) for h, s in states.items()}
        found = asked(name, ask, states, self.samples_of(name))
        return {key: times(value, factor**degree) for key, (value, degree) in found.items()}

    def _value(self, name: str, holder: Holder, total: Merged | Rows, factor: float = 1.0) -> Any:
        state = total.state(self.samples)
        if state is None:
            return None
        quantity = self._quantities[name]
        if name not in self._settled:
            factor = factor * self.loss_factor ** (quantity.degree or 0)
        value = result(name, quantity, holder, state, self.samples_of(name), factor)
        like = self._split(holder)
        return placed(name, quantity.entrywise, like, value) if is_distributed(like) else value

    def _split(self, holder: Any) -> Any:
        """What tensor parallelism distributes of a place, so that ranks have its parts, or those of
        its rows; what else stands at sharded parameters was shared out.
        """
        return holder if self.group is None else self.parallel.get(holder)

    def _is_like_parameters(self, name: str) -> bool:
        return self._quantities[name].place is Tensor and all(
            self._shape(name, holder, total) in (None, holder.shape)
            for holder, total in self._totals[name].items()
            if isinstance(holder, Tensor)
        )

    def _shape(self, name: str, holder: Tensor, total: Merged | Rows) -> torch.Size | None:
        """Of a result, or of its row of one sample; None if nothing reached the holder."""
        made = type(self._quantities[name]).finish is not Quantity.finish
        if total.shape is None or isinstance(total, Rows) or not made:
            return total.shape
        found: torch.Size = getattr(self._value(name, holder, total), "shape", torch.Size())
        return found


def result(
    name: str, quantity: Quantity, holder: Holder, state: Any, samples: int, factor: float = 1.0
) -> Any:
    """`factor` times what a quantity makes of the state of a place, of the place's dtype."""
    if type(quantity).finish is not Quantity.finish:
        state = asked(name, quantity.finish, state, samples)
    return of_dtype(state if factor == 1 else state * factor, dtype_of(holder))


def _by_samples(
    contributions: Iterable[Contribution], quantities: Mapping[str, Quantity]
) -> list[Contribution]:
    """Those of the same samples added up, in the order of the forward calls that made them."""
    groups: list[Contribution] = []
    for part in sorted(contributions, key=lambda c: max(c.calls, default=0)):
        group = next((g for g in groups if g.of_same_samples(part)), None)
        if group is None:
            groups.append(part)
        else:
            group.absorb(part, quantities)
    return groups


def _check_apart(name: str, groups: Sequence[Contribution]) -> None:
    """Errors: `NNJError` if some samples of one group are among those of another."""
    for i, group in enumerate(groups):
        if any(group.given & other.given for other in groups[:i]):
            raise NNJError(
                f"{name}: one loss is given the outputs of more calls of the model than another "
                "one, so that their samples are not the same. Give both the outputs of all calls, "
                "or call the model once, on torch.cat of its inputs"
            )


def dtype_of(holder: Holder) -> torch.dtype | None:
    """Of a parameter, or of the first of a module's own; None if it has none."""
    if isinstance(holder, Tensor):
        return holder.dtype
    if isinstance(holder, Whole):
        return None
    return next((p.dtype for p in holder.parameters(recurse=False)), None)
