"""What one open collection wants of a sweep, and the factors that it hands to its quantities."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnj.errors import NNJError, complex_parameter
from nnj.factors import Factor
from nnj.plugins import manager
from nnj.quantities.base import Quantity

if TYPE_CHECKING:
    from nnj.collection import collect
    from nnj.contribution import Contribution


def _own_params(m: nn.Module) -> list[nn.Parameter]:
    """Each once, in order; torch's own iterators take much longer."""
    return list({id(p): p for p in m._parameters.values() if p is not None and p.requires_grad}.values())


class Target:
    """One open collection as a sweep sees it: its parameters, its modules, its quantities."""

    def __init__(self, collection: collect, roots: list[nn.Module]):
        self.collection = collection
        tops = roots if collection.modules is None else collection.modules
        self.modules = list({id(m): m for top in tops for m in top.modules()}.values())
        self.own = {id(m): _own_params(m) for m in self.modules}
        self.params = {id(p): p for own in self.own.values() for p in own}
        self.blocks = {n: q for n, q in collection.quantities.items() if q.of_modules}
        self.points = {n: q for n, q in collection.quantities.items() if not q.of_modules}
        self.pending: dict[int, dict[int, Factor]] = {}
        self.in_all: dict[str, int] = {}  # how many columns of each source there will be

    def check(self, reached: set[int], paths: dict[int, str]) -> None:
        """Errors: `NNJError` for what cannot be collected at the parameters that a sweep will reach."""
        squared = [name for name, quantity in self.collection.quantities.items() if quantity.source != "gradient"]
        if squared and any(p.is_complex() and key in reached for key, p in self.params.items()):
            where = next(m for m in self.modules if any(p.is_complex() and id(p) in reached for p in self.own[id(m)]))
            raise complex_parameter(f"{squared[0]}: a parameter of '{paths.get(id(where), '') or type(where).__name__}'")
        for quantity in self.blocks.values():
            for m in self.modules:
                if any(id(p) in reached for p in self.own[id(m)]):
                    quantity.check(m, self.own[id(m)], paths.get(id(m), ""))

    def take(self, into: Contribution, p: Tensor, factor: Factor, parts: dict[str, slice], reached: set[int]) -> None:
        """The factor of one parameter has arrived, with the columns of all sources in it."""
        if id(p) not in self.params:
            return
        for name, quantity in self.points.items():
            which = parts.get(self.source(name, quantity))
            if which is not None:
                in_all = self.in_all.get(self.source(name, quantity), factor.k)
                into.add(name, p, asked(name, quantity.parameter, factor.columns(which), in_all))
        if not self.blocks:
            return
        for m in self.modules:
            own = self.own[id(m)]
            if any(q is p for q in own):
                there = self.pending.setdefault(id(m), {})
                there[id(p)] = factor
                if len(there) == len({id(q) for q in own} & reached):
                    self._module(into, m, self.pending.pop(id(m)), parts)

    def flush(self, into: Contribution, parts: dict[str, slice]) -> None:
        """After a walk: modules to some of whose parameters nothing was sent."""
        for m in self.modules:
            if id(m) in self.pending:
                self._module(into, m, self.pending.pop(id(m)), parts)

    def _module(self, into: Contribution, m: nn.Module, factors: dict[int, Factor], parts: dict[str, slice]) -> None:
        own = self.own[id(m)]
        for name, quantity in self.blocks.items():
            which = parts.get(self.source(name, quantity))
            if which is not None:
                cut = {key: f.columns(which) for key, f in factors.items()}
                into.add(name, m, asked(name, quantity.module, [cut.get(id(p)) for p in own], own))

    def source(self, name: str, quantity: Quantity) -> str:
        """Draws are a quantity's own; exact columns and the gradient are shared."""
        return f"signs {id(self.collection)} {name}" if quantity.source == "signs" else quantity.source


def asked(name: str, ask: Callable[..., Any], *about: Any) -> Any:
    """What a quantity says. Errors: `NNJError` naming it with its plugin, in which the fault mostly is."""
    try:
        return ask(*about)
    except NNJError:
        raise
    except Exception as error:
        entry = manager().quantity(name)
        by = f", of plugin {entry.source}," if entry else ""
        raise NNJError(f"the quantity {name!r}{by} failed with {type(error).__name__}: {error}") from error
