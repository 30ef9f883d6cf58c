"""B D B'^T within each sample for B = V U^T of several places: with rows of B formed, or from the
products U^T D U' of the places.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nnj.checks import being_traced
from nnj.jacobians.factor import Pairs
from nnj.jacobians.outer_kernels import Thin

# Entries that are formed at a time: what the inner caches of a CPU serve, and enough for a GPU to
# be busy; products of two rows are cheap where rows are LONG. From LARGE multiply-adds of one
# sample on, a CPU is busy with it alone.
FORMED = 1 << 19
FORMED_ON_GPU = 1 << 24
LONG = 1 << 12
LARGE = 1 << 22


def kernel_within(one: Thin, other: Thin, d: Tensor | None, pairs: Pairs) -> Tensor:
    """sum_goi d B B', between all columns of a sample (N, K, K'), or equal ones (N, K).

    Args:
        one, other: of the same samples; the same object where they are one.
        d: (N or 1, G, O, I); None is the identity.
        pairs: "sample" or "row", as in `Factor.kernel`.
    """
    k, n = one.v.shape[:2]
    shape = (n, k, len(other.v)) if pairs == "sample" else (n, k)
    if 0 in one.v.shape or 0 in other.v.shape:
        return one.v.new_zeros(shape)
    if _is_cheaper_by_places(one, other, d is not None, pairs):
        # rows of B are differences of these: single precision would leave noise, even below zero
        return _by_places(one, other, d, pairs, one.v.new_zeros(shape, dtype=torch.float64))
    return _by_rows(one, other, d, pairs, one.v.new_zeros(shape))


def _is_cheaper_by_places(one: Thin, other: Thin, scaled: bool, pairs: Pairs) -> bool:
    """Whether the products of places cost less than rows of B, in multiply-adds of single
    precision: those in double count twice, and small matrices three times; 4 is what another
    operation costs beside one.
    """
    (k, _, _, o, l), (q, _, _, _, m) = one.v.shape, other.v.shape
    i, within = one.patches.inputs, pairs == "sample"
    formed = k * l if one is other else k * l + q * m
    rows = o * i * (formed + 4 * k + (k * q if within else 4 * k))
    met = o * i * l * (3 * m + 4) if scaled else l * m * i
    places = met + o * k * m * (l + 4 + (q if within else 4))
    return 2 * places < rows


def _samples(one: Thin, other: Thin, room: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """As many samples at a time as have room, one at least, and their U and U'."""
    n = one.patches.n
    for a in range(0, n, max(1, room)):
        rows = slice(a, min(a + max(1, room), n))
        u = one.patches(rows)
        yield rows, u, u if one is other else other.patches(rows)


def _channels(one: Thin, room: int) -> Iterator[slice]:
    """As many channels at a time as have room, one at least."""
    o = one.v.shape[3]
    for c in range(0, o, max(1, room)):
        yield slice(c, min(c + max(1, room), o))


def _room(v: Tensor, least: int = 0) -> int:
    """The entries to be formed at a time, `least` in any case."""
    return max(FORMED, least) if _on_cpu(v) else FORMED_ON_GPU


def _on_cpu(v: Tensor) -> bool:
    """Whether this is a CPU that decides while it computes, so that few entries at a time pay."""
    return v.device.type == "cpu" and not being_traced()


def _of_block(d: Tensor | None, rows: slice, channels: slice) -> Tensor | None:
    """d of some samples and channels, (samples or 1, G, channels, I)."""
    return None if d is None else (d if len(d) == 1 else d[rows])[:, :, channels]


# -- rows of B -------------------------------------------------------------------------------------


def _by_rows(one: Thin, other: Thin, d: Tensor | None, pairs: Pairs, total: Tensor) -> Tensor:
    k, _, g, o, l = one.v.shape
    i = one.patches.inputs
    size, room = (k + len(other.v)) * g * i, _room(one.v, LONG * k)
    alone = _on_cpu(one.v) and k * g * o * i * l >= LARGE  # of several samples V would be copied
    for rows, u, t in _samples(one, other, 1 if alone else room // (size * o)):
        for channels in _channels(one, room // size):
            # (K, samples, G o I), without a copy of V
            b = (one.v[:, rows, :, channels] @ u.mT).flatten(2)
            c = b if one is other else (other.v[:, rows, :, channels] @ t.mT).flatten(2)
            m = _of_block(d, rows, channels)
            m = None if m is None else m.flatten(1)  # (samples or 1, G o I)
            if pairs == "sample":
                total[rows] += (b if m is None else b * m).transpose(0, 1) @ c.permute(1, 2, 0)
            else:
                total[rows] += _summed(b * c, m).mT
    return total


def _summed(t: Tensor, m: Tensor | None) -> Tensor:
    """The sum of t, (K, samples, X), with the weights m of (samples or 1, X)."""
    if m is None:
        return t.sum(2)
    return t @ m[0] if len(m) == 1 else (t * m).sum(2)


# -- places ----------------------------------------------------------------------------------------


def _by_places(one: Thin, other: Thin, d: Tensor | None, pairs: Pairs, total: Tensor) -> Tensor:
    k, _, g, o, l = one.v.shape
    m, room = other.v.shape[-1], _room(one.v)
    size = g * (k * m if d is None else k * m + l * (one.patches.inputs + m))
    for rows, u, t in _samples(one, other, room // (size * o)):
        u, t = u.double(), t.double()
        met = u.mT @ t if d is None else None  # (samples, G, L, M)
        for channels in _channels(one, room // size):
            v = _by_channel(one, rows, channels)
            w = v if one is other else _by_channel(other, rows, channels)
            weight = _of_block(d, rows, channels)
            if weight is None:
                assert met is not None
                v = (v.flatten(2, 3) @ met).unflatten(2, v.shape[2:4])
            else:
                v = v @ ((u.mT[:, :, None] * weight.double()[:, :, :, None]) @ t[:, :, None])
            if pairs == "sample":
                total[rows] += _joined(v) @ _joined(w).mT
            else:
                total[rows] += (v * w).sum((1, 2, 4))
    return total


def _by_channel(f: Thin, rows: slice, channels: slice) -> Tensor:
    """V of a block, (samples, G, o, K, L)."""
    return f.v[:, rows, :, channels].double().permute(1, 2, 3, 0, 4)


def _joined(t: Tensor) -> Tensor:
    """(samples, G, o, K, L) -> (samples, K, G o L)."""
    return t.permute(0, 3, 1, 2, 4).flatten(2)
