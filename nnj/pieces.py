"""Factors of a parameter that a product sees in another arrangement: its transpose, or some of its rows."""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnj.factors import Factor
from nnj.sums import add


class Turned(Factor):
    """B of W, given that of W^T."""

    def __init__(self, factor: Factor):
        self.factor = factor
        self.shape = factor.shape[::-1]
        self.k, self.n, self.device, self.dtype = factor.k, factor.n, factor.device, factor.dtype

    def dense(self) -> Tensor:
        return self.factor.dense().mT

    def columns(self, which: slice) -> Factor:
        return Turned(self.factor.columns(which))

    def to(self, dtype: torch.dtype) -> Factor:
        return Turned(self.factor.to(dtype))

    def square_sum(self) -> Tensor:
        return self.factor.square_sum().mT

    def gram(self, other: Factor) -> Tensor:
        """Rows of the block are put in the order of W; so are its columns if the other is turned, too."""
        inner = other.factor if isinstance(other, Turned) else other
        found = self.factor.gram(self.factor if other is self else inner)
        found = found.reshape(*self.factor.shape, -1).transpose(0, 1).flatten(0, 1)
        if isinstance(other, Turned):
            found = found.reshape(-1, *inner.shape).transpose(1, 2).flatten(1)
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
    turned = [part.factor for part in parts if isinstance(part, Turned)]
    if len(turned) == len(parts):
        return Turned(add(turned))
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
