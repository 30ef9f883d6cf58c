"""A quantity is a contraction of the factors B = S^T J: at each parameter, at the parameters of
each module, or at all parameters together.

    parameter, module, joint   what one chunk of columns adds (one of them must be defined)
    start, add                 the state of a place, chunk by chunk
    end_pass                   what is kept of one loss in one backward pass
    merge                      two passes, batches, ranks or files
    finish, totals             results at a place, and over all places
    matrix                     what matrix a result is

States are tensors, or lists and dicts of tensors and plain values, so that they can be traced, kept
in files and reduced over ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nnj.errors import NNJError
from nnj.jacobians.factor import Factor
from nnj.jacobians.square_sum import SquareSum
from nnj.matrices.matrix import Matrix
from nnj.registry.manager import manager


class Whole:
    """The place of what belongs to all parameters together: results stand on the context."""


WHOLE = Whole()
Holder: TypeAlias = "nn.Module | Tensor | Whole"

# By the method that a quantity defines: the class of its places.
_PLACES: dict[str, type] = {"parameter": Tensor, "module": nn.Module, "joint": Whole}


class Quantity:
    """One thing to collect.

    Must define one of `parameter` (results are attributes of parameters), `module` (of modules) and
    `joint` (of the context of `nnj.collect`), or `add` and `place`. May override the other methods,
    and the attributes below, on the class or on the instance. Options are the keyword arguments of
    `__init__`; `nnj.collect` passes on those that it is given.

    Attributes:
        name: under which results stand where an instance is given to `nnj.collect`; by default the
            name under which its class is installed, or that of the class in small letters.
        source: where its columns come from: "exact" (the factor S of the loss's Hessian), "signs"
            (`draws` random combinations of its columns, each an unbiased factor) or "gradient"
            (one column, the gradient of the loss).
        draws: how many combinations, for "signs".
        generator: the `torch.Generator` of these draws, on the device of the output; None is
            torch's own.
        degree: a loss that is c times as large has a result that is c**degree times as large;
            `nnj.fit` divides by it for a mean, and refuses a mean where it is None.
        per_sample: results have the samples in axis 0. Those of further samples are put behind
            them, not added, and are zero for samples that did not reach the parameter. Without it
            they are sums over samples, and of exact columns a factor may have a sample for each row
            of the loss (a token), of which no two are mixed at this parameter.
        sees_samples: whether it matters which rows are one sample though results are sums, as where
            places of a sample are added up first.
        skips_zeros: of "exact", whether what a chunk adds is a sum over its columns and samples of
            products of entries of B alone, which samples with zeros add nothing to. Then, with a
            tolerance, a factor may be of some of the samples, and its columns are all there are.
        quadratic: of "gradient", whether results are not linear in the gradient. Then those of two
            losses of the same samples do not add up, and are refused.
        entrywise: whether a result at a parameter has an entry (or a row) for each of its entries,
            so that a part of the parameter has a part of the result; else it is a sum over them.
        of_rank: whether the result is one of the samples of this process alone, and is not merged
            with those of others.
        place: the class of what holds results, `Tensor`, `nn.Module` or `nnj.Whole`; follows from
            what is defined.
    """

    name: str | None = None
    source: str = "exact"
    draws: int = 1
    generator: Any = None
    degree: int | None = None
    per_sample: bool = False
    sees_samples: bool = False
    skips_zeros: bool = False
    quadratic: bool = False
    entrywise: bool = True
    of_rank: bool = False
    place: ClassVar[type] = Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = (p for ask, p in _PLACES.items() if getattr(cls, ask) is not getattr(Quantity, ask))
        places = list(own) or [cls.place] * (cls.add is not Quantity.add)
        if len(places) != 1:
            raise TypeError(f"{cls.__name__} must define one of {', '.join(_PLACES)}")
        (cls.place,) = places

    # -- must define one ---------------------------------------------------------------------------

    def parameter(self, factor: Factor, total_columns: int) -> Any:
        """The contribution of one chunk of columns at one parameter.

        Args:
            factor: B at the parameter, for the columns of this chunk.
            total_columns: how many columns all chunks of this loss have together, by which a way to
                contract them may be chosen.

        Returns:
            Something that adds up over chunks with +, of which `end_pass` makes a state.
        """
        raise NotImplementedError(f"{type(self).__name__} must define parameter")

    def module(self, factors: list[Factor | None], params: list[nn.Parameter]) -> Any:
        """The contribution of one chunk of columns at a module's own parameters.

        Args:
            factors: B at each parameter; None where the loss does not reach it, at one at least it
                is not None.
            params: the module's own parameters that require grad.

        Returns:
            Something that adds up over chunks with +, of which `end_pass` makes a state.
        """
        raise NotImplementedError(f"{type(self).__name__} must define module")

    def joint(self, factors: list[Factor | None], params: list[nn.Parameter]) -> Any:
        """The same at all parameters at which is collected, in the order of `parameters()`."""
        raise NotImplementedError(f"{type(self).__name__} must define joint")

    # -- may override: what is needed before -------------------------------------------------------

    def first(self) -> Quantity | None:
        """Another quantity that must be known before the first column is taken in; None if there is
        none, or if it has been `given`. `nnj.fit` reads all data for it, and then anew for this
        one; in `nnj.collect` the columns of a loss walk twice.
        """
        return None

    def given(self, results: Mapping[Any, Any] | None) -> None:
        """Take in the results of `first` by their places; None takes them away again."""

    # -- may override: one loss in one backward pass -----------------------------------------------

    def check(self, module: nn.Module | None, params: list[nn.Parameter], path: str) -> None:
        """Called before any column is propagated, by quantities of modules for each of them, and by
        joint ones once (then there is no module).

        Errors: `NNJError` for what cannot be collected there.
        """

    def start(self, place: Holder, params: list[nn.Parameter]) -> Any:
        """The state of a place before the first chunk."""
        return None

    def add(
        self,
        state: Any,
        factors: list[Factor | None],
        params: list[nn.Parameter],
        total_columns: int,
    ) -> Any:
        """The state with one chunk of columns more: by default plus what `parameter`, `module` or
        `joint` gives.
        """
        value: Any
        if self.place is Tensor:
            factor = factors[0]
            assert factor is not None  # at a parameter to which columns came
            value = self.parameter(factor, total_columns)
        elif self.place is Whole:
            value = self.joint(factors, params)
        else:
            value = self.module(factors, params)
        return value if state is None else state + value

    def end_pass(self, state: Any) -> Any:
        """What is kept of one loss in one backward pass, when its last chunk was added: by default
        the state, or of a `SquareSum` its value.
        """
        return state.value() if isinstance(state, SquareSum) else state

    # -- may override: several ---------------------------------------------------------------------

    def merge(self, one: Any, other: Any) -> Any:
        """The state of two backward passes, batches, ranks or files, of other samples: by default
        tensors are added, and plain values must be equal. Rows of `per_sample` never come here. A
        state that is None, as of samples of which nothing is known, does so only with another one
        that is not, which by default is an error.
        """
        return added(one, other)

    def merge_losses(self, one: Any, other: Any) -> Any:
        """The state of two losses of the same samples in one backward pass: by default tensors are
        added.

        Errors: `NNJError` where the quantity is `quadratic`.
        """
        if self.quadratic:
            raise two_losses(self)
        return added(one, other)

    # -- may override: results ---------------------------------------------------------------------

    def finish(self, state: Any, samples: int) -> Any:
        """The result at a place, a tensor or a matrix, of the state of all `samples`. It may be
        asked for after each pass.
        """
        return state

    def totals(self, states: Mapping[Any, Any], samples: int) -> dict[str, tuple[Tensor, int]]:
        """What stands on the context, made of the states of all places that were reached: by name a
        tensor and its degree. By default it is the result of a `joint` quantity.
        """
        if self.place is not Whole or WHOLE not in states:
            return {}
        return {named(self): (self.finish(states[WHOLE], samples), self.degree or 0)}

    def matrix(self, result: Any, shapes: Mapping[str, Sequence[int]]) -> Matrix | None:
        """The matrix that a result is, over the parameters of its place, whose shapes are given by
        their names; None if it is none, or none of all of them.
        """
        return None


def two_losses(quantity: Quantity) -> NNJError:
    """The error of what is quadratic in a sample's gradient, for two losses of the same samples."""
    return NNJError(
        f"{named(quantity)}: two losses of the same samples are in one backward pass, and what is "
        "quadratic in a sample's gradient is not the sum of theirs. Make one loss of them: "
        "nnj.extend a function of all their outputs and targets"
    )


def named(quantity: Quantity) -> str:
    """The name under which the results of an instance stand."""
    if quantity.name is not None:
        return quantity.name
    for entry in manager().entries("quantity"):
        if entry.rule is type(quantity):
            return str(entry.key)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(quantity).__name__)
    return words.strip("_").lower()


