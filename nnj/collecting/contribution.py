"""What one loss adds in one backward pass, and how losses of the same samples come together."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nnj.collecting.quantity import Holder, Quantity, failed, two_losses
from nnj.errors import NNJError


class ExactColumns(NamedTuple):
    """The exact columns of losses: how many a loss had at most, the trace of the Hessians in the
    outputs, and what was left out of it.
    """

    k: int = 0
    trace: float = 0.0
    dropped: float = 0.0

    def plus(self, other: ExactColumns) -> ExactColumns:
        """Those of these losses and of others."""
        return ExactColumns(
            max(self.k, other.k), self.trace + other.trace, self.dropped + other.dropped
        )

    @property
    def deficit(self) -> float:
        """What was left out, as a part of the trace."""
        return self.dropped / self.trace if self.trace else 0.0


class Contribution:
    """What one loss adds in one backward pass.

    Args:
        calls: the forward calls of models that made the samples.
        n: how many samples there are.
        given: those of the calls whose outputs the loss is given, itself or what is made of them.
        wrappers: what splits the data over processes, of each call; None for nothing.

    Attributes:
        holders: every parameter and module that may hold a result, reached or not.
        states: of each quantity, at each place that the loss has reached.
        together: which parameters a joint state is over, in order.
        exact: its exact columns.
        shared: the quantities and places of which ranks have put together something already.
    """

    def __init__(
        self,
        calls: frozenset[int] = frozenset(),
        n: int = 0,
        given: frozenset[int] = frozenset(),
        wrappers: frozenset[nn.Module | None] = frozenset(),
    ):
        self.calls, self.n, self.given, self.wrappers = calls, n, given, wrappers
        self.holders: dict[Holder, None] = {}
        self.exact = ExactColumns()
        self.states: dict[str, dict[Holder, Any]] = {}
        self.together: tuple[int, ...] = ()
        self.shared: set[tuple[str, Holder]] = set()

    def end(self, quantities: Mapping[str, Quantity]) -> None:
        """No chunk of columns is to come any more."""
        for name, states in self.states.items():
            end = quantities[name].end_pass
            for holder, state in states.items():
                states[holder] = asked(name, end, state)

    def at(self, name: str) -> Mapping[Holder, Any]:
        """The states of a quantity, where the loss reached something."""
        return self.states.get(name, {})

    def reached(self, name: str, holder: Holder) -> bool:
        """Whether there is, or was, something of a quantity at a place."""
        return (name, holder) in self.shared or holder in self.at(name)

    def of_quantities(self, names: Container[str]) -> Contribution:
        """The part of some quantities."""
        part = Contribution(self.calls, self.n, wrappers=self.wrappers)
        part.holders, part.exact, part.together = self.holders, self.exact, self.together
        part.states = {name: states for name, states in self.states.items() if name in names}
        return part

    def of_same_samples(self, other: Contribution) -> bool:
        """Whether another loss is one of the same samples."""
        return self.n == other.n and (bool(self.calls & other.calls) or self.calls == other.calls)

    def absorb(
        self, other: Contribution, quantities: Mapping[str, Quantity], factor: int = 1
    ) -> None:
        """Add `factor` times another contribution of the same samples."""
        self.calls |= other.calls
        self.given |= other.given
        self.wrappers |= other.wrappers
        self.holders |= other.holders
        self.exact = self.exact.plus(other.exact)
        self.together = same_parameters(self.together, other.together)
        for name, holder in self.shared | other.shared:
            twice = self.reached(name, holder) and other.reached(name, holder)
            if twice and quantities[name].quadratic:
                raise two_losses(quantities[name])
        self.shared |= other.shared
        for name, states in other.states.items():
            mine, quantity = self.states.setdefault(name, {}), quantities[name]
            for holder, state in states.items():
                if factor != 1:
                    state = tree_map_only(Tensor, lambda t: factor * t, state)
                known = holder in mine
                mine[holder] = (
                    asked(name, quantity.merge_losses, mine[holder], state) if known else state
                )


def asked(name: str, ask: Callable[..., Any], *given: Any) -> Any:
    """What a quantity makes of what it is given. Errors: `NNJError` that names it."""
    try:
        return ask(*given)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of a stranger, who may exit
        raise failed(name, error) from error.__cause__ or error


def same_parameters(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """What two joint states are over. Errors: `NNJError` if they are over other parameters."""
    if one and other and one != other:
        raise NNJError(
            "what is joint over all parameters is asked of two losses or passes that reach other "
            "models, or in which other parameters require grad. Collect for each in a `with` of "
            "its own, or name the same modules=[...] for both"
        )
    return one or other
