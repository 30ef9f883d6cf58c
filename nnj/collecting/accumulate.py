"""How values add up: over the losses of a backward pass, over passes, and so over the batches of a
data set.

    sums over samples          are added;
    rows, one for each sample  are concatenated, with zeros for samples whose loss did
                               not reach the parameter.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Container, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nnj.collecting.quantity import Quantity, failed
from nnj.errors import NNJError

Holder: TypeAlias = "nn.Module | Tensor"


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

    Attributes:
        holders: every parameter and module that may hold a result, reached or not.
        exact: its exact columns.
    """

    def __init__(
        self,
        calls: frozenset[int] = frozenset(),
        n: int = 0,
        given: frozenset[int] = frozenset(),
    ):
        self.calls, self.n, self.given = calls, n, given
        self.holders: dict[Holder, None] = {}
        self.exact = ExactColumns()
        self._values: dict[str, dict[Holder, Any]] = {}

    def add(self, name: str, holder: Holder, value: Any) -> None:
        """The share of one chunk of columns."""
        mine = self._values.setdefault(name, {})
        mine[holder] = mine[holder] + value if holder in mine else value

    def finish(self, quantities: Mapping[str, Quantity]) -> None:
        """Make results of the sums over chunks."""
        for name, values in self._values.items():
            finish = quantities[name].finish
            try:
                for holder, value in values.items():
                    values[holder] = finish(value)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # of a stranger, who may exit
                raise failed(name, error) from error.__cause__ or error

    def names(self) -> list[str]:
        """The quantities that have values."""
        return list(self._values)

    def values(self, name: str) -> Mapping[Holder, Any]:
        """The results of a quantity, where the loss reached something."""
        return self._values.get(name, {})

    def of_quantities(self, names: Container[str]) -> Contribution:
        """The part of some quantities."""
        part = Contribution(self.calls, self.n)
        part.holders, part.exact = self.holders, self.exact
        part._values = {name: values for name, values in self._values.items() if name in names}
        return part

    def of_same_samples(self, other: Contribution) -> bool:
        """Whether another loss is one of the same samples."""
        return self.n == other.n and (bool(self.calls & other.calls) or self.calls == other.calls)

    def absorb(self, other: Contribution, factor: int = 1) -> None:
        """Add `factor` times another contribution of the same samples."""
        self.calls |= other.calls
        self.given |= other.given
        self.holders |= other.holders
        self.exact = self.exact.plus(other.exact)
        for name, values in other._values.items():
            for holder, value in values.items():
                self.add(name, holder, value if factor == 1 else factor * value)


class _Sum:
    """The sum of the values that reached one holder."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def add(self, found: list[tuple[int, Tensor]]) -> None:
        """Take in one pass: (the number of the first sample, value) for each group of samples."""
        value = functools.reduce(operator.add, [value for _, value in found])
        self._value = value if self._value is None else self._value + value

    def value(self, samples: int) -> Tensor | None:
        """The sum; None if nothing reached the holder."""
        return self._value

    @property
    def shape(self) -> torch.Size | None:
        """Of what one sample may add."""
        return None if self._value is None else self._value.shape


class _Rows:
    """The rows of all samples at one holder; they are joined only when somebody asks for them."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._length = 0

    def add(self, found: list[tuple[int, Tensor]]) -> None:
        """Take in one pass: (the number of the first sample, rows) for each group of samples."""
        for start, rows in found:
            if rows.untyped_storage().nbytes() != rows.nbytes:
                rows = rows.clone(memory_format=torch.contiguous_format)  # a view of all columns
            self._fill(start, rows)
            self._parts.append(rows)
            self._length += len(rows)

    def value(self, samples: int) -> Tensor | None:
        """(samples, ...); None if nothing reached the holder."""
        if not self._parts:
            return None
        self._fill(samples, self._parts[0])
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    @property
    def shape(self) -> torch.Size | None:
        """Of the row of one sample."""
        return self._parts[0].shape[1:] if self._parts else None

    def _fill(self, length: int, like: Tensor) -> None:
        """Zeros for the samples before number `length` that did not reach the holder."""
        if length > self._length:
            self._parts.append(like.new_zeros((length - self._length, *like.shape[1:])))
            self._length = length


