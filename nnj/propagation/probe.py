"""Finds out by numbers which entry on which edge belongs to which sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnj.errors import Coupled
from nnj.generators import OwnGenerator
from nnj.jacobians.sample_index import SampleIndex


class Probe:
    """Numbers the samples and lets the sweep carry the bits of the numbers backwards.

    With one random cotangent, column 2b holds the samples whose number has bit b, column 2b + 1 the
    others. An entry of any edge is non-zero in exactly the columns that spell the number of its
    sample; both columns of a pair mean that samples influence one another. 2 ceil(log2 n) columns
    tell all sample indices of a graph at once, in any order of rows."""

    DRAWS = 2  # cotangents: an entry is nobody's only if it is zero for each of them

    def __init__(self, n: int):
        self.bits = max(1, math.ceil(math.log2(n)))
        self.n = n
        # one for all roots, so that they do not cancel
        self.generator = OwnGenerator.seeded()

    def columns(self, sample_index: SampleIndex, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The columns that start at one root edge, (2 * bits * DRAWS, *shape)."""
        of = sample_index.of
        if of is None:
            of = torch.arange(shape[0], device=like.device) // (shape[0] // self.n)
            of = of.reshape(-1, *[1] * (len(shape) - 1))
        columns = []
        for _ in range(self.DRAWS):
            cotangent = self.cotangent(shape, like)
            for bit in range(self.bits):
                has, somebody = (of >> bit) & 1 == 1, of >= 0
                columns += [cotangent * (has & somebody), cotangent * (~has & somebody)]
        return torch.stack(columns)

    def cotangent(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Random numbers of a size from 1/2 to 1, so that small ones do not vanish on the way."""
        u = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return ((u - 0.5).sign() * (0.5 + u)).to(device=like.device, dtype=like.dtype)

    def sample_index(self, v: Tensor, who: str) -> SampleIndex:
        """Whose the entries of an edge are, from what arrived there. Errors: `NNJError` if samples
        influence one another.

        An entry where nothing arrived is given to the one sample of its row, if there is one: what
        arrives there later can only be what rounding leaves of zero."""
        nonzero = (v != 0).unflatten(0, (self.DRAWS, self.bits, 2)).any(0)
        one, zero = nonzero[:, 0], nonzero[:, 1]
        if bool((one & zero).any()):
            raise Coupled.at(who)
        weights = (2 ** torch.arange(self.bits, device=v.device)).reshape(-1, *[1] * (v.dim() - 1))
        every_bit_seen = (one | zero).all(0)
        number = torch.where(every_bit_seen, (one * weights).sum(0), -1)
        if number.dim() == 0 or number.numel() == 0:
            return SampleIndex(self.n, number)
        return SampleIndex(self.n, filled(number))


def filled(number: Tensor) -> Tensor:
    """Entries of nobody (-1) get the number of the others in their row, where these have one."""
    rows = number[..., None].flatten(1)
    largest = rows.amax(1, keepdim=True)
    one_sample = ((rows < 0) | (rows == largest)).all(1, keepdim=True)
    return torch.where(one_sample, largest, rows).reshape(number.shape)
