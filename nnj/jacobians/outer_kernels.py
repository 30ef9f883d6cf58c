"""B B'^T between all samples of B = V U^T with several places, by what costs less: pairs of places,
or rows of B, of which a part stands in memory at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnj.jacobians.factor import CHUNK
from nnj.jacobians.patches import Patches, outer


class Thin(NamedTuple):
    """V U^T, as its two thin factors.

    Attributes:
        v: V, (K, N, G, O, L).
        patches: U, (N, G, I, L).
    """

    v: Tensor
    patches: Patches

    @property
    def entries_of_channel(self) -> int:
        """Of the rows of B, in one output channel of each group."""
        k, n, g = self.v.shape[:3]
        return k * n * g * self.patches.inputs


def kernel_of_all(one: Thin, other: Thin) -> Tensor | None:
    """Between every two rows, (K, N, K', N'); None where one channel of all rows is too large."""
    if _meets_by_places(one, other):
        return _by_places(one, other)
    # of both, even where they are the same: what is made next to them is as large
    entries = one.entries_of_channel + other.entries_of_channel
    return _by_channels(one, other, max(1, CHUNK // max(1, entries))) if entries <= CHUNK else None


def _meets_by_places(one: Thin, other: Thin) -> bool:
    """Whether pairs of places cost less than rows of B do, in multiply-adds: a row is formed once
    for each sample, and met by all others.
    """
    (k, n, _, o, l), (q, m, _, _, places) = one.v.shape, other.v.shape
    pairs, i = n * m, one.patches.inputs
    by_places = pairs * l * (places * (i + q * o) + k * q * o)
    return by_places < o * i * (pairs * k * q + n * k * l + m * q * places)


def _by_places(one: Thin, other: Thin) -> Tensor:
    """sum_{g,l,m} (u_l u'_m) (v_l v'_m), the latter summed over m first."""
    (k, n, g, o, l), (q, m, _, _, places) = one.v.shape, other.v.shape
    total = one.v.new_zeros(k, n, q, m)
    theirs = other.patches()
    for rows in one.patches.parts(g * l * m * (places + q * o)):
        met = torch.einsum("ngil,pgim->ngplm", one.patches(rows), theirs)
        there = torch.einsum("ngplm,qpgom->ngloqp", met, other.v)
        total[:, rows] = torch.einsum("kngol,ngloqp->knqp", one.v[:, rows], there)
    return total


def _by_channels(one: Thin, other: Thin, step: int) -> Tensor:
    """The sum over output channels, `step` at a time, of which all rows are formed once."""
    (k, n, _, o, _), (q, m) = one.v.shape, other.v.shape[:2]
    total = one.v.new_zeros(k * n, q * m)
    for start in range(0, o, step):
        some = slice(start, start + step)
        b = _channels(one, some)
        total.addmm_(b, (b if other is one else _channels(other, some)).mT)
    return total.reshape(k, n, q, m)


def _channels(of: Thin, some: slice) -> Tensor:
    """Some output channels of all rows of B, (K N, G channels I)."""
    v, inputs = of.v[:, :, :, some], of.patches.inputs
    k, n, g, channels, l = v.shape
    parts = of.patches.parts(g * inputs * (l + k * channels))
    if len(parts) == 1:
        return outer(v, of.patches()).flatten(2).flatten(0, 1)
    found = v.new_empty(k, n, g * channels * inputs)
    for rows in parts:
        found[:, rows] = outer(v[:, rows], of.patches(rows)).flatten(2)
    return found.flatten(0, 1)
