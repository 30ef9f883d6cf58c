"""A quantity is a contraction of the factors B = S^T J at a parameter, or at the parameters of a
module.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.jacobians.factor import Factor
from nnj.registry.manager import manager


class Quantity:
    """One thing to collect.

    Must define one of `parameter` (results are attributes of parameters) and `module` (of modules).
    May override `finish` and `check`, and the attributes below. Options are the keyword arguments
    of `__init__`; `nnj.collect` passes on those that it is given.

    Attributes:
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
        of_modules: whether results are attributes of modules; follows from what is defined.
    """

    source: ClassVar[str] = "exact"
    per_sample: ClassVar[bool] = False
    of_modules: ClassVar[bool] = False
    degree: ClassVar[int | None] = None
    draws: int = 1
    generator: Any = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if (cls.parameter is Quantity.parameter) == (cls.module is Quantity.module):
            raise TypeError(f"{cls.__name__} must define either parameter or module")
        cls.of_modules = cls.module is not Quantity.module

    # -- must define one ---------------------------------------------------------------------------

    def parameter(self, factor: Factor, total_columns: int) -> Any:
        """The contribution of one chunk of columns at one parameter.

        Args:
            factor: B at the parameter, for the columns of this chunk.
            total_columns: how many columns all chunks of this loss have together, by which a way to
                contract them may be chosen.

        Returns:
            Something that adds up over chunks with +, of which `finish` makes the result.
        """
        raise NotImplementedError(f"{type(self).__name__} must define parameter")

    def module(self, factors: list[Factor | None], params: list[nn.Parameter]) -> Any:
        """The contribution of one chunk of columns at a module's own parameters.

        Args:
            factors: B at each parameter; None where the loss does not reach it, at one at least it
                is not None.
            params: the module's own parameters that require grad.

        Returns:
            Something that adds up over chunks with +, of which `finish` makes the result.
        """
        raise NotImplementedError(f"{type(self).__name__} must define module")

    # -- may override ------------------------------------------------------------------------------

    def finish(self, value: Any) -> Tensor:
        """The result of one loss in one backward pass, from the sum over its chunks."""
        result: Tensor = value
        return result

    def check(self, module: nn.Module, params: list[nn.Parameter], path: str) -> None:
        """Called before any column is propagated, by quantities of modules alone.

        Errors: `NNJError` for what cannot be collected there.
        """


def failed(name: str, error: BaseException) -> NNJError:
    """The error for what a quantity has raised: its own refusal, or one that names it and its
    plugin.
    """
    if isinstance(error, NNJError):
        return error
    entry = manager().quantity(name)
    by = f", of plugin {entry.source}," if entry else ""
    return NNJError(f"the quantity {name!r}{by} failed with {type(error).__name__}: {error}")
