"""What is asked for in one collect: the quantities with their options, at which modules, within
what memory and error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from nnj.collecting.quantities_by_name import make
from nnj.collecting.quantity import Quantity, is_sum
from nnj.distributed.ranks import checked_group
from nnj.errors import NNJError, PluginError
from nnj.propagation.chunking import checked_memory
from nnj.recording.wrappers import first_group


@dataclass(eq=False, frozen=True)
class ColumnSource:
    """Where columns come from. Exact ones and the gradient are shared by all quantities that want
    them; draws are a quantity's own.
    """

    kind: str
    drawn_for: Quantity | None = None


EXACT, GRADIENT = ColumnSource("exact"), ColumnSource("gradient")


def _source_of(name: str, quantity: Quantity) -> ColumnSource:
    if quantity.source == "signs":
        _check_draws(name, quantity)
        return ColumnSource("signs", quantity)
    for shared in (EXACT, GRADIENT):
        if quantity.source == shared.kind:
            return shared
    raise PluginError(
        f"the quantity {name!r} has source={quantity.source!r}, expected 'exact', 'signs' or "
        "'gradient'"
    )


def _check_draws(name: str, quantity: Quantity) -> None:
    """Errors: `NNJError` for a generator or a number of draws that is none."""
    generator, draws = quantity.generator, quantity.draws
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise NNJError(
            f"{name}: generator={generator!r} is no torch.Generator. Give "
            "torch.Generator().manual_seed(...), on the device of the model's output, or None"
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise NNJError(f"{name}: {draws!r} draws; their number is a whole number, at least 1")


class Request:
    """What one `collect` asks for. Requests are told apart by identity.

    Args:
        quantities: by name.
        modules, memory, tol, signed, verify, group: as in `nnj.collect`.

    Attributes:
        sources: of each quantity, where its columns come from.

    Errors: `NNJError` for a tolerance, or signed=True, of which a quantity has no use.
    """

    def __init__(
        self,
        quantities: Mapping[str, Quantity],
        modules: Iterable[nn.Module] | None = None,
        memory: int = 2**28,
        tol: float = 0.0,
        signed: bool = False,
        verify: bool = True,
        group: Any = None,
    ):
        self.quantities = dict(quantities)
        self.sources = {name: _source_of(name, q) for name, q in self.quantities.items()}
        items = self.quantities.items()
        self._askers = [name for name, q in items if type(q).first is not Quantity.first]
        self.modules = None if modules is None else _checked_modules(modules)
        self.memory, self.tol, self.signed = checked_memory(memory), _number(tol), signed
        self.verify = verify
        self.group = group if group in (None, False) else checked_group(group, "nnj.collect")
        self._check_tolerance(tol)
        if signed:
            self._check_signed()

    @classmethod
    def by_name(
        cls,
        names: tuple[str | Quantity, ...],
        *,
        modules: Iterable[nn.Module] | None = None,
        memory: int = 2**28,
        tol: float = 0.0,
        signed: bool = False,
        verify: bool = True,
        group: Any = None,
        **options: Any,
    ) -> Self:
        """The request for installed quantities, each with those of the options that it declares,
        and for those that are given themselves.

        Errors: `NNJError` for an unknown quantity or option, and those of the class.
        """
        if not names:
            raise NNJError(
                "nnj.collect needs the name of a quantity, such as nnj.collect('ggn_diag'), or a "
                "nnj.Quantity"
            )
        return cls(make(names, options), modules, memory, tol, signed, verify, group)

    def trusted(self) -> Self:
        """The same, of passes whose structure has been verified."""
        other = copy.copy(self)
        other.verify = False
        return other

    def part(self, names: Container[str]) -> Self:
        """The same of some of its quantities alone."""
        other = copy.copy(self)
        other.quantities = {n: q for n, q in self.quantities.items() if n in names}
        other.sources = {n: s for n, s in self.sources.items() if n in names}
        other._askers = [n for n in self._askers if n in names]
        return other

    def first(self) -> Request | None:
        """What some of its quantities must know before their first column, under their names; None
        if there is nothing.
        """
        found = {name: first for name in self._askers if (first := self.quantities[name].first())}
        if not found:
            return None
        tol = self.tol if any(q.source == EXACT.kind for q in found.values()) else 0.0
        rest = self.memory, tol, self.signed, self.verify, self.group
        return Request(found, self.modules, *rest)

    def rank(self, wrappers: Iterable[nn.Module | None]) -> int:
        """Which of the ranks this is that split the data; 0 if nothing does.

        Args:
            wrappers: what the calls of a pass went through.
        """
        group = first_group(wrappers) if self.group is None else self.group
        return dist.get_rank(group) if group else 0

    def gives(self, name: str, other: Request) -> bool:
        """Whether its results of a quantity are those that another request asks for."""
        mine, wanted = self.quantities.get(name), other.quantities[name]
        return (
            mine is not None
            and type(mine) is type(wanted)
            and _has_same_options(mine, wanted)
            and self.modules == other.modules
            and (self.tol, self.signed) == (other.tol, other.signed)
        )

    @property
    def per_sample(self) -> list[str]:
        """The quantities that have a row for each sample."""
        return [name for name, quantity in self.quantities.items() if quantity.per_sample]

    @property
    def by_sample(self) -> list[str]:
        """The quantities for which it matters what a sample is: those that have a row for each, or
        see them, and those of each one's gradient.
        """
        found = [n for n, source in self.sources.items() if source is GRADIENT]
        return list(dict.fromkeys([*self._of_samples, *found]))

    @property
    def exact(self) -> list[Quantity]:
        """Those of exact columns."""
        return [q for name, q in self.quantities.items() if self.sources[name] is EXACT]

    @property
    def exact_of_samples(self) -> list[str]:
        """Those of exact columns for which it matters what a sample is."""
        return [name for name in self._of_samples if self.sources[name] is EXACT]

    @property
    def curvature_of_samples(self) -> list[str]:
        """Those that are of the curvature of each sample."""
        return [name for name in self._of_samples if self.sources[name] is not GRADIENT]

    @property
    def _of_samples(self) -> list[str]:
        return [n for n, q in self.quantities.items() if q.per_sample or q.sees_samples]

    def _check_tolerance(self, tol: float) -> None:
        if not 0 <= self.tol < 1:
            raise NNJError(
                f"tol={tol!r}: what may be lost of the trace is a number from 0 to below 1"
            )
        if self.tol and EXACT not in self.sources.values():
            raise NNJError(
                f"tol= leaves out exact columns, which {', '.join(self.quantities)} do not use"
            )

    def _check_signed(self) -> None:
        """Errors: `NNJError` for a quantity that is not linear in the Hessian, or a tolerance."""
        for name, quantity in self.quantities.items():
            if self.sources[name] is not EXACT or not is_sum(quantity):
                raise NNJError(
                    f"{name} cannot be collected with signed=True, which is for sums over the "
                    "exact Hessian of the loss, such as ggn_diag and ggn_block. Collect it in a "
                    "`with` of its own"
                )
        if self.tol:
            raise NNJError(
                "tol= gives a lower bound, but under signed=True the difference of two, which is "
                "none. Leave one out"
            )


def _has_same_options(one: Quantity, other: Quantity) -> bool:
    """Whether two quantities of one class were made with the same; a tensor or a generator is the
    same only as itself.
    """
    mine, others = vars(one), vars(other)
    return mine.keys() == others.keys() and all(
        value is others[name] or (not isinstance(value, Tensor) and bool(value == others[name]))
        for name, value in mine.items()
    )


def _number(tol: Any) -> float:
    """A tolerance as a number; NaN, which is none, for what cannot be one."""
    try:
        return float(tol)
    except (TypeError, ValueError):
        return math.nan


def _checked_modules(modules: Any) -> list[nn.Module]:
    if not isinstance(modules, (nn.Module, Iterable)):
        raise NNJError(f"modules= takes a list of torch.nn.Modules, not {type(modules).__name__}")
    found: list[nn.Module] = [modules] if isinstance(modules, nn.Module) else list(modules)
    if not found:
        raise NNJError(
            "modules=[] names no module to collect at. Leave it out for all of the model, or name "
            "one"
        )
    for module in found:
        if not isinstance(module, nn.Module):
            raise NNJError(f"modules= takes torch.nn.Modules, not {type(module).__name__}")
    return found
