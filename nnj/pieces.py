"""Factors of a parameter that a product sees in another arrangement: its transpose, or some of its rows."""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnj.factors import Factor
from nnj.sums import add


@dataclass(frozen=True)
class Arrangement:
    """Entries in another order: of `shape`, seen as `split`, whose axes are put in `order` and seen as `inner`."""

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    inner: tuple[int, ...]

    def put(self, t: Tensor) -> Tensor:
        """(..., *shape) -> (..., *inner)."""
        lead = t.shape[: t.dim() - len(self.shape)]
        return self._permuted(t.reshape(*lead, *self.split), len(lead), self.order).reshape(*lead, *self.inner)

    def back(self, t: Tensor) -> Tensor:
        """(..., *inner) -> (..., *shape)."""
        lead = t.shape[: t.dim() - len(self.inner)]
        t = t.reshape(*lead, *(self.split[axis] for axis in self.order))
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self._permuted(t, len(lead), inverse).reshape(*lead, *self.shape)

    @staticmethod
    def _permuted(t: Tensor, lead: int, order: Sequence[int]) -> Tensor:
        return t.permute(*range(lead), *(lead + axis for axis in order))


class Turned(Factor):
    """B of a parameter, given that of its entries in another arrangement."""

    def __init__(self, factor: Factor, arrangement: Arrangement):
        self.factor, self.arrangement, self.shape = factor, arrangement, arrangement.shape
        self.k, self.n, self.device, self.dtype = factor.k, factor.n, factor.device, factor.dtype

    def dense(self) -> Tensor:
        return self.arrangement.back(self.factor.dense())

    def columns(self, which: slice) -> Factor:
        return Turned(self.factor.columns(which), self.arrangement)

    def to(self, dtype: torch.dtype) -> Factor:
        return Turned(self.factor.to(dtype), self.arrangement)

    def square_sum(self) -> Tensor:
        return self.arrangement.back(self.factor.square_sum())

    def gram(self, other: Factor) -> Tensor:
        """Rows of the block are put in the order of the parameter; so are its columns if the other is turned, too."""
        inner = other.factor if isinstance(other, Turned) else other
        found = self.factor.gram(self.factor if other is self else inner)
        found = self.arrangement.back(found.mT.reshape(-1, *self.factor.shape)).flatten(1).mT
        if isinstance(other, Turned):
            found = other.arrangement.back(found.reshape(-1, *inner.shape)).flatten(1)
        return found


class Rows(Factor):
    """B of a parameter of which some rows are reached: parts (start, B of the rows from there), which do not overlap."""

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
        return Rows([(start, part.columns(which)) for start, part in self.parts], self.shape)

    def to(self, dtype: torch.dtype) -> Factor:
        return Rows([(start, part.to(dtype)) for start, part in self.parts], self.shape)

    def square_sum(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for start, part in self.parts:
            out[start : start + part.shape[0]] = part.square_sum()
        return out

    def gram(self, other: Factor) -> Tensor:
        width = math.prod(self.shape[1:])
        out = torch.zeros(math.prod(self.shape), math.prod(other.shape), dtype=self.dtype, device=self.device)
        for start, part in self.parts:
            a = slice(start * width, (start + part.shape[0]) * width)
            if not isinstance(other, Rows):
                out[a] = part.gram(other)
                continue
            across = math.prod(other.shape[1:])
            for begin, piece in other.parts:
                out[a, begin * across : (begin + piece.shape[0]) * across] = part.gram(piece)
        return out


def add_uses(parts: Sequence[Factor]) -> Factor:
    """One factor for all uses of a parameter, in the arrangement that they share."""
    turned = [part for part in parts if isinstance(part, Turned)]
    if len(turned) == len(parts) and len({part.arrangement for part in turned}) == 1:
        return Turned(add([part.factor for part in turned]), turned[0].arrangement)
    rows = [part for part in parts if isinstance(part, Rows)]
    if len(rows) < len(parts):
        return add(parts)
    pieces: dict[tuple[int, int], list[Factor]] = {}
    for part in rows:
        for start, piece in part.parts:
            pieces.setdefault((start, piece.shape[0]), []).append(piece)
    ends = sorted((start, start + count) for start, count in pieces)
    if any(a[1] > b[0] for a, b in itertools.pairwise(ends)):
        return add(parts)
    return Rows([(start, add(found)) for (start, _), found in pieces.items()], rows[0].shape)
