"""Metrics on parameters: what B M B'^T is, from the factors B at them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor, Pairs
from nnj.matrices.matrix import Matrix
from nnj.propagation.backward import Sink
from nnj.propagation.linearize import Linearization

Factors = Mapping[Tensor, Factor]  # by their parameters


class DiagonalMetric:
    """M = diag(m), or the identity: each parameter for itself.

    Args:
        scales: m at each parameter, (*shape), or (N, *shape) with one for each sample; None is the
            identity.

    Attributes:
        keeps: whether the factors at all parameters are kept until the last has come.
    """

    keeps = False

    def __init__(self, scales: Mapping[Tensor, Tensor] | None = None):
        self.scales = scales

    @classmethod
    def of(cls, at: Linearization[Any], m: Tensor | None) -> DiagonalMetric:
        """That of m, (N, P); None is the identity."""
        if m is None:
            return cls()
        alike = m.stride(0) == 0
        parts = at.by_leaf((m[:1] if alike else m)[None])
        return cls({leaf: t[0, 0] if alike else t[0] for leaf, t in parts.items()})

    def is_apart(self, leaves: set[Tensor]) -> bool:
        """Whether M is zero between these parameters and all others."""
        return True

    def meet(self, p: Tensor, factor: Factor, other: Factor, pairs: Pairs) -> Tensor:
        """The share of one parameter."""
        if self.scales is not None:
            other = other.scale(self.scales[p].to(factor.dtype))
        return factor.kernel(other, pairs)

    def contract(self, factors: Factors, other: Factors, pairs: Pairs) -> Tensor | None:
        """B M B'^T of all parameters; None if it is zero for want of any."""
        shares = [self.meet(p, f, other[p], pairs) for p, f in factors.items() if p in other]
        return functools.reduce(torch.add, shares) if shares else None  # a stack would copy them

    def summing(
        self, add: Callable[[Tensor], None], pairs: Pairs, kept: Factors | None = None
    ) -> tuple[Sink, Callable[[], None]]:
        """What takes the factors of some columns, one after the other, and what ends them: their
        kernel with themselves, or that of `kept` ones with them.
        """

        def take(p: Tensor, factor: Factor) -> None:
            if kept is None or p in kept:
                add(self.meet(p, factor if kept is None else kept[p], factor, pairs))

        return take, lambda: None


class MatrixMetric:
    """M of `nnj.matrices`.

    Args:
        names: of the parameters.
    """

    keeps = True

    def __init__(self, matrix: Matrix, names: Mapping[Tensor, str]):
        self.matrix, self.names = matrix, names

    def is_apart(self, leaves: set[Tensor]) -> bool:
        return self.matrix.is_apart({self.names[leaf] for leaf in leaves})

    def contract(self, factors: Factors, other: Factors, pairs: Pairs) -> Tensor | None:
        if not factors or not other:
            return None
        first = {self.names[p]: f for p, f in factors.items()}
        second = first if other is factors else {self.names[p]: f for p, f in other.items()}
        return self.matrix.contract(first, second, pairs)

    def summing(
        self, add: Callable[[Tensor], None], pairs: Pairs, kept: Factors | None = None
    ) -> tuple[Sink, Callable[[], None]]:
        factors: dict[Tensor, Factor] = {}

        def end() -> None:
            found = self.contract(factors if kept is None else kept, factors, pairs)
            if found is not None:
                add(found)

        return factors.__setitem__, end


AnyMetric = DiagonalMetric | MatrixMetric
