"""Who wants what of one loss: each request with its parameters and modules, and what the columns of
a chunk become there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nnj.collecting.contribution import Contribution, asked
from nnj.collecting.loss_columns import Part
from nnj.collecting.quantity import WHOLE, Holder, Quantity, Whole, is_sum_of_chunks
from nnj.collecting.request import GRADIENT, ColumnSource, Request
from nnj.collecting.shares import Shares
from nnj.errors import NNJError, PluginError, complex_parameter
from nnj.jacobians.factor import DenseFactor, Factor
from nnj.jacobians.square_sum import SquareSum
from nnj.matrices.matrix import Matrix
from nnj.propagation.allocator import give_back
from nnj.recording.placement import check_placed
from nnj.recording.scope import Scope
from nnj.recording.tensor_parallel import is_distributed
from nnj.registry.manager import manager

Parts = Mapping[ColumnSource, Part]
Wanted = tuple[str, Quantity, ColumnSource]


class Target:
    """One request at one loss.

    Args:
        scope: the extended models, at which it collects if it names no modules.
        shares: takes in sums of sharded models, `sign` times what is found; None keeps all.

    Attributes:
        own, params: where it collects: the own parameters of each module, and all of them (a dict
            as an ordered set).
        found: what it has collected.
    """

    def __init__(self, request: Request, scope: Scope, shares: Shares | None = None, sign: int = 1):
        self.request, self.found = request, Contribution()
        self._shares, self._sign = shares, sign
        self.own = scope.own if request.modules is None else scope.of(request.modules)
        self.params = dict.fromkeys([p for own in self.own.values() for p in own])
        asked_for = [(n, q, request.sources[n]) for n, q in request.quantities.items()]
        self._points, self._blocks, self._joints = (
            [wanted for wanted in asked_for if wanted[1].place is place]
            for place in (Tensor, nn.Module, Whole)
        )
        # of modules, the parameters that the loss reaches, and the factors that have arrived there
        self._expected: dict[nn.Module, int] = {}
        self._waiting: dict[nn.Module, dict[Tensor, Factor]] = {}
        self._owners: dict[Tensor, list[nn.Module]] = {}
        # of quantities of all parameters together: those, and the factors of a chunk
        self._order = _in_order(scope) if self._joints else {}
        self.together: dict[nn.Parameter, None] = {}
        self._all: dict[Tensor, Factor] = {}
        # what quantities may keep until the last chunk, and whether it has room
        self._room = request.memory / 3
        self._seen: dict[tuple[str, Holder], _Seen] = {}  # where anything is shared out
        self._has_room: dict[tuple[str, Tensor], bool] = {}

    def reach(self, reached: set[Tensor], paths: Mapping[nn.Module, str]) -> None:
        """Take in which parameters columns will reach.

        Errors: `NNJError` for what cannot be collected there.
        """
        self._refuse_complex(reached, paths)
        for m in self.own if self._blocks else ():
            count = sum(p in reached for p in self.own[m])
            if count:
                self._expected[m] = count
                for name, quantity, _ in self._blocks:
                    _check_name(name, m, paths.get(m, ""))
                    quantity.check(m, self.own[m], paths.get(m, ""))
                for p in self.own[m]:
                    self._owners.setdefault(p, []).append(m)

    def _refuse_complex(self, reached: set[Tensor], paths: Mapping[nn.Module, str]) -> None:
        quantities, sources = self.request.quantities, self.request.sources.items()
        squared = [n for n, s in sources if s is not GRADIENT or quantities[n].quadratic]
        found = {p for p in self.params if p.is_complex() and p in reached} if squared else set()
        if found:
            m = next(m for m in self.own if not found.isdisjoint(self.own[m]))
            raise complex_parameter(
                f"{squared[0]}: a parameter of '{paths.get(m, '') or type(m).__name__}'"
            )

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Note all that may hold a result, reached or not: of the models that took part if it names
        no modules.
        """
        holders = self.found.holders
        for m in modules if self.request.modules is None else self.own:
            own = self.own[m]
            if own:
                holders[m] = None
                holders.update(dict.fromkeys(own))
        if self._joints:
            every = dict.fromkeys(p for p in holders if isinstance(p, nn.Parameter))
            self.together = {p: None for p in self._order if p in every} | every
            self.found.together = tuple(map(id, self.together))
            for _, quantity, _ in self._joints:
                quantity.check(None, list(self.together), "")

    # -- the columns of one chunk ------------------------------------------------------------------

    def take(self, p: Tensor, factor: Factor, parts: Parts) -> None:
        """Collect at one parameter, to which the columns of a chunk have come."""
        if p not in self.params:
            return
        for name, quantity, source in self._points:
            part = parts.get(source)
            if part is not None:
                mine = _of_part(part, factor)
                size = mine.kept(part.total)  # mostly nothing
                mine.may_keep = not size or self._has_room_for(name, p, size)
                _add(self.found, name, quantity, p, [mine], [p], part.total)
                self._share(name, quantity, p, part, True)
        if self._joints and p in self.together:
            self._all[p] = factor
        for m in self._owners.get(p, ()) if self._blocks else ():
            factors = self._waiting.setdefault(m, {})
            factors[p] = factor
            if len(factors) == self._expected[m]:
                self._take_module(m, self._waiting.pop(m), parts)

    def _has_room_for(self, name: str, p: Tensor, size: int) -> bool:
        """Whether a quantity may keep so many bytes at a parameter: the same in all chunks."""
        if (name, p) not in self._has_room:
            self._has_room[name, p] = size <= self._room
            self._room -= size if size <= self._room else 0
        return self._has_room[name, p]

    def take_zeros(self, empty: Iterable[Tensor], n: int) -> None:
        """Collect zeros at parameters that are behind tensors without entries alone, as `.grad`
        has them; n is the number of samples.
        """
        new = [p for p in empty if p in self.params]
        factors = {p: DenseFactor(p.detach().new_zeros((1, n, *p.shape))) for p in new}
        found = Contribution()
        for name, quantity, _ in self._points:
            for p in new:
                if not self.found.reached(name, p):
                    _add(found, name, quantity, p, [factors[p]], [p], 1)
        for m in dict.fromkeys(m for p in new for m in self._owners.get(p, ())):
            for name, quantity, _ in self._blocks:
                if not self.found.reached(name, m):
                    mine = [factors.get(p) for p in self.own[m]]
                    _add(found, name, quantity, m, mine, self.own[m], 1)
        for name, quantity, _ in self._joints if factors else ():
            if WHOLE not in self.found.at(name):
                mine = [factors.get(p) for p in self.together]
                _add(found, name, quantity, WHOLE, mine, list(self.together), 1)
        found.end(self.request.quantities)
        self.found.absorb(found, self.request.quantities)

    def end_chunk(self, parts: Parts) -> None:
        """Collect at modules to some of whose parameters this chunk had no columns to send."""
        for m in list(self._waiting):
            self._take_module(m, self._waiting.pop(m), parts)
        for wanted in self._joints if self._all else ():
            self._take_all(wanted, WHOLE, list(self.together), self._all, parts)
        self._all = {}

    def _take_module(self, m: nn.Module, factors: dict[Tensor, Factor], parts: Parts) -> None:
        all_there = len(factors) == self._expected[m] and len({f.k for f in factors.values()}) == 1
        for wanted in self._blocks:
            self._take_all(wanted, m, self.own[m], factors, parts, all_there)

    def _take_all(
        self,
        wanted: Wanted,
        place: Holder,
        params: list[nn.Parameter],
        factors: Mapping[Tensor, Factor],
        parts: Parts,
        all_there: bool = False,
    ) -> None:
        name, quantity, source = wanted
        part = parts.get(source)
        if part is not None:
            mine = {p: _of_part(part, factor) for p, factor in factors.items()}
            given = [mine.get(p) for p in params]
            _add(self.found, name, quantity, place, given, params, part.total)
            self._share(name, quantity, place, part, all_there)

    def _share(
        self, name: str, quantity: Quantity, place: Holder, part: Part, all_there: bool
    ) -> None:
        """Give away the state of a place that may come together with those of other ranks now.

        Args:
            all_there: whether the chunk had columns at all parameters of the place.
        """
        if self._shares is None or (not quantity.entrywise and is_distributed(place)):
            return  # what is of a part of a parameter is added up over the ranks of a model before
        seen = self._seen.get((name, place), _Seen(0, part.total)).with_chunk(part, all_there)
        self._seen[name, place] = seen
        if is_sum_of_chunks(quantity):
            state = self.found.states[name][place]
            squares = isinstance(state, SquareSum) and (state.later is None or seen.every_column)
            if squares or isinstance(state, Tensor):
                del state
                given = self._given_away(name, quantity, place)
                self._shares.take(self.request, name, place, given, self._sign)
                del given  # a round may see it off
                self._shares.offer()
        elif self.found.n and self._shares.takes_whole(self.request, quantity):
            if (name, place) in self.found.shared:
                raise NNJError(
                    f"{name}: columns have come to {type(place).__name__} behind what was counted "
                    "as the last of them, and the others are with another rank. Please report it"
                )
            if seen.is_last and self.found.states[name][place] is not None:
                given = self._given_away(name, quantity, place)
                self._shares.take_whole(self.request, name, place, given)
                del given
                self._shares.offer()

    def _given_away(self, name: str, quantity: Quantity, place: Holder) -> Any:
        """The state of a place, which is not here any more."""
        state = self.found.states[name].pop(place)
        self.found.shared.add((name, place))
        given = asked(name, quantity.end_pass, state)
        check_placed(name, quantity.entrywise, place, given)
        return given


