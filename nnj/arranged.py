"""The Jacobian in a parameter whose entries another operator has in another order."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nnj.factors import Factor
from nnj.operators import Jacobian
from nnj.owners import Owner
from nnj.pieces import Arrangement, Turned


class Arranged(Jacobian):
    """J in p, given `j`, that in p.reshape(split).permute(order).reshape(j.inputs): the transpose of a matrix, say.

    Args:
        j: the operator in the entries as they are arranged.
        inputs: the shape of p.
        split: p's shape with axes taken apart, such as groups; by default that of p.
        order: of the axes of `split`; by default two axes change places.
    """

    def __init__(self, j: Jacobian, inputs: Sequence[int], split: Sequence[int] | None = None, order: Sequence[int] = (1, 0)):
        super().__init__(inputs, j.outputs, j.like)
        self.j, self.split, self.order = j, tuple(inputs if split is None else split), tuple(order)
        self.arrangement = Arrangement(self.inputs, self.split, self.order, j.inputs)

    def jvp(self, v: Tensor) -> Tensor:
        return self.j.jvp(self.arrangement.put(v))

    def vjp(self, u: Tensor) -> Tensor:
        return self.arrangement.back(self.j.vjp(u))

    def square(self) -> Jacobian:
        return self._with(self.j.square())

    def times(self, other: Jacobian) -> Jacobian:
        same = isinstance(other, Arranged) and other.arrangement == self.arrangement
        return self._with(self.j.times(other.j)) if same else super().times(other)  # type: ignore[attr-defined]

    def _with(self, j: Jacobian) -> Jacobian:
        return Arranged(j, self.inputs, self.split, self.order)

    def pullback(self, u: Tensor, owner: Owner) -> Factor:
        return Turned(self.j.pullback(u, owner), self.arrangement)