class Accumulator:
    """The values of some quantities over all losses, passes and batches so far.

    Attributes:
        samples, passes: how many there were.
        exact: the exact columns of all losses.
        modules: those that hold results, or whose parameters do.
    """

    def __init__(self, quantities: Mapping[str, Quantity]):
        self.samples = self.passes = 0
        self.exact = ExactColumns()
        self._quantities = quantities
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # by quantity and holder, which is held weakly: what is collected goes with its parameter
        self._totals: dict[str, MutableMapping[Holder, _Sum | _Rows]] = {
            name: WeakIdKeyDictionary() for name in quantities
        }

    def add_pass(self, contributions: list[Contribution]) -> None:
        """Take in what the losses of one backward pass have added.

        Errors: `NNJError` for rows of samples where one loss is given some of the calls of another.
        """
        groups = _by_samples(contributions)
        for name, quantity in self._quantities.items():
            if quantity.per_sample:
                _check_apart(name, groups)
        for group in groups:
            self.modules.update(h for h in group.holders if isinstance(h, nn.Module))
        starts = [self.samples]
        for group in groups:
            starts.append(starts[-1] + group.n)
            self.exact = self.exact.plus(group.exact)
        for name in self._quantities:
            self._expect(name, groups)
            found: dict[Holder, list[tuple[int, Tensor]]] = {}
            for start, group in zip(starts, groups, strict=False):
                for holder, value in group.values(name).items():
                    found.setdefault(holder, []).append((start, value))
            for holder, values in found.items():
                self._totals[name][holder].add(values)
        self.samples, self.passes = starts[-1], self.passes + 1

    def let_go(self) -> None:
        """Forget the values, which have been given out, and so all parameters: nobody refers to
        them any more, not even weakly.
        """
        for name in self._totals:
            self._totals[name] = WeakIdKeyDictionary()

    def _expect(self, name: str, groups: list[Contribution]) -> None:
        """Know all that may hold a result of the quantity, reached or not."""
        quantity, totals = self._quantities[name], self._totals[name]
        for group in groups:
            for holder in group.holders:
                if isinstance(holder, nn.Module) == quantity.of_modules and holder not in totals:
                    totals[holder] = _Rows() if quantity.per_sample else _Sum()

    def values(self, name: str) -> list[tuple[Holder, Tensor | None]]:
        """Each parameter or module that may hold the quantity, with its value so far."""
        totals = self._totals[name].items()
        return [(holder, self._value(holder, total)) for holder, total in totals]

    def value(self, name: str, holder: Holder, factor: float = 1.0) -> Tensor | None:
        """`factor` times the value of a parameter or module so far, of its dtype, with the rows of
        all samples if there is one for each; None if nothing reached it.
        """
        total = self._totals[name].get(holder)
        return None if total is None else self._value(holder, total, factor)

    def value_or_zeros(self, name: str, p: Tensor, factor: float = 1.0) -> Tensor | None:
        """The value of a parameter; if nothing reached it zeros, where the quantity is known to
        have the shapes of parameters.
        """
        value = self.value(name, p, factor)
        if value is not None or not self._is_like_parameters(name):
            return value
        rows = (self.samples,) if self._quantities[name].per_sample else ()
        return p.detach().new_zeros((*rows, *p.shape))

    def _value(self, holder: Holder, total: _Sum | _Rows, factor: float = 1.0) -> Tensor | None:
        value = total.value(self.samples)
        if value is None:
            return None
        value = value if factor == 1 else value * factor
        return value.to(dtype_of(holder) or value.dtype)

    def _is_like_parameters(self, name: str) -> bool:
        return not self._quantities[name].of_modules and all(
            total.shape in (None, holder.shape)
            for holder, total in self._totals[name].items()
            if isinstance(holder, Tensor)
        )


def _by_samples(contributions: Iterable[Contribution]) -> list[Contribution]:
    """Those of the same samples added up, in the order of the forward calls that made them."""
    groups: list[Contribution] = []
    for part in sorted(contributions, key=lambda c: max(c.calls, default=0)):
        group = next((g for g in groups if g.of_same_samples(part)), None)
        if group is None:
            groups.append(part)
        else:
            group.absorb(part)
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
    return next((p.dtype for p in holder.parameters(recurse=False)), None)