class _Seen(NamedTuple):
    """How many columns of a source have come to a place.

    Attributes:
        total: how many there are, as was said with each.
        in_order: whether the same was said with all, and all parameters of the place had all.
    """

    columns: int
    total: int
    in_order: bool = True

    def with_chunk(self, part: Part, all_there: bool) -> _Seen:
        """With those of one chunk more."""
        count, in_order = part.columns.stop - part.columns.start, self.in_order and all_there
        return _Seen(self.columns + count, part.total, in_order and part.total == self.total)

    @property
    def every_column(self) -> bool:
        return self.columns >= self.total

    @property
    def is_last(self) -> bool:
        """Whether it is known that no more will come."""
        return self.every_column and self.in_order


def _in_order(scope: Scope) -> dict[nn.Parameter, None]:
    """All parameters in the order of `parameters()` of the outermost models, which that of modules=
    need not be.
    """
    inner = {m for root in scope.roots for m in scope.modules[root] if m is not root}
    outer = [root for root in scope.roots if root not in inner]
    return {p: None for root in outer for m in scope.modules[root] for p in scope.own[m]}


def _add(
    found: Contribution,
    name: str,
    quantity: Quantity,
    place: Holder,
    factors: Sequence[Factor | None],
    params: Sequence[Tensor],
    total: int,
) -> None:
    """Add one chunk of columns to the state of a place."""
    states = found.states.get(name)
    if states is None:
        states = found.states[name] = {}
    state = states.get(place)
    if state is None and type(quantity).start is not Quantity.start:
        state = asked(name, quantity.start, place, params)
    states[place] = asked(name, quantity.add, state, factors, params, total)