def is_sum(quantity: Quantity) -> bool:
    """Whether results of other samples are simply added."""
    return not quantity.per_sample and type(quantity).merge is Quantity.merge


def is_sum_of_chunks(quantity: Quantity) -> bool:
    """Whether what is added chunk by chunk, and loss by loss, is a sum, so that parts of it may be
    added in any order.
    """
    cls, own = type(quantity), ("start", "add", "end_pass", "merge_losses")
    as_usual = all(getattr(cls, name) is getattr(Quantity, name) for name in own)
    return as_usual and is_sum(quantity) and not quantity.of_rank and cls.place is not Whole


def is_simple(quantity: Quantity) -> bool:
    """Whether results are states, that are added or put one behind the other."""
    cls = type(quantity)
    combined = quantity.per_sample or cls.merge is Quantity.merge
    made = cls.finish is not Quantity.finish or cls.totals is not Quantity.totals
    return combined and not made and cls.place is not Whole


def has_totals(quantity: Quantity) -> bool:
    """Whether anything of it may stand on the context."""
    return quantity.place is Whole or type(quantity).totals is not Quantity.totals


def added(one: Any, other: Any) -> Any:
    """The sum of two states, tensor by tensor. Errors: `NNJError` for states of another form."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _plus(one, other)
    mine, form = tree_flatten(one)
    theirs, form_of_other = tree_flatten(other)
    if form != form_of_other:
        raise NNJError(
            "states of two passes have other forms, so that they cannot be added. Collect over "
            "models and losses that do not change"
        )
    return tree_unflatten([_plus(a, b) for a, b in zip(mine, theirs, strict=True)], form)


def _plus(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return a + b
    if isinstance(a, Tensor) or a != b:
        facts = (tuple(v.shape) if isinstance(v, Tensor) else v for v in (a, b))
        raise NNJError(
            "states of two passes have other facts ({!r} and {!r}), so that they cannot be "
            "added. Collect over models and losses that do not change".format(*facts)
        )
    return a


def times(result: Any, factor: float) -> Any:
    """A result times a number."""
    return result if factor == 1 else result * factor


def of_dtype(result: Any, dtype: torch.dtype | None) -> Any:
    """A tensor in the dtype of its parameter; matrices keep theirs, in which they are solved."""
    return result.to(dtype) if isinstance(result, Tensor) and dtype is not None else result


def failed(name: str, error: BaseException) -> NNJError:
    """The error for what a quantity has raised: its own refusal, or one that names it and its
    plugin.
    """
    if isinstance(error, NNJError):
        return error
    entry = manager().quantity(name)
    by = f", of plugin {entry.source}," if entry else ""
    return NNJError(f"the quantity {name!r}{by} failed with {type(error).__name__}: {error}")
