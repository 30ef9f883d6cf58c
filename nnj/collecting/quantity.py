"""What a quantity is: which columns it wants, and what it asks of their factors at a parameter or a
module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.jacobians.factor import Factor
from nnj.registry.manager import manager


class Quantity:
    """One thing to collect. A subclass names its columns and defines `parameter` or `module`.

    Options are the keyword arguments of `__init__`; `nnj.collect` passes on those that it is given.

    Attributes:
        source: where its columns come from: "exact" (the factor of the loss's Hessian), "signs"
            (`draws` random combinations of it, each an unbiased factor) or "gradient"
            (one column, the gradient of the loss).
        degree: a loss that is c times as large has a result that is c**degree times as large;
            `nnj.fit` divides by it for a mean, and refuses a mean where it is None.
        per_sample: results have the samples in axis 0; those of several backward passes are
            concatenated, not added.
    """

    source: ClassVar[str] = "exact"
    per_sample: ClassVar[bool] = False
    degree: ClassVar[int | None] = None
    draws: int = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if (cls.parameter is Quantity.parameter) == (cls.module is Quantity.module):
            raise TypeError(f"{cls.__name__} must define either parameter or module")

    @property
    def of_modules(self) -> bool:
        """Whether results stand on modules."""
        return type(self).module is not Quantity.module

    def parameter(self, factor: Factor, in_all: int) -> Any:
        """The contribution of some columns at one parameter, of `in_all` that will come.
        Contributions add up (+).
        """
        raise NotImplementedError(f"{type(self).__name__} must define parameter")

    def module(self, factors: list[Factor | None], params: list[nn.Parameter]) -> Tensor:
        """The contribution of some columns at a module's own parameters
        (factor None: not reached).
        """
        raise NotImplementedError(f"{type(self).__name__} must define module")

    def finish(self, value: Any) -> Tensor:
        """The result of one backward pass, from the sum of the contributions."""
        return value

    def check(self, module: nn.Module, params: list[nn.Parameter], path: str) -> None:
        """Called before any column walks. Errors: `NNJError` for what cannot be collected there."""


def asked(name: str, ask: Callable[..., Any], *about: Any) -> Any:
    """What a quantity says. Errors: `NNJError` naming it with its plugin, in which the fault mostly
    is.
    """
    try:
        return ask(*about)
    except NNJError:
        raise
    except Exception as error:
        entry = manager().quantity(name)
        by = f", of plugin {entry.source}," if entry else ""
        raise NNJError(
            f"the quantity {name!r}{by} failed with {type(error).__name__}: {error}"
        ) from error