def _of_part(part: Part, factor: Factor) -> Factor:
    """The columns of one source, of a factor that holds the whole chunk."""
    whole = part.columns.start == 0 and part.columns.stop == factor.k
    return factor if whole else factor.columns(part.columns)


class ChunkSink:
    """Takes the factors of one chunk of columns to all targets."""

    __slots__ = ("memory", "parts", "targets")

    def __init__(self, targets: Sequence[Target], parts: Parts):
        self.targets, self.parts = targets, parts
        self.memory = min(target.request.memory for target in targets)

    def take(self, p: Tensor, factor: Factor) -> None:
        """The factor of one parameter has arrived, with the columns of all sources in it."""
        for target in self.targets:
            target.take(p, factor, self.parts)
        give_back(self.memory)

    def end(self) -> None:
        """No factor of the chunk is to come any more."""
        for target in self.targets:
            target.end_chunk(self.parts)


def _check_name(name: str, m: nn.Module, path: str) -> None:
    """Errors: `PluginError` if the result of a quantity would stand in the place of what the module
    computes with.
    """
    kept = vars(m).get(name)
    inside = name in m._parameters or name in m._buffers or name in m._modules
    earlier = kept is None or isinstance(kept, (Tensor, Matrix))
    if inside or hasattr(type(m), name) or not earlier:
        entry = manager().quantity(name)
        by = f", of plugin {entry.source}," if entry else ""
        raise PluginError(
            f"the quantity {name!r}{by} would overwrite the {name} of '{path or type(m).__name__}'."
            " Register it under another name"
        )
