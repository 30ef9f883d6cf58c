"""A parameter seen in another arrangement, or some rows of it: factors and Jacobians of a view."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnj.jacobians.factor import Factor
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.sample_index import SampleIndex
from nnj.jacobians.sums import merge_factors


@dataclass(frozen=True)
class Permutation:
    """Entries in another order: of `shape`, seen as `split`, whose axes are put in `order` and seen
    as `inner`.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    inner: tuple[int, ...]

    def put(self, t: Tensor) -> Tensor:
        """(..., *shape) -> (..., *inner)."""
        lead = t.shape[: t.dim() - len(self.shape)]
        return self._permuted(t.reshape(*lead, *self.split), len(lead), self.order).reshape(
            *lead, *self.inner
        )

    def back(self, t: Tensor) -> Tensor:
        """(..., *inner) -> (..., *shape)."""
        lead = t.shape[: t.dim() - len(self.inner)]
        t = t.reshape(*lead, *(self.split[axis] for axis in self.order))
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self._permuted(t, len(lead), inverse).reshape(*lead, *self.shape)

    @staticmethod
    def _permuted(t: Tensor, lead: int, order: Sequence[int]) -> Tensor:
        return t.permute(*range(lead), *(lead + axis for axis in order))


class PermutedFactor(Factor):
    """B of a parameter, given that of its entries in another arrangement."""

    def __init__(self, factor: Factor, arrangement: Permutation):
        self.factor, self.arrangement, self.shape = factor, arrangement, arrangement.shape
        self.k, self.n, self.device, self.dtype = factor.k, factor.n, factor.device, factor.dtype

    def dense(self) -> Tensor:
        return self.arrangement.back(self.factor.dense())

    def columns(self, which: slice) -> Factor:
        return PermutedFactor(self.factor.columns(which), self.arrangement)

    def to(self, dtype: torch.dtype) -> Factor:
        return PermutedFactor(self.factor.to(dtype), self.arrangement)

    def square_sum(self) -> Tensor:
        return self.arrangement.back(self.factor.square_sum())

    def gram(self, other: Factor) -> Tensor:
        """Rows of the block are put in the order of the parameter; so are its columns if the other
        is turned, too.
        """
        inner = other.factor if isinstance(other, PermutedFactor) else other
        found = self.factor.gram(self.factor if other is self else inner)
        found = self.arrangement.back(found.mT.reshape(-1, *self.factor.shape)).flatten(1).mT
        if isinstance(other, PermutedFactor):
            found = other.arrangement.back(found.reshape(-1, *inner.shape)).flatten(1)
        return found


