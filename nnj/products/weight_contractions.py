"""J M J^T and the diagonal of J^T M J' in the weights, from the factors at the parameters: J, which
has P entries for each output and sample, is not formed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nnj.jacobians.factor import Factor, Pairs
from nnj.propagation.chunking import columns_at_once
from nnj.propagation.linearize import Linearization

Meet = Callable[[Tensor, Factor, Factor], None]
MEMORY = 1 << 28  # bytes that columns which walk together may take


def push_forward_diagonal(at: Linearization, m: Tensor | None, to_diag: bool) -> Tensor:
    """J M J^T for M = diag(m), (N, out, out) or its diagonal (N, out).

    Args:
        m: (N, P), or None for the identity.
    """
    dtype = functools.reduce(torch.promote_types, [at.y.dtype, *(p.dtype for p in at.leaves)])
    shape = (at.n, at.out) if to_diag else (at.n, at.out, at.out)
    total = at.y.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    scales = {} if m is None else _by_leaf(at, m)
    pairs: Pairs = "row" if to_diag else "sample"
    groups = basis(at) if to_diag else (at.basis(),)

    def add(part: Tensor, p: Tensor, factor: Factor) -> None:
        other = factor if m is None else factor.scale(scales[p].to(factor.dtype))
        found = factor.kernel(other, pairs)
        part += found.mT if to_diag else found

    parts = total.split([len(u) for u in groups], 1)
    for u, part in zip(groups, parts, strict=True):
        at.factors(u, functools.partial(add, part))
    return total.to(dtype)


def _by_leaf(at: Linearization, m: Tensor) -> dict[Tensor, Tensor]:
    """A diagonal metric (N, P) at each parameter: (N, *shape), or (*shape) where it is one for all
    samples.
    """
    alike = m.stride(0) == 0
    parts = at.by_leaf((m[:1] if alike else m)[None])
    return {leaf: t[0, 0] if alike else t[0] for leaf, t in parts.items()}


def diagonal_pulled_back(
    at: Linearization, m: Tensor | None, other: Linearization | None = None
) -> Tensor:
    """The diagonal of J^T M J', (N, in or P), with J' at another point.

    Args:
        m: (N, out, out), or (N, out) for a diagonal; None for the identity.
        other: the point of J', by default that of J.
    """
    wide = torch.promote_types(at.y.dtype, torch.float32)
    total = at.y.new_empty(at.n, at.size, dtype=wide)
    shares = dict(zip(at.leaves, total.split(at.leaf_sizes, 1), strict=True))
    written: set[Tensor] = set()

    def add(leaf: Tensor, left: Factor, right: Factor) -> None:
        found = left.square_sum(True) if right is left else left.inner(right, True)
        found, share = found.reshape(at.n, -1), shares[leaf]
        share.add_(found) if leaf in written else share.copy_(found)
        written.add(leaf)

    for u in basis(at):
        if other is not None:
            _meet(at, u, other, _times(u, m), add)
        elif m is None or m.dim() == 2:
            c = None if m is None else (_flat(u) * m).sum(-1)
            _meet_itself(at, u, c, add)
        else:
            _meet(at, u, at, _times(u, m), add)
    for leaf in shares.keys() - written:
        shares[leaf].zero_()
    return total.to(at.y.dtype)


def _meet_itself(at: Linearization, u: Tensor, c: Tensor | None, add: Meet) -> None:
    """Rows u of the identity meet those of a diagonal metric: themselves, with the weights c of
    (k, N).
    """
    at.factors(u, lambda leaf, f: add(leaf, f, f if c is None else f.scale_rows(c)))


def _meet(at: Linearization, u: Tensor, other: Linearization, v: Tensor, add: Meet) -> None:
    """Rows u at a point meet rows v at another, or the same one, to which they go together."""
    if other is at:
        first, second = slice(0, len(u)), slice(len(u), 2 * len(u))
        both = torch.cat([u, v])
        at.factors(both, lambda leaf, f: add(leaf, f.columns(first), f.columns(second)))
        return
    there: dict[Tensor, Factor] = {}
    other.factors(v, there.__setitem__)
    partner = dict(zip(at.leaves, other.leaves, strict=True))

    def take(leaf: Tensor, f: Factor) -> None:
        if partner[leaf] in there:  # else it is zero
            add(leaf, f, there[partner[leaf]])

    at.factors(u, take)


def basis(at: Linearization) -> tuple[Tensor, ...]:
    """The unit cotangents, as many at a time as walk together."""
    size = at.out if at.sweep is None else columns_at_once(at.sweep, MEMORY)[0]
    groups: tuple[Tensor, ...] = at.basis().split(max(1, size))
    return groups


def _times(u: Tensor, m: Tensor | None) -> Tensor:
    """Rows u of the identity, (k, N, *outputs), times M."""
    if m is None:
        return u
    flat = _flat(u)
    found = flat * m if m.dim() == 2 else (flat.transpose(0, 1) @ m).transpose(0, 1)
    return found.reshape(u.shape)


def _flat(u: Tensor) -> Tensor:
    """Cotangents as (k, N, out); outputs without axes are one number."""
    return u.flatten(2) if u.dim() > 2 else u[..., None]
