"""J M J^T, kernels and the diagonal of J^T M J' in the weights, from the factors at the parameters:
J, which has P entries for each output and sample, is not formed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from nnj.graph.step import Step
from nnj.jacobians.factor import Factor
from nnj.jacobians.patches import Patches
from nnj.jacobians.shared_columns import SharedColumns, Unit
from nnj.loss_hessian.base import LossHessian
from nnj.propagation.backward import Sink, Sweep
from nnj.propagation.chunking import columns_at_once, columns_kept, even
from nnj.propagation.last_layer import LastLayerColumns
from nnj.propagation.linearize import Linearization
from nnj.propagation.weight_metrics import AnyMetric
from nnj.recording.records import Edge

Meet = Callable[[Tensor, Factor, Factor], None]


# -- J M J^T ---------------------------------------------------------------------------------------


def pushed_forward(at: Linearization[Any], metric: AnyMetric, to_diag: bool) -> Tensor:
    """J M J^T, (N, out, out), or its diagonal (N, out)."""
    dtype = functools.reduce(torch.promote_types, [at.y.dtype, *(p.dtype for p in at.leaves)])
    shape = (at.n, at.out) if to_diag else (at.n, at.out, at.out)
    total = at.y.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    last = _last_layer(at, metric)
    walk = _walk(at, last)
    if walk is not None:
        (_add_variance if to_diag else _add_covariance)(walk, metric, at.memory, total)
    if last is not None:
        found = metric.contract(
            dict(last.factors), dict(last.factors), "row" if to_diag else "sample"
        )
        if found is not None:
            total += found.mT if to_diag else found
    return total.to(dtype)


class _Walk(NamedTuple):
    """What sends the unit cotangents back through some steps.

    Attributes:
        basis: those of all outputs where they set out, (out, N, *shape).
        steps: None is all of them.
    """

    sweep: Sweep
    edge: Edge
    basis: Tensor
    steps: list[Step] | None

    def send(self, which: slice, take: Sink) -> None:
        """Those of some outputs."""
        u = self.basis[which]
        self.sweep.run({self.edge: u}, len(u), take, self.steps)


def _walk(at: Linearization[Any], last: LastLayerColumns | None) -> _Walk | None:
    """From the output, or behind its last layers; None where nothing is to be reached."""
    if at.sweep is None:
        return None
    if last is None:
        return _Walk(at.sweep, at.sweep.graph.roots[0], at.basis(), None)
    steps = at.sweep.graph.steps[len(last.steps) :]
    if not steps:
        return None
    (basis,) = last.walked(at.out)
    return _Walk(at.sweep, last.edge, basis, steps)


def _add_variance(walk: _Walk, metric: AnyMetric, memory: int, total: Tensor) -> None:
    """Add the diagonals of J M J^T, as many outputs at a time as `memory` and caches hold."""
    fits, likes = columns_at_once(walk.sweep, memory)
    if metric.keeps:
        fits = columns_kept(walk.sweep, memory)
    out = total.shape[1]
    for which in _slices(out, even(out, fits, min(fits, likes))):
        take, end = metric.summing(_adding(total[:, which].mT), "row")
        walk.send(which, take)
        end()


def _add_covariance(walk: _Walk, metric: AnyMetric, memory: int, total: Tensor) -> None:
    """Add J M J^T. What `memory` does not hold at once goes in chunks: the factors of one are kept
    while all later ones walk, since M is symmetric.
    """
    out, keeps = total.shape[1], metric.keeps
    if out <= (columns_kept if keeps else _fitting)(walk.sweep, memory):
        take, end = metric.summing(_adding(total), "sample")
        walk.send(slice(0, out), take)
        end()
        return
    half = memory // 2
    for rows in _slices(out, columns_kept(walk.sweep, half)):
        mine: dict[Tensor, Factor] = {}
        walk.send(rows, mine.__setitem__)
        found = metric.contract(mine, mine, "sample")
        if found is not None:
            total[:, rows, rows] += found
        size = (columns_kept if keeps else _fitting)(walk.sweep, half)
        for columns in _slices(out, size, rows.stop):
            part = total.new_zeros(len(total), rows.stop - rows.start, columns.stop - columns.start)
            take, end = metric.summing(_adding(part), "sample", mine)
            walk.send(columns, take)
            end()
            total[:, rows, columns] += part
            total[:, columns, rows] += part.mT


def _fitting(sweep: Sweep, memory: int) -> int:
    return columns_at_once(sweep, memory)[0]


def _adding(total: Tensor) -> Callable[[Tensor], None]:
    """What adds to a tensor."""

    def add(found: Tensor) -> None:
        total.add_(found)

    return add


def _slices(k: int, size: int, start: int = 0) -> list[slice]:
    return [slice(a, min(a + size, k)) for a in range(start, k, size)]


def _last_layer(at: Linearization[Any], metric: AnyMetric) -> LastLayerColumns | None:
    """The last layers, behind which columns are rows of their Jacobian; None where they are none,
    or M couples them with others.
    """
    if at.sweep is None or at.sweep.hooks is not None or at.wrt == "input":
        return None
    last = LastLayerColumns(at.sweep, UnitHessian(at.y), set(), factor=_unit_factor)
    apart = metric.is_apart({p for p, _ in last.factors})
    return last if last.useful and apart else None


class UnitHessian(LossHessian):
    """H = S = I in the outputs of a model: the unit cotangents as columns of a loss.

    Args:
        y: the output, (N, *outputs).
    """

    closed_form = True

    def __init__(self, y: Tensor):
        out = math.prod(y.shape[1:])
        super().__init__([tuple(y.shape)], y, out, out, len(y))

    @override
    def columns(self, start: int, stop: int) -> Tensor:
        eye = torch.eye(self.block, dtype=self.dtype, device=self.device)[start:stop]
        return eye[:, None, None].expand(-1, self.rows, 1, -1)

    @override
    def columns_through(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        for part in rows.split(size):
            yield part[:, None].expand(-1, self.rows, -1)


def _unit_factor(
    hessian: LossHessian, patches: Patches, shape: tuple[int, ...], dtype: torch.dtype
) -> SharedColumns:
    like = torch.empty(0, dtype=dtype, device=hessian.device)
    return SharedColumns(patches, Unit(0, hessian.block, hessian.block), shape, like)


# -- J M J'^T between all samples ------------------------------------------------------------------


def kernel(at: Linearization[Any], other: Linearization[Any], metric: AnyMetric) -> Tensor:
    """(N, out, N', out')."""
    partner = dict(zip(other.leaves, at.leaves, strict=True))
    total = at.y.new_zeros(at.out, at.n, other.out, other.n)
    columns = 0
    for to, there in _factors_of_groups(other):
        theirs = {partner[p]: f for p, f in there.items()}
        rows = 0
        for of, mine in _factors_of_groups(at):
            found = metric.contract(mine, theirs, "all")
            if found is not None:
                total[rows : rows + of, :, columns : columns + to] = found
            rows += of
        columns += to
    return total.permute(1, 0, 3, 2)


def kernel_by_output(at: Linearization[Any], other: Linearization[Any]) -> Tensor:
    """The same between equal outputs alone, (N, N', out)."""
    partner = dict(zip(other.leaves, at.leaves, strict=True))
    total = at.y.new_zeros(at.out, at.n, other.n)
    size = min(_kept_at_once(at), _kept_at_once(other))
    for start in range(0, at.out, size):
        there: dict[Tensor, Factor] = {}
        other.factors(other.basis()[start : start + size], there.__setitem__)
        theirs = {partner[p]: f for p, f in there.items()}

        def add(p: Tensor, f: Factor, start: int = start, theirs: Any = theirs) -> None:
            for i in range(f.k) if p in theirs else ():
                one, two = f.columns(slice(i, i + 1)), theirs[p].columns(slice(i, i + 1))
                total[start + i] += one.kernel(two)[0, :, 0]

        at.factors(at.basis()[start : start + size], add)
    return total.permute(1, 2, 0)


def _factors_of_groups(at: Linearization[Any]) -> Iterator[tuple[int, dict[Tensor, Factor]]]:
    """How many unit cotangents, and the factors of them."""
    for u in at.basis().split(_kept_at_once(at)):
        found: dict[Tensor, Factor] = {}
        at.factors(u, found.__setitem__)
        yield len(u), found


def _kept_at_once(at: Linearization[Any]) -> int:
    """How many unit cotangents walk together, where those of two points are kept."""
    return at.out if at.sweep is None else min(at.out, columns_kept(at.sweep, at.memory // 2))


# -- the diagonal of J^T M J' ----------------------------------------------------------------------


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
    size = at.out if at.sweep is None else columns_at_once(at.sweep, at.memory)[0]
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