class RowsFactor(Factor):
    """B of a parameter of which some rows are reached: parts (start, B of the rows from there),
    which do not overlap.
    """

    def __init__(self, parts: Sequence[tuple[int, Factor]], shape: Sequence[int]):
        self.parts, self.shape = list(parts), tuple(shape)
        first = self.parts[0][1]
        self.k, self.n, self.device, self.dtype = first.k, first.n, first.device, first.dtype

    def dense(self) -> Tensor:
        out = torch.zeros(self.k, self.n, *self.shape, dtype=self.dtype, device=self.device)
        for start, part in self.parts:
            out[:, :, start : start + part.shape[0]] = part.dense()
        return out

    def columns(self, which: slice) -> Factor:
        return RowsFactor([(start, part.columns(which)) for start, part in self.parts], self.shape)

    def to(self, dtype: torch.dtype) -> Factor:
        return RowsFactor([(start, part.to(dtype)) for start, part in self.parts], self.shape)

    def square_sum(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for start, part in self.parts:
            out[start : start + part.shape[0]] = part.square_sum()
        return out

    def gram(self, other: Factor) -> Tensor:
        width = math.prod(self.shape[1:])
        out = torch.zeros(
            math.prod(self.shape), math.prod(other.shape), dtype=self.dtype, device=self.device
        )
        for start, part in self.parts:
            a = slice(start * width, (start + part.shape[0]) * width)
            if not isinstance(other, RowsFactor):
                out[a] = part.gram(other)
                continue
            across = math.prod(other.shape[1:])
            for begin, piece in other.parts:
                out[a, begin * across : (begin + piece.shape[0]) * across] = part.gram(piece)
        return out


def merge_uses(parts: Sequence[Factor]) -> Factor:
    """One factor for all uses of a parameter, in the arrangement that they share."""
    turned = [part for part in parts if isinstance(part, PermutedFactor)]
    if len(turned) == len(parts) and len({part.arrangement for part in turned}) == 1:
        return PermutedFactor(
            merge_factors([part.factor for part in turned]), turned[0].arrangement
        )
    rows = [part for part in parts if isinstance(part, RowsFactor)]
    if len(rows) < len(parts):
        return merge_factors(parts)
    pieces: dict[tuple[int, int], list[Factor]] = {}
    for part in rows:
        for start, piece in part.parts:
            pieces.setdefault((start, piece.shape[0]), []).append(piece)
    ends = sorted((start, start + count) for start, count in pieces)
    if any(a[1] > b[0] for a, b in itertools.pairwise(ends)):
        return merge_factors(parts)
    return RowsFactor(
        [(start, merge_factors(found)) for (start, _), found in pieces.items()], rows[0].shape
    )


class PermutedJacobian(Jacobian):
    """J in p, given `j`, that in p.reshape(split).permute(order).reshape(j.inputs): the transpose
    of a matrix, say.

    Args:
        j: the operator in the entries as they are arranged.
        inputs: the shape of p.
        split: p's shape with axes taken apart, such as groups; by default that of p.
        order: of the axes of `split`; by default two axes change places.
    """

    def __init__(
        self,
        j: Jacobian,
        inputs: Sequence[int],
        split: Sequence[int] | None = None,
        order: Sequence[int] = (1, 0),
    ):
        super().__init__(inputs, j.outputs, j.like)
        self.j, self.split, self.order = j, tuple(inputs if split is None else split), tuple(order)
        self.arrangement = Permutation(self.inputs, self.split, self.order, j.inputs)

    def jvp(self, v: Tensor) -> Tensor:
        return self.j.jvp(self.arrangement.put(v))

    def vjp(self, u: Tensor) -> Tensor:
        return self.arrangement.back(self.j.vjp(u))

    def square(self) -> Jacobian:
        return self._with(self.j.square())

    def times(self, other: Jacobian) -> Jacobian:
        same = isinstance(other, PermutedJacobian) and other.arrangement == self.arrangement
        return self._with(self.j.times(other.j)) if same else super().times(other)  # type: ignore[attr-defined]

    def _with(self, j: Jacobian) -> Jacobian:
        return PermutedJacobian(j, self.inputs, self.split, self.order)

    def pullback(self, u: Tensor, sample_index: SampleIndex) -> Factor:
        return PermutedFactor(self.j.pullback(u, sample_index), self.arrangement)


class RowsJacobian(Jacobian):
    """The Jacobian in rows start to stop of a parameter as that in the whole of it."""

    def __init__(self, j: Jacobian, start: int, count: int):
        super().__init__((count, *j.inputs[1:]), j.outputs, j.like)
        self.j, self.start, self.stop = j, start, start + j.inputs[0]

    def jvp(self, v: Tensor) -> Tensor:
        return self.j.jvp(v[:, :, self.start : self.stop])

    def vjp(self, u: Tensor) -> Tensor:
        after = self.inputs[0] - self.stop
        return F.pad(self.j.vjp(u), [0, 0] * (len(self.inputs) - 1) + [self.start, after])

    def pullback(self, u: Tensor, sample_index: SampleIndex) -> Factor:
        return RowsFactor([(self.start, self.j.pullback(u, sample_index))], self.inputs)
